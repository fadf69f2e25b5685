"""Check the inputs of `ring_attention`, on one rank and between the ranks of the group."""

import itertools
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor


def check_inputs(q: Tensor, k: Tensor, v: Tensor, size: int) -> None:
    """Raise ValueError for shapes and types that the schedules cannot handle."""
    if q.dim() != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.size(3) != k.size(3):
        raise ValueError(
            "ring_attention takes q [S, B, H, D] and k, v [S, B, Hk, D] of the same S, B and D, "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}."
        )
    if q.size(2) % k.size(2):
        raise ValueError(f"{k.size(2)} key-value heads do not divide {q.size(2)} query heads.")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q, k and v must have one floating-point type, got {q.dtype}, {k.dtype}, {v.dtype}.")
    if size > 1 and q.size(0) % 2:
        raise ValueError(
            f"a rank holds {q.size(0)} tokens, an odd number: zig-zag gives each of {size} ranks two equal chunks. "
            "Split the sequence with zigzag_shard, which can pad it."
        )


def document_offsets(documents, length: int, batch: int) -> tuple[tuple[int, ...], ...]:
    """Return checked document boundaries, one tuple per batch row, or a single one if all rows are equal."""
    if documents is None:
        return ((0, length),)
    lists = list(documents)
    rows = [tuple(map(int, row)) for row in (lists if lists and not isinstance(lists[0], int) else [lists])]
    if len(rows) not in (1, batch):
        raise ValueError(f"cu_seqlens: {len(rows)} lists for {batch} rows. Give one for all, or one for each.")
    for row, offsets in enumerate(rows):
        increasing = all(a < b for a, b in itertools.pairwise(offsets))
        if len(offsets) < 2 or offsets[0] != 0 or not increasing:
            raise ValueError(
                f"cu_seqlens: row {row} must rise from 0, with at least one token in each document; got {offsets}."
            )
        if offsets[-1] > length:
            raise ValueError(f"cu_seqlens: row {row} ends at {offsets[-1]}, beyond the sequence of {length} tokens.")
    # Equal rows share their blocks: one kernel call then covers the whole batch.
    return tuple(rows) if len(set(rows)) > 1 else (rows[0],)


def check_agreement(group: dist.ProcessGroup, call: tuple[int, ...], device: torch.device) -> None:
    """Check that all ranks of the group made the same call: messages of unequal sizes would hang or corrupt data.

    Raises:
        ValueError: on every rank, naming the first rank whose call differs from that of rank 0.
    """
    mine = torch.tensor(call, device=device)
    all_ranks = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(all_ranks, mine, group=group)
    for rank, theirs in enumerate(all_ranks):
        if not torch.equal(theirs, all_ranks[0]):
            raise ValueError(
                f"ring_attention: rank {rank} of the context group holds [S, B, H, D, Hk] = {theirs[:5].tolist()}, "
                f"rank 0 {all_ranks[0][:5].tolist()}; types, documents and schedules must agree as well."
            )


check_agreement_once = lru_cache(maxsize=1024)(check_agreement)
"""Variant of `check_agreement` for CUDA, where reading the result waits for the stream: a distinct call is checked
once. Every rank must use the same variant, since each check is a collective."""
