"""Compute exact attention over a sequence that is split over ranks.

Dimensions: S tokens of a rank, B batch, H heads, Hk key-value heads, D head size, W ranks.

Tokens are split by zig-zag (`ops/zigzag.py`), and each block of visible (query, key) pairs (`ops/visibility.py`) is one
call of a fused kernel (`ops/block_attention.py`). This module combines the blocks, with four communication schedules
behind one autograd function (`ops/ring_schedule.py` chooses):

    p2p         keys and values travel round the ring (Liu et al. 2023, arXiv:2310.01889), one hop ahead of the compute;
                in the backward pass their gradients travel with them, in fp32. Two chunks in memory, for any W.
    allgather   every rank gets all keys and values at once (Llama 3, arXiv:2407.21783, section 3.3.2).
    a2a         every rank gets all tokens of some heads (DeepSpeed-Ulysses, arXiv:2309.14509): needs Hk % W == 0.
    a2a+p2p     a2a within groups of neighbours, p2p across them (Fang & Zhao 2024, arXiv:2405.07719).

The forward pass saves the output and its log-sum-exp. With both, the gradient of each block is exact on its own
(`block_backward`), so the backward pass recomputes scores but never the softmax's normalization or the output.
"""

import itertools
import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from igla_mega.ops.accumulate import accumulate_
from igla_mega.ops.block_attention import block_backward, block_forward
from igla_mega.ops.merge_partials import merge_partials
from igla_mega.ops.ring_checks import check_agreement, check_agreement_once, check_inputs, document_offsets
from igla_mega.ops.ring_schedule import SCHEDULES, choose_schedule, log_choice, ranks_of_a_node, schedule_groups
from igla_mega.ops.visibility import Block, visible_blocks
from igla_mega.ops.zigzag import Interval, zigzag_intervals, zigzag_join, zigzag_split

MERGE_GROUP = 4
"""Ring steps whose partial outputs are merged in one pass. More steps read the running sum less often, but keep more
partial outputs in memory."""
# Two messages between the same two ranks are in flight at once in the backward pass: tags keep them apart.
_KV_TAG, _GRAD_TAG = 1, 2


@dataclass
class Kept:
    """Output and log-sum-exp of a forward pass, saved for activation recomputation.

    A recomputed layer passes the same object again, and attention returns the saved output instead of computing it.
    """

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
    """Attend over the whole sequence; each rank of `group` holds its zig-zag part of it.

    Exact: equals attention on one device up to the rounding of the sums, which are taken in fp32 (fp64 for fp64).

    Args:
        q: [S, B, H, D] fp64, fp32, bf16 or fp16.
        k, v: [S, B, Hk, D]; Hk divides H.
        group: context-parallel ranks; None or one rank means attention on this device.
        causal: True if a token sees no later token.
        scale: factor of the scores; 1 / sqrt(D) by default.
        cu_seqlens: first token of each document in the whole sequence, and the end of the last one: [0, ..., end];
            one list for all rows, or one list per row. Tokens see only their own document; tokens from `end` on are
            padding: their output and gradient are 0. Pass it on the CPU: reading a CUDA tensor waits for the device.
        schedule: one of `SCHEDULES`, or "auto".
        inner_size: number of ranks of an a2a group in "a2a+p2p"; chosen automatically by default.
        deterministic: True to request gradients from the CUDA kernels that repeat bit for bit; on CPU they always do.
        return_lse: True to also return the log-sum-exp of each query's scores.
        kept: filled with the results of the forward pass; if already filled, its content is returned instead.

    Returns:
        out [S, B, H, D], in q's type; with `return_lse` also lse [B, H, S] fp32 (natural log, -inf for padding).

    Raises:
        ValueError: shapes, heads or documents are invalid, or differ between ranks (then on every rank).
    """
    size = 1 if group is None else group.size()
    documents = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else cu_seqlens
    if group is not None and size > 1:
        # Before any other check: an error on one rank alone would leave the other ranks waiting for its messages.
        rest = (q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, schedule, inner_size, causal, scale, documents)
        agree = check_agreement if q.device.type == "cpu" else check_agreement_once
        agree(group, (*q.shape[:4], *[0] * (4 - q.dim()), k.size(-2), zlib.crc32(repr(rest).encode())), q.device)
    check_inputs(q, k, v, size)
    offsets = document_offsets(documents, q.size(0) * size, q.size(1))
    if schedule == "auto":
        schedule, reason = choose_schedule(k.size(2), size, ranks_of_a_node(group))
        log_choice(schedule, reason)
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule: {schedule!r} is none of {', '.join(SCHEDULES)}, auto.")
    inner, ring = schedule_groups(group, schedule, inner_size, k.size(2))
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
        # The exchange of heads takes [S, B, H, D]: lse joins it with D = 1.
        lse = _from_heads(lse.permute(2, 0, 1).unsqueeze(-1), inner).squeeze(-1).permute(1, 2, 0)  # [B, H, S]
    return out, lse


@dataclass(frozen=True)
class _Task:
    """Settings of one call of `ring_attention`, without its tensors."""

    inner: dist.ProcessGroup | None
    """Ranks that exchange heads for tokens before and after attention; None if no heads are exchanged."""
    ring: dist.ProcessGroup | None
    """Ranks that keys and values travel between; None if they stay where they are."""
    gather: bool
    """True to all-gather keys and values at once instead of passing them round the ring."""
    offsets: tuple[tuple[int, ...], ...]
    """Document boundaries of each row of the batch; a single entry applies to all rows."""
    causal: bool
    """True if a token sees no later token."""
    scale: float
    """Factor of the scores."""
    deterministic: bool
    """True to request bitwise reproducible gradients from the CUDA kernels."""

    @property
    def rows(self) -> list[slice]:
        """Groups of batch rows with the same documents: all rows at once, or each row by itself."""
        return [slice(None)] if len(self.offsets) == 1 else [slice(row, row + 1) for row in range(len(self.offsets))]

    @property
    def place(self) -> tuple[int, int]:
        """Rank and size of the ring; (0, 1) without one."""
        return (0, 1) if self.ring is None else (self.ring.rank(), self.ring.size())

    def blocks(self, queries: tuple[Interval, ...], keys: tuple[Interval, ...]) -> Iterator[tuple[slice, Block]]:
        """Yield each block of visible (query, key) pairs with the batch rows that it applies to."""
        for rows, offsets in zip(self.rows, self.offsets, strict=True):
            for block in visible_blocks(queries, keys, offsets, causal=self.causal):
                yield rows, block


class _RingAttention(torch.autograd.Function):
    """Exchange heads where configured, attend, and exchange back; the backward pass mirrors it."""

    @staticmethod
    def forward(ctx, q, k, v, task, kept):
        """Return out [S, B, H, D] and lse; with a2a lse is [B, H / A, S * A], this rank's heads of all its tokens."""
        if task.inner is not None:
            q, k, v = (_to_heads(t, task.inner) for t in (q, k, v))  # [S * A, B, H / A, D], A ranks of `inner`
        if kept.out is None:
            kept.out, kept.lse = _gathered_forward(q, k, v, task) if task.gather else _ring_forward(q, k, v, task)
        ctx.task = task
        ctx.save_for_backward(q, k, v, kept.out, kept.lse)
        ctx.mark_non_differentiable(kept.lse)
        out = kept.out if task.inner is None else _from_heads(kept.out, task.inner)
        # A new view: autograd attaches its graph to the returned tensor, and `kept.out` must not hold that graph alive.
        return out.view_as(out), kept.lse

    @staticmethod
    def backward(ctx, grad_out, _):
        """Return dq, dk and dv of this rank's tokens."""
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
    """Attend to the keys of one rank per ring step; return out [S, B, H, D] and lse [B, H, S]."""
    rank, size = task.place
    parts = [zigzag_intervals(q.size(0) * size, source, size) for source in range(size)]
    partials = _Partials(q, task.rows)
    # Keys and values in one tensor: one message per hop.
    kv, free = torch.stack((k, v)) if size > 1 else None, None  # [2, S, B, Hk, D]
    for step in range(size):
        source = (rank - step) % size
        # Sent before the blocks are computed, so that the transfer overlaps them; the last step sends nothing.
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
    """Return dq, dk and dv: keys travel as in the forward pass, and their gradient sums follow one hop behind."""
    rank, size = task.place
    parts = [zigzag_intervals(q.size(0) * size, source, size) for source in range(size)]
    if size == 1 and (single := _only_block(q, task, parts[0])):
        # Nothing to add up: the kernel's gradients are returned without fp32 sums.
        return _gradients(grad_out, q, k, v, out, lse, slice(None), single, task)

    sums = _Sums(q, k)
    rows_of = _Rows(grad_out, q, out, lse)
    kv, free = torch.stack((k, v)) if size > 1 else None, None
    grads_arriving, free_grads = None, None
    for step in range(size):
        source = (rank - step) % size
        arriving = _pass_on(kv, task.ring, _KV_TAG, free) if step + 1 < size else None
        block_grads = [
            (rows, block, rows_of.gradients(k, v, rows, block, task))
            for rows, block in task.blocks(parts[rank], parts[source])
        ]
        # The sums of this step's keys were sent by the previous rank in its last step; waiting only after the compute
        # hides that transfer.
        if grads_arriving:
            sums.kv, free_grads = grads_arriving.wait()
        for rows, block, grads in block_grads:
            sums.add(rows, block, grads)
        # Gradient sums make `size` hops, keys `size - 1`: the last hop returns each rank's sums to it.
        grads_arriving = _pass_on(sums.kv, task.ring, _GRAD_TAG, free_grads) if size > 1 else None
        if arriving:
            kv, free = arriving.wait()
            k, v = kv.unbind()
    if grads_arriving:
        sums.kv, _ = grads_arriving.wait()
    grad_k, grad_v = sums.kv.to(k.dtype).unbind()
    return sums.q.to(q.dtype), grad_k, grad_v


def _gathered_forward(q: Tensor, k: Tensor, v: Tensor, task: _Task) -> tuple[Tensor, Tensor]:
    """Attend to the all-gathered keys in one step; return out [S, B, H, D] and lse [B, H, S]."""
    rank, size = task.place
    length = q.size(0) * size
    partials = _Partials(q, task.rows)
    k, v = _gather(torch.stack((k, v)), task.ring).unbind()  # [S * W, B, Hk, D]
    for rows, block in task.blocks(zigzag_intervals(length, rank, size), ((0, length),)):
        partials.add(rows, block, *_attend(q, k, v, rows, block, task))
    return partials.merged()


def _gathered_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, task: _Task
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv: keys are gathered again, and their gradients reduce-scattered to the ranks they belong to.

    The gathered keys of the forward pass are not saved: they are W times the size of a rank's own.
    """
    rank, size = task.place
    length = q.size(0) * size
    k, v = _gather(torch.stack((k, v)), task.ring).unbind()
    sums = _Sums(q, k)
    rows_of = _Rows(grad_out, q, out, lse)
    for rows, block in task.blocks(zigzag_intervals(length, rank, size), ((0, length),)):
        sums.add(rows, block, rows_of.gradients(k, v, rows, block, task))
    own_sums = sums.kv
    if task.ring is not None:
        # reduce_scatter splits dim 0: the parts of the ranks in rank order, [2 * W, S, B, Hk, D].
        parts = torch.cat(zigzag_split(sums.kv, size, 1))
        own_sums = torch.empty_like(parts[:2])  # [2, S, B, Hk, D]
        dist.reduce_scatter_tensor(own_sums, parts, group=task.ring)
    grad_k, grad_v = own_sums.to(k.dtype).unbind()
    return sums.q.to(q.dtype), grad_k, grad_v


def _attend(q, k, v, rows: slice, block: Block, task: _Task) -> tuple[Tensor, Tensor]:
    """Return one block's partial output [B, H, Sq, D] and log-sum-exp [B, H, Sq]."""
    q = _heads_first(q[block.q_start : block.q_stop, rows])
    k, v = (_heads_first(t[block.k_start : block.k_stop, rows]) for t in (k, v))
    return block_forward(q, k, v, causal=block.causal, scale=task.scale)


def _gradients(grad_out, q, k, v, out, lse, rows: slice, block: Block, task: _Task) -> tuple[Tensor, Tensor, Tensor]:
    """Return one block's share of dq, dk and dv, [tokens, rows, heads, D] each."""
    grad_out, q, out = (_heads_first(t[block.q_start : block.q_stop, rows]) for t in (grad_out, q, out))
    k, v = (_heads_first(t[block.k_start : block.k_stop, rows]).to(q.dtype) for t in (k, v))
    lse = lse[rows, :, block.q_start : block.q_stop]
    grads = block_backward(grad_out, q, k, v, out, lse, causal=block.causal, scale=task.scale)
    return tuple(grad.permute(2, 0, 1, 3) for grad in grads)  # type: ignore[return-value]


def _heads_first(x: Tensor) -> Tensor:
    """Return the view [B, H, S, D] of x [S, B, H, D], as the kernels take it."""
    return x.permute(1, 2, 0, 3)


class _Rows:
    """Inputs of the backward pass that belong to the queries and are the same for every block of keys."""

    def __init__(self, grad_out: Tensor, q: Tensor, out: Tensor, lse: Tensor):
        """Convert half types to fp32 where the kernel needs it."""
        # For half types, aten's CPU kernel sums dk and dv over the query heads of a key head in that type, and the
        # rounding errors of several blocks would add up: compute in fp32.
        wide = q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16)
        self.grad_out, self.q, self.out = (t.float() if wide else t for t in (grad_out, q, out))
        self.lse = lse

    def gradients(self, k: Tensor, v: Tensor, rows: slice, block: Block, task: _Task) -> tuple[Tensor, Tensor, Tensor]:
        """Return one block's share of dq, dk and dv."""
        return _gradients(self.grad_out, self.q, k, v, self.out, self.lse, rows, block, task)


class _Sums:
    """Running gradient sums in fp32 (fp64 for fp64); those of keys and values share one tensor, one message per hop."""

    def __init__(self, q: Tensor, k: Tensor):
        """Start from zeros in the shapes of q and of k and v."""
        dtype = torch.promote_types(q.dtype, torch.float32)
        self.q = torch.zeros(q.shape, dtype=dtype, device=q.device)
        self.kv = torch.zeros((2, *k.shape), dtype=dtype, device=q.device)

    def add(self, rows: slice, block: Block, grads: tuple[Tensor, Tensor, Tensor]) -> None:
        """Add one block's dq, dk and dv where its queries and keys are stored."""
        keys = slice(block.k_start, block.k_stop)
        accumulate_([self.q[block.q_start : block.q_stop, rows], *self.kv[:, keys, rows].unbind()], grads)


class _Partials:
    """Partial outputs of blocks, merged every `MERGE_GROUP` ring steps into a running sum in fp32."""

    def __init__(self, q: Tensor, rows: list[slice]):
        """Start without partials; `rows` are the groups of batch rows that share their blocks."""
        self._q = q
        self._rows = rows
        self._dtype = torch.promote_types(q.dtype, torch.float32)
        self._waiting: list[tuple[slice, int, int, Tensor, Tensor]] = []
        self._steps = 0
        self._sum: tuple[Tensor, Tensor] | None = None

    def add(self, rows: slice, block: Block, out: Tensor, lse: Tensor) -> None:
        """Queue one block's out [B, H, Sq, D] and lse [B, H, Sq] for the next merge."""
        self._waiting.append((rows, block.q_start, block.q_stop, out, lse))

    def end_of_step(self) -> None:
        """Merge the queued partials if enough ring steps have passed since the last merge."""
        self._steps += 1
        if self._steps >= MERGE_GROUP:
            self._merge(self._dtype)

    def merged(self) -> tuple[Tensor, Tensor]:
        """Return out [S, B, H, D] in q's type and lse [B, H, S]; queries without any block hold 0 and -inf."""
        # One block that covers every query needs no merge and no copy.
        if self._sum is None and len(self._waiting) == 1:
            rows, start, stop, out, lse = self._waiting[0]
            if rows == slice(None) and stop - start == self._q.size(0):
                return out.permute(2, 0, 1, 3), lse  # [S, B, H, D]
        self._merge(self._q.dtype)
        assert self._sum is not None
        return self._sum

    def _merge(self, dtype: torch.dtype) -> None:
        """Merge the queued partials and the running sum into an output of type `dtype`, which replaces the sum."""
        length, batch, heads, _ = self._q.shape
        before = self._sum
        # In place where the type stays: `merge_partials` allows an output that is one of its inputs.
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
    """Split [0, length) wherever a partial starts or stops.

    Partials cover different ranges of queries: with causal zig-zag the early chunk sees fewer ranks than the late one.

    Yields:
        Start and stop of a run of queries, and the slices of out and lse of every partial that covers it.
    """
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
    """A pair of transfers in flight: a message from the previous rank, and this rank's message to the next one."""

    buffer: Tensor
    """Receives the message; undefined until `wait` returns."""
    works: list[dist.Work]
    sent: Tensor
    """Message being sent, which must stay alive until it has left."""

    def wait(self) -> tuple[Tensor, Tensor]:
        """Wait for both transfers; return the received message and the sent one, whose memory is free again."""
        for work in self.works:
            work.wait()
        return self.buffer, self.sent


def _pass_on(message: Tensor | None, ring: dist.ProcessGroup | None, tag: int, free: Tensor | None = None) -> _Arriving:
    """Start sending a message to the next rank of the ring and receiving the previous rank's, into `free` memory."""
    assert message is not None and ring is not None, "a ring of one rank sends nothing"
    rank, size = ring.rank(), ring.size()
    buffer = torch.empty_like(message) if free is None else free
    to, source = (dist.get_global_rank(ring, (rank + way) % size) for way in (1, -1))
    # Batched: NCCL would deadlock if every rank issued its send before its receive.
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, message, to, group=ring, tag=tag),
            dist.P2POp(dist.irecv, buffer, source, group=ring, tag=tag),
        ]
    )
    return _Arriving(buffer, works, message)


def _gather(kv: Tensor, ring: dist.ProcessGroup | None) -> Tensor:
    """Return keys and values of the whole sequence, [2, S * W, B, Hk, D], from each rank's [2, S, B, Hk, D]."""
    if ring is None:
        return kv
    parts = torch.empty((ring.size() * 2, *kv.shape[1:]), dtype=kv.dtype, device=kv.device)
    dist.all_gather_into_tensor(parts, kv, group=ring)
    return zigzag_join(list(parts.chunk(ring.size())), 1)


def _to_heads(x: Tensor, inner: dist.ProcessGroup) -> Tensor:
    """Exchange tokens of all heads for all ranks' tokens of some heads: [S, B, H, D] -> [S * A, B, H / A, D]."""
    size = inner.size()
    sent = x.unflatten(2, (size, -1)).permute(2, 0, 1, 3, 4).contiguous()  # [A, S, B, H / A, D]: one slice per rank
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=inner)
    # The joined parts of neighbours are themselves the zig-zag part of one rank of the outer ring.
    return zigzag_join(list(received.unbind()), 0)


def _from_heads(x: Tensor, inner: dist.ProcessGroup) -> Tensor:
    """Invert `_to_heads`: [S * A, B, H / A, D] -> [S, B, H, D]."""
    sent = torch.stack(zigzag_split(x, inner.size(), 0))  # [A, S, B, H / A, D]
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=inner)
    return received.permute(1, 2, 0, 3, 4).flatten(2, 3)  # [S, B, H, D]


def _only_block(q: Tensor, task: _Task, part: tuple[Interval, ...]) -> Block | None:
    """Return the block that covers every query, or None if there are several blocks or some query has none."""
    blocks = list(task.blocks(part, part))
    if len(blocks) == 1 and blocks[0][0] == slice(None) and blocks[0][1].q_stop - blocks[0][1].q_start == q.size(0):
        return blocks[0][1]
    return None


@contextmanager
def _deterministic(enable: bool):
    """Turn on torch's deterministic algorithms for a block of code, with a warning where an op has none."""
    before = torch.are_deterministic_algorithms_enabled()
    if enable and not before:
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        if enable and not before:
            torch.use_deterministic_algorithms(False)
