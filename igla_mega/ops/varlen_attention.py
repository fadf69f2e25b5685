"""Causal attention within the documents of packed rows, all in one call of flash attention (CUDA, half precision)."""

import inspect
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, rows: Sequence[Sequence[int]], scale: float) -> Tensor:
    """Attend within documents.

    Args:
        q: [S, B, H, D] bf16 or fp16, on CUDA.
        k, v: [S, B, Hk, D]; Hk divides H.
        rows: for each row where its documents begin, and where the last one ends, in tokens. What lies behind sees
            itself alone, and counts for nothing.

    Returns:
        [S, B, H, D]
    """
    from torch.nn.attention.varlen import varlen_attn

    length, batch = q.shape[:2]
    offsets, longest = flat_offsets(rows, length)
    # From pinned memory, so that nobody waits for the device.
    borders = torch.tensor(offsets, dtype=torch.int32).pin_memory().to(q.device, non_blocking=True)
    q_flat, k_flat, v_flat = (t.transpose(0, 1).reshape(batch * length, t.size(2), t.size(3)) for t in (q, k, v))
    # Before torch 2.12 fewer heads of keys need no word, and there is none.
    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    out = varlen_attn(
        q_flat,
        k_flat,
        v_flat,
        borders,
        borders,
        longest,
        longest,
        scale=scale,
        window_size=(-1, 0),
        **(grouped if q.size(2) != k.size(2) else {}),
    )
    assert isinstance(out, Tensor), "asked for without its log-sum-exp"
    return out.view(batch, length, q.size(2), q.size(3)).transpose(0, 1)


def flat_offsets(rows: Sequence[Sequence[int]], length: int) -> tuple[list[int], int]:
    """Borders of all documents when rows of `length` tokens stand one behind the other, and the longest document."""
    borders = {0, length * len(rows)}
    for index, row in enumerate(rows):
        borders.update(index * length + offset for offset in (0, *row, length))
    offsets = sorted(borders)
    return offsets, max(after - before for before, after in itertools.pairwise(offsets))
