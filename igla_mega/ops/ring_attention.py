"""Exact attention over a sequence that is split over ranks.   S tokens of a rank, B batch, H heads, Hk key-value heads

Tokens are split by zig-zag (`ops/zigzag.py`). Local blocks go through torch's fused kernels; what stands here is what
joins them: four schedules of communication behind one autograd function.

    p2p         keys and values travel round the ring (Liu et al. 2023, arXiv:2310.01889), one hop ahead of the compute;
                in the backward pass their gradients travel with them, in fp32. Two chunks in memory, for any W.
    allgather   every rank gets all keys and values at once (Llama 3, arXiv:2407.21783, section 3.3.2).
    a2a         every rank gets all tokens of some heads (DeepSpeed-Ulysses, arXiv:2309.14509): needs Hk % W == 0.
    a2a+p2p     a2a within groups of neighbours, p2p across them (Fang & Zhao 2024, arXiv:2405.07719).

The forward pass keeps the output and its log-sum-exp, so that the backward pass recomputes scores but no attention.
"""

import itertools
import logging
import math
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor

from igla_mega.ops.accumulate import accumulate_
from igla_mega.ops.block_attention import block_backward, block_forward
from igla_mega.ops.merge_partials import merge_partials
from igla_mega.ops.visibility import Block, visible_blocks
from igla_mega.ops.zigzag import Interval, zigzag_intervals, zigzag_join, zigzag_split

SCHEDULES = ("p2p", "allgather", "a2a", "a2a+p2p")
MERGE_GROUP = 4
"""Partial outputs that wait to be merged in one pass: more read the running sum less often, but stay in memory."""
_KV_TAG, _GRAD_TAG = 1, 2
_log = logging.getLogger(__name__)


@dataclass
class Kept:
    """Output and log-sum-exp of a forward pass, for one that recomputes the layer around it and must not redo it."""

    out: Tensor | None = None
    lse: Tensor | None = None


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: dist.ProcessGroup | None,
    *,
    causal: bool = True,
    scale: float | None = None,
    cu_seqlens: Tensor | Sequence[int] | Sequence[Sequence[int]] | None = None,
    schedule: str = "auto",
    inner_size: int | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    kept: Kept | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend over the whole sequence, of which each rank of `group` holds its zig-zag part.

    Exact: equals attention on one device up to the rounding of the sums, which are taken in fp32 (fp64 for fp64).

    Args:
        q: [S, B, H, D] fp64, fp32, bf16 or fp16.
        k, v: [S, B, Hk, D]; Hk divides H.
        group: the context-parallel ranks; None or one rank: attention on this device.
        scale: of the scores; 1 / sqrt(D) unless given.
        cu_seqlens: where documents begin in the whole sequence, and where the last one ends: [0, ..., end], for all
            rows or one list for each. Tokens see only their own document; tokens from `end` on are padding: their
            output and gradient are 0. Give it on the CPU: a CUDA tensor is waited for.
        schedule: one of `SCHEDULES`, or "auto".
        inner_size: ranks of an a2a group in "a2a+p2p"; chosen unless given.
        deterministic: ask the CUDA kernels for gradients that repeat bit for bit; they do on CPU.
        return_lse: also return the log-sum-exp of each row's scores.
        kept: filled with what the forward pass computed; when it comes filled, that is used instead of computing it.

    Returns:
        out [S, B, H, D], in q's type; with `return_lse` also lse [B, H, S] fp32 (natural log, -inf for padding).

    Raises:
        ValueError: shapes, heads or documents that do not fit, on every rank when ranks disagree.
    """
    size = 1 if group is None else group.size()
    documents = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else cu_seqlens
    if group is not None and size > 1:
        # First: what follows may raise, and on one rank alone it would leave the others waiting.
        rest = (q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, schedule, inner_size, causal, scale, documents)
        agree = _agree if q.device.type == "cpu" else _agree_once
        agree(group, (*q.shape[:4], *[0] * (4 - q.dim()), k.size(-2), zlib.crc32(repr(rest).encode())), q.device)
    _check(q, k, v, size)
    offsets = _document_offsets(documents, q.size(0) * size, q.size(1))
    if schedule == "auto":
        schedule, reason = choose_schedule(k.size(2), size, ranks_of_a_node(group))
        _say_once(schedule, reason)
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule: {schedule!r} is none of {', '.join(SCHEDULES)}, auto.")
    inner, ring = _groups(group, schedule, inner_size, k.size(2))
    task = _Task(
        inner=inner,
        ring=ring,
        gather=schedule == "allgather" and ring is not None,
        offsets=offsets,
        causal=causal,
        scale=scale if scale is not None else 1.0 / math.sqrt(q.size(-1)),
        deterministic=deterministic,
    )
    out, lse = _RingAttention.apply(q, k, v, task, kept if kept is not None else Kept())
    if not return_lse:
        return out
    if inner is not None:
        lse = _from_heads(lse.permute(2, 0, 1).unsqueeze(-1), inner).squeeze(-1).permute(1, 2, 0)
    return out, lse


def choose_schedule(num_kv_heads: int, size: int, ranks_of_node: int) -> tuple[str, str]:
    """The schedule that moves the fewest bytes over the slowest link, and why.

    Args:
        num_kv_heads: of one tensor-parallel rank.
        size: context-parallel ranks.
        ranks_of_node: of these, on one node.
    """
    if size == 1:
        return "p2p", "one rank: nothing travels"
    if size <= ranks_of_node:
        if num_kv_heads % size == 0:
            return "a2a", f"{num_kv_heads} key-value heads divide among {size} ranks of a node: fewest bytes, no merge"
        return "p2p", f"{num_kv_heads} key-value heads do not divide among {size} ranks"
    inner = inner_group_size(num_kv_heads, size, ranks_of_node)
    if inner > 1:
        return "a2a+p2p", f"{size} ranks, {ranks_of_node} on a node: a2a among {inner} of a node, ring across nodes"
    return "p2p", f"{num_kv_heads} key-value heads do not divide among neighbours of {ranks_of_node} on a node"


def inner_group_size(num_kv_heads: int, size: int, ranks_of_node: int) -> int:
    """Ranks of the largest a2a group that stays within a node and that heads and ranks divide."""
    return max(n for n in range(1, min(size, ranks_of_node) + 1) if not (size % n or num_kv_heads % n))


def ranks_of_a_node(group: dist.ProcessGroup | None) -> int:
    """How many ranks of the group share a node, where torchrun has said how many a node has; else all."""
    if group is None or "LOCAL_WORLD_SIZE" not in os.environ:
        return 1 if group is None else group.size()
    nodes = [rank // int(os.environ["LOCAL_WORLD_SIZE"]) for rank in dist.get_process_group_ranks(group)]
    return min(nodes.count(node) for node in nodes)


@lru_cache(maxsize=64)
def _say_once(schedule: str, reason: str) -> None:
    _log.info("ring_attention: schedule %s (%s)", schedule, reason)


@dataclass(frozen=True)
class _Task:
    """What one call does, besides its tensors."""

    inner: dist.ProcessGroup | None
    """Ranks that exchange heads for tokens before and after; None: nothing is exchanged."""
    ring: dist.ProcessGroup | None
    """Ranks that keys and values travel between; None: they stay."""
    gather: bool
    """Gather all keys and values at once instead of passing them on."""
    offsets: tuple[tuple[int, ...], ...]
    """Documents of each row of the batch; one entry stands for all rows."""
    causal: bool
    scale: float
    deterministic: bool

    @property
    def rows(self) -> list[slice]:
        """Rows of the batch whose documents are the same."""
        return [slice(None)] if len(self.offsets) == 1 else [slice(row, row + 1) for row in range(len(self.offsets))]

    @property
    def place(self) -> tuple[int, int]:
        return (0, 1) if self.ring is None else (self.ring.rank(), self.ring.size())

    def blocks(self, queries: tuple[Interval, ...], keys: tuple[Interval, ...]) -> Iterator[tuple[slice, Block]]:
        """Rows of the batch, and a block that they share."""
        for rows, offsets in zip(self.rows, self.offsets, strict=True):
            for block in visible_blocks(queries, keys, offsets, causal=self.causal):
                yield rows, block


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, task, kept):
        if task.inner is not None:
            q, k, v = (_to_heads(t, task.inner) for t in (q, k, v))
        if kept.out is None:
            kept.out, kept.lse = _gathered_forward(q, k, v, task) if task.gather else _ring_forward(q, k, v, task)
        ctx.task = task
        ctx.save_for_backward(q, k, v, kept.out, kept.lse)
        ctx.mark_non_differentiable(kept.lse)
        out = kept.out if task.inner is None else _from_heads(kept.out, task.inner)
        # A tensor of its own: autograd marks what is returned, and `kept` must stay free of that.
        return out.view_as(out), kept.lse

    @staticmethod
    def backward(ctx, grad_out, _):
        task: _Task = ctx.task
        q, k, v, out, lse = ctx.saved_tensors
        if task.inner is not None:
            grad_out = _to_heads(grad_out, task.inner)
        run = _gathered_backward if task.gather else _ring_backward
        with _deterministic(task.deterministic):
            grads = run(grad_out, q, k, v, out, lse, task)
        if task.inner is not None:
            return *(_from_heads(grad, task.inner) for grad in grads), None, None
        return *grads, None, None


def _ring_forward(q: Tensor, k: Tensor, v: Tensor, task: _Task) -> tuple[Tensor, Tensor]:
    rank, size = task.place
    parts = [zigzag_intervals(q.size(0) * size, source, size) for source in range(size)]
    partials = _Partials(q, task.rows)
    kv, free = torch.stack((k, v)) if size > 1 else None, None
    for step in range(size):
        source = (rank - step) % size
        arriving = _pass_on(kv, task.ring, _KV_TAG, free) if step + 1 < size else None
        for rows, block in task.blocks(parts[rank], parts[source]):
            partials.add(rows, block, *_attend(q, k, v, rows, block, task))
        partials.end_of_step()
        if arriving:
            kv, free = arriving.wait()
            k, v = kv.unbind()
    return partials.merged()


def _ring_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, task: _Task
) -> tuple[Tensor, Tensor, Tensor]:
    rank, size = task.place
    parts = [zigzag_intervals(q.size(0) * size, source, size) for source in range(size)]
    if size == 1 and (alone := _only_block(q, task, parts[0])):
        return _gradients(grad_out, q, k, v, out, lse, slice(None), alone, task)

    sums = _Sums(q, k)
    rows_of = _Rows(grad_out, q, out, lse)
    kv, free = torch.stack((k, v)) if size > 1 else None, None
    grads_arriving, free_grads = None, None
    for step in range(size):
        source = (rank - step) % size
        arriving = _pass_on(kv, task.ring, _KV_TAG, free) if step + 1 < size else None
        found = [
            (rows, block, rows_of.gradients(k, v, rows, block, task))
            for rows, block in task.blocks(parts[rank], parts[source])
        ]
        if grads_arriving:
            sums.kv, free_grads = grads_arriving.wait()
        for rows, block, grads in found:
            sums.add(rows, block, grads)
        # One hop behind their keys: the last hop brings each rank's own home.
        grads_arriving = _pass_on(sums.kv, task.ring, _GRAD_TAG, free_grads) if size > 1 else None
        if arriving:
            kv, free = arriving.wait()
            k, v = kv.unbind()
    if grads_arriving:
        sums.kv, _ = grads_arriving.wait()
    grad_k, grad_v = sums.kv.to(k.dtype).unbind()
    return sums.q.to(q.dtype), grad_k, grad_v


def _gathered_forward(q: Tensor, k: Tensor, v: Tensor, task: _Task) -> tuple[Tensor, Tensor]:
    rank, size = task.place
    length = q.size(0) * size
    partials = _Partials(q, task.rows)
    k, v = _gather(torch.stack((k, v)), task.ring).unbind()
    for rows, block in task.blocks(zigzag_intervals(length, rank, size), ((0, length),)):
        partials.add(rows, block, *_attend(q, k, v, rows, block, task))
    return partials.merged()


def _gathered_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, task: _Task
) -> tuple[Tensor, Tensor, Tensor]:
    rank, size = task.place
    length = q.size(0) * size
    k, v = _gather(torch.stack((k, v)), task.ring).unbind()
    sums = _Sums(q, k)
    rows_of = _Rows(grad_out, q, out, lse)
    for rows, block in task.blocks(zigzag_intervals(length, rank, size), ((0, length),)):
        sums.add(rows, block, rows_of.gradients(k, v, rows, block, task))
    mine = sums.kv
    if task.ring is not None:
        parts = torch.cat(zigzag_split(sums.kv, size, 1))
        mine = torch.empty_like(parts[:2])
        dist.reduce_scatter_tensor(mine, parts, group=task.ring)
    grad_k, grad_v = mine.to(k.dtype).unbind()
    return sums.q.to(q.dtype), grad_k, grad_v


def _attend(q, k, v, rows: slice, block: Block, task: _Task) -> tuple[Tensor, Tensor]:
    q = _heads_first(q[block.q_start : block.q_stop, rows])
    k, v = (_heads_first(t[block.k_start : block.k_stop, rows]) for t in (k, v))
    return block_forward(q, k, v, causal=block.causal, scale=task.scale)


def _gradients(grad_out, q, k, v, out, lse, rows: slice, block: Block, task: _Task) -> tuple[Tensor, Tensor, Tensor]:
    """One block's share of dq, dk and dv, [tokens, rows, heads, D] each."""
    grad_out, q, out = (_heads_first(t[block.q_start : block.q_stop, rows]) for t in (grad_out, q, out))
    k, v = (_heads_first(t[block.k_start : block.k_stop, rows]).to(q.dtype) for t in (k, v))
    lse = lse[rows, :, block.q_start : block.q_stop]
    grads = block_backward(grad_out, q, k, v, out, lse, causal=block.causal, scale=task.scale)
    return tuple(grad.permute(2, 0, 1, 3) for grad in grads)  # type: ignore[return-value]


def _heads_first(x: Tensor) -> Tensor:
    return x.permute(1, 2, 0, 3)


class _Rows:
    """What the gradients of these queries are made from, whatever block they look at."""

    def __init__(self, grad_out: Tensor, q: Tensor, out: Tensor, lse: Tensor):
        # aten's CPU kernel sums dk and dv of half types over heads in that type; several blocks would add their errors.
        wide = q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16)
        self.grad_out, self.q, self.out = (t.float() if wide else t for t in (grad_out, q, out))
        self.lse = lse

    def gradients(self, k: Tensor, v: Tensor, rows: slice, block: Block, task: _Task) -> tuple[Tensor, Tensor, Tensor]:
        return _gradients(self.grad_out, self.q, k, v, self.out, self.lse, rows, block, task)


class _Sums:
    """Gradients as they add up: fp32 (fp64 for fp64), keys and values in one tensor that is sent as it is."""

    def __init__(self, q: Tensor, k: Tensor):
        dtype = torch.promote_types(q.dtype, torch.float32)
        self.q = torch.zeros(q.shape, dtype=dtype, device=q.device)
        self.kv = torch.zeros((2, *k.shape), dtype=dtype, device=q.device)

    def add(self, rows: slice, block: Block, grads: tuple[Tensor, Tensor, Tensor]) -> None:
        keys = slice(block.k_start, block.k_stop)
        accumulate_([self.q[block.q_start : block.q_stop, rows], *self.kv[:, keys, rows].unbind()], grads)


class _Partials:
    """Outputs of blocks, merged a few steps at a time."""

    def __init__(self, q: Tensor, rows: list[slice]):
        self._q = q
        self._rows = rows
        self._dtype = torch.promote_types(q.dtype, torch.float32)
        self._waiting: list[tuple[slice, int, int, Tensor, Tensor]] = []
        self._steps = 0
        self._sum: tuple[Tensor, Tensor] | None = None

    def add(self, rows: slice, block: Block, out: Tensor, lse: Tensor) -> None:
        """Take a block's out [B, H, Sq, D] and lse [B, H, Sq]."""
        self._waiting.append((rows, block.q_start, block.q_stop, out, lse))

    def end_of_step(self) -> None:
        self._steps += 1
        if self._steps >= MERGE_GROUP:
            self._merge(self._dtype)

    def merged(self) -> tuple[Tensor, Tensor]:
        """out [S, B, H, D] in q's type, lse [B, H, S]; rows that no block covered hold 0 and -inf."""
        if self._sum is None and len(self._waiting) == 1:
            rows, start, stop, out, lse = self._waiting[0]
            if rows == slice(None) and stop - start == self._q.size(0):
                return out.permute(2, 0, 1, 3), lse
        self._merge(self._q.dtype)
        assert self._sum is not None
        return self._sum

    def _merge(self, dtype: torch.dtype) -> None:
        length, batch, heads, _ = self._q.shape
        before = self._sum
        if before is not None and before[0].dtype == dtype:
            out, lse = before
        else:
            out = torch.empty(self._q.shape, dtype=dtype, device=self._q.device)
            lse = torch.empty((batch, heads, length), dtype=self._dtype, device=self._q.device)
        into = _heads_first(out)
        for rows in self._rows:
            parts = [part[1:] for part in self._waiting if part[0] == rows]
            if before is not None:
                parts.insert(0, (0, length, _heads_first(before[0])[rows], before[1][rows]))
            for start, stop, outs, lses in _segments(parts, length):
                target, target_lse = into[rows, :, start:stop], lse[rows, :, start:stop]
                if not outs:
                    target.zero_()
                    target_lse.fill_(-torch.inf)
                elif len(outs) == 1:
                    target.copy_(outs[0])
                    target_lse.copy_(lses[0])
                else:
                    merge_partials(outs, lses, out=target, lse=target_lse)
        self._sum, self._waiting, self._steps = (out, lse), [], 0


def _segments(parts: list[tuple[int, int, Tensor, Tensor]], length: int) -> Iterator[tuple]:
    """Runs of queries that the same partials cover, with those partials' rows."""
    borders = sorted({0, length, *(part[0] for part in parts), *(part[1] for part in parts)})
    coming = sorted(parts, key=lambda part: part[0], reverse=True)
    active: list[tuple[int, int, Tensor, Tensor]] = []
    for start, stop in itertools.pairwise(borders):
        active = [part for part in active if part[1] > start]
        while coming and coming[-1][0] <= start:
            active.append(coming.pop())
        yield (
            start,
            stop,
            [out[:, :, start - first : stop - first] for first, _, out, _ in active],
            [lse[:, :, start - first : stop - first] for first, _, _, lse in active],
        )


@dataclass
class _Arriving:
    """A message on its way here, and ours on its way to the next rank."""

    buffer: Tensor
    works: list[dist.Work]
    sent: Tensor
    """Kept until it has left."""

    def wait(self) -> tuple[Tensor, Tensor]:
        """The message, and memory that is free for the next one."""
        for work in self.works:
            work.wait()
        return self.buffer, self.sent


def _pass_on(message: Tensor | None, ring: dist.ProcessGroup | None, tag: int, free: Tensor | None = None) -> _Arriving:
    """Start sending a message to the next rank of the ring and receiving the previous rank's, into `free` memory."""
    assert message is not None and ring is not None, "one rank passes nothing on"
    rank, size = ring.rank(), ring.size()
    buffer = torch.empty_like(message) if free is None else free
    to, source = (dist.get_global_rank(ring, (rank + way) % size) for way in (1, -1))
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, message, to, group=ring, tag=tag),
            dist.P2POp(dist.irecv, buffer, source, group=ring, tag=tag),
        ]
    )
    return _Arriving(buffer, works, message)


def _gather(kv: Tensor, ring: dist.ProcessGroup | None) -> Tensor:
    """Keys and values of the whole sequence, [2, S * W, B, Hk, D]."""
    if ring is None:
        return kv
    parts = torch.empty((ring.size() * 2, *kv.shape[1:]), dtype=kv.dtype, device=kv.device)
    dist.all_gather_into_tensor(parts, kv, group=ring)
    return zigzag_join(list(parts.chunk(ring.size())), 1)


def _to_heads(x: Tensor, inner: dist.ProcessGroup) -> Tensor:
    """From a rank's tokens of all heads to all ranks' tokens of its heads: [S, B, H, D] -> [S * A, B, H / A, D]."""
    size = inner.size()
    sent = x.unflatten(2, (size, -1)).permute(2, 0, 1, 3, 4).contiguous()
    got = torch.empty_like(sent)
    dist.all_to_all_single(got, sent, group=inner)
    return zigzag_join(list(got.unbind()), 0)


def _from_heads(x: Tensor, inner: dist.ProcessGroup) -> Tensor:
    """The way back: [S * A, B, H / A, D] -> [S, B, H, D]."""
    sent = torch.stack(zigzag_split(x, inner.size(), 0))
    got = torch.empty_like(sent)
    dist.all_to_all_single(got, sent, group=inner)
    return got.permute(1, 2, 0, 3, 4).flatten(2, 3)


def _only_block(q: Tensor, task: _Task, part: tuple[Interval, ...]) -> Block | None:
    """The one block that covers every query, if it is one."""
    blocks = list(task.blocks(part, part))
    if len(blocks) == 1 and blocks[0][0] == slice(None) and blocks[0][1].q_stop - blocks[0][1].q_start == q.size(0):
        return blocks[0][1]
    return None


def _groups(
    group: dist.ProcessGroup | None, schedule: str, inner_size: int | None, num_kv_heads: int
) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
    """The groups that exchange heads and that pass keys on."""
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


@lru_cache(maxsize=16)
def _hierarchy(group: dist.ProcessGroup, inner_size: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """Split a group into neighbours, and into those at the same place among their neighbours."""
    ranks, rank = dist.get_process_group_ranks(group), group.rank()
    first, place = rank - rank % inner_size, rank % inner_size
    # Only members call: other context groups, and other ranks, need not know.
    inner = dist.new_group(ranks[first : first + inner_size], use_local_synchronization=True)
    return inner, dist.new_group(ranks[place::inner_size], use_local_synchronization=True)


def _check(q: Tensor, k: Tensor, v: Tensor, size: int) -> None:
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


def _document_offsets(documents, length: int, batch: int) -> tuple[tuple[int, ...], ...]:
    if documents is None:
        return ((0, length),)
    lists = list(documents)
    rows = [tuple(map(int, row)) for row in (lists if lists and not isinstance(lists[0], int) else [lists])]
    if len(rows) not in (1, batch):
        raise ValueError(f"cu_seqlens: {len(rows)} lists for {batch} rows. Give one for all, or one for each.")
    for row, offsets in enumerate(rows):
        rising = all(a < b for a, b in itertools.pairwise(offsets))
        if len(offsets) < 2 or offsets[0] != 0 or not rising:
            raise ValueError(f"cu_seqlens: row {row} must rise from 0, each document longer than nothing: {offsets}.")
        if offsets[-1] > length:
            raise ValueError(f"cu_seqlens: row {row} ends at {offsets[-1]}, beyond the sequence of {length} tokens.")
    return tuple(rows) if len(set(rows)) > 1 else (rows[0],)


def _agree(group: dist.ProcessGroup, call: tuple[int, ...], device: torch.device) -> None:
    """Make sure that all ranks of the group call alike: a message of another size would wait for ever, or lie."""
    mine = torch.tensor(call, device=device)
    all_ranks = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(all_ranks, mine, group=group)
    for rank, theirs in enumerate(all_ranks):
        if not torch.equal(theirs, all_ranks[0]):
            raise ValueError(
                f"ring_attention: rank {rank} of the context group holds [S, B, H, D, Hk] = {theirs[:5].tolist()}, "
                f"rank 0 {all_ranks[0][:5].tolist()}; types, documents and schedules must agree too."
            )


_agree_once = lru_cache(maxsize=1024)(_agree)
"""For CUDA, where reading the answer back would stop the stream in every layer: each new call is checked once."""


@contextmanager
def _deterministic(wanted: bool):
    before = torch.are_deterministic_algorithms_enabled()
    if wanted and not before:
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        if wanted and not before:
            torch.use_deterministic_algorithms(False)
