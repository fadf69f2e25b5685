"""Split sequences over context-parallel ranks by zig-zag, which balances causal attention.

A sequence is cut into 2W chunks; rank r of W holds chunks r and 2W - 1 - r, one early and one late. Under a causal mask
every rank then has the same number of query-key pairs (DualChunkSwap; Brandon et al. 2023, arXiv:2311.09431, give the
problem; Llama 3, arXiv:2407.21783, section 3.3.2, this split).
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

Interval = tuple[int, int]
"""Half-open range of token positions in the whole sequence."""


def zigzag_intervals(length: int, rank: int, size: int) -> tuple[Interval, ...]:
    """Return the token ranges of rank `rank` of `size`, in the order in which the rank stores them.

    Raises:
        ValueError: `length` is not a multiple of 2 * size.
    """
    if size == 1:
        return ((0, length),)
    chunk = _chunk_length(length, size)
    return tuple((index * chunk, (index + 1) * chunk) for index in (rank, 2 * size - 1 - rank))


def zigzag_positions(length: int, group: dist.ProcessGroup | None) -> Tensor:
    """Return the position in the whole sequence of each token of this rank, int64 [length / W]."""
    rank, size = _place(group)
    return torch.cat([torch.arange(*interval) for interval in zigzag_intervals(length, rank, size)])


def zigzag_shard(x: Tensor, group: dist.ProcessGroup | None, dim: int, *, pad: bool = False, fill: float = 0) -> Tensor:
    """Return this rank's tokens of a sequence that every rank holds as a whole.

    Args:
        x: any shape; `dim` is the sequence.
        pad: True to pad the end to a multiple of 2W instead of raising.
        fill: value of the padding.

    Raises:
        ValueError: the length is not a multiple of 2W and `pad` is False.
    """
    rank, size = _place(group)
    if size == 1:
        return x
    if pad:
        x = pad_sequence(x, size, dim, fill)
    intervals = zigzag_intervals(x.size(dim), rank, size)
    return torch.cat([x.narrow(dim, start, stop - start) for start, stop in intervals], dim)


def zigzag_unshard(x: Tensor, group: dist.ProcessGroup | None, dim: int) -> Tensor:
    """All-gather the whole sequence from the ranks' parts; the inverse of `zigzag_shard`. No gradient flows through."""
    _, size = _place(group)
    if size == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(size)]
    dist.all_gather(parts, x.contiguous(), group=group)
    return zigzag_join(parts, dim)


def zigzag_join(parts: list[Tensor], dim: int) -> Tensor:
    """Return the whole sequence from the parts of all ranks, given in rank order."""
    # Chunks 0 to W - 1 are the early halves of ranks 0 to W - 1, chunks W to 2W - 1 the late halves in reverse.
    halves = [part.chunk(2, dim) for part in parts]
    return torch.cat([early for early, _ in halves] + [late for _, late in reversed(halves)], dim)


def zigzag_split(x: Tensor, size: int, dim: int) -> list[Tensor]:
    """Return the parts of all ranks in rank order; the inverse of `zigzag_join`."""
    chunks = x.chunk(2 * size, dim)
    return [torch.cat([chunks[rank], chunks[2 * size - 1 - rank]], dim) for rank in range(size)]


def pad_sequence(x: Tensor, size: int, dim: int, fill: float = 0) -> Tensor:
    """Return `x` padded at its end to a multiple of 2 * size along `dim`."""
    missing = -x.size(dim) % (2 * size) if size > 1 else 0
    if not missing:
        return x
    # F.pad counts dimensions from the last one: skip those after `dim`.
    num_later_dims = x.dim() - 1 - dim % x.dim()
    return F.pad(x, (*(0, 0) * num_later_dims, 0, missing), value=fill)


def _chunk_length(length: int, size: int) -> int:
    """Return the tokens of one of the 2 * size chunks.

    Raises:
        ValueError: `length` is not a multiple of 2 * size; names the nearest multiples.
    """
    unit = 2 * size
    if length % unit:
        below = length // unit * unit
        nearest = " or ".join(str(near) for near in (below, below + unit) if near)
        raise ValueError(
            f"a sequence of {length} tokens does not split over {size} context-parallel ranks: zig-zag needs a "
            f"multiple of {unit}. Use {nearest}, or pad."
        )
    return length // unit


def _place(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Return rank and size of the group; (0, 1) without one."""
    return (0, 1) if group is None else (group.rank(), group.size())
