"""Choose how context-parallel ranks exchange keys and values, and build the process groups that do it."""

import logging
import math
import os
from functools import lru_cache

import torch.distributed as dist

SCHEDULES = ("p2p", "allgather", "a2a", "a2a+p2p")
"""Communication schedules of `ring_attention`, described in the docstring of `ops/ring_attention.py`."""
_log = logging.getLogger(__name__)


def choose_schedule(num_kv_heads: int, size: int, ranks_of_node: int) -> tuple[str, str]:
    """Return the schedule that moves the fewest bytes over the slowest link, and the reason as text.

    Args:
        num_kv_heads: key-value heads of one tensor-parallel rank.
        size: number of context-parallel ranks.
        ranks_of_node: number of these ranks that share a node.
    """
    if size == 1:
        return "p2p", "one rank: nothing travels"
    if size <= ranks_of_node:
        # An all-to-all sends each rank 1/W of q, k, v and out; the ring sends all of k and v W - 1 times.
        if num_kv_heads % size == 0:
            return "a2a", f"{num_kv_heads} key-value heads divide among {size} ranks of a node: fewest bytes, no merge"
        return "p2p", f"{num_kv_heads} key-value heads do not divide among {size} ranks"
    inner = inner_group_size(num_kv_heads, size, ranks_of_node)
    # Across nodes only the ring overlaps its transfers with compute, so the all-to-all stays inside a node.
    if inner > 1:
        return "a2a+p2p", f"{size} ranks, {ranks_of_node} on a node: a2a among {inner} of a node, ring across nodes"
    return "p2p", f"{num_kv_heads} key-value heads do not divide among neighbours of {ranks_of_node} on a node"


def inner_group_size(num_kv_heads: int, size: int, ranks_of_node: int) -> int:
    """Return the size of the largest a2a group within a node that divides both the heads and the ranks."""
    return max(n for n in range(1, min(size, ranks_of_node) + 1) if not (size % n or num_kv_heads % n))


def ranks_of_a_node(group: dist.ProcessGroup | None) -> int:
    """Return how many ranks of the group share a node.

    Without torchrun's LOCAL_WORLD_SIZE all ranks count as one node. Where nodes hold unequal numbers of the group's
    ranks, the smallest number counts.
    """
    if group is None or "LOCAL_WORLD_SIZE" not in os.environ:
        return 1 if group is None else group.size()
    nodes = [rank // int(os.environ["LOCAL_WORLD_SIZE"]) for rank in dist.get_process_group_ranks(group)]
    return min(nodes.count(node) for node in nodes)


@lru_cache(maxsize=64)
def log_choice(schedule: str, reason: str) -> None:
    """Log an automatic choice once per process: every layer of every step makes the same one."""
    _log.info("ring_attention: schedule %s (%s)", schedule, reason)


def schedule_groups(
    group: dist.ProcessGroup | None, schedule: str, inner_size: int | None, num_kv_heads: int
) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
    """Return the group that exchanges heads (a2a) and the group that passes keys on (ring); None where unused.

    Raises:
        ValueError: the inner size does not divide the ranks or the heads.
    """
    if group is None or group.size() == 1:
        return None, None
    if schedule in ("p2p", "allgather"):
        return None, group
    size = group.size()
    if schedule == "a2a":
        inner_size = size
    elif inner_size is None:
        inner_size = inner_group_size(num_kv_heads, size, ranks_of_a_node(group))
    if size % inner_size:
        raise ValueError(f"inner_size: {inner_size} does not divide the {size} context-parallel ranks.")
    if num_kv_heads % inner_size:
        raise ValueError(
            f"schedule {schedule}: {num_kv_heads} key-value heads do not divide among {inner_size} ranks. "
            f"Use p2p, or {math.gcd(num_kv_heads, size)} ranks."
        )
    if inner_size == size:
        return group, None
    return (None, group) if inner_size == 1 else _hierarchy(group, inner_size)


# Cached: creating a group is a collective with a handshake, and every layer of every step gets here.
@lru_cache(maxsize=16)
def _hierarchy(group: dist.ProcessGroup, inner_size: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """Split a group into neighbours (inner), and into the ranks with the same index among their neighbours (ring)."""
    ranks, rank = dist.get_process_group_ranks(group), group.rank()
    first, index = rank - rank % inner_size, rank % inner_size
    # Local synchronization: only members call. A plain new_group would need a call from every rank of the world.
    inner = dist.new_group(ranks[first : first + inner_size], use_local_synchronization=True)
    return inner, dist.new_group(ranks[index::inner_size], use_local_synchronization=True)
