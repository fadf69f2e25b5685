"""Compute causal attention within the documents of packed rows in one call of flash attention (CUDA, half types)."""

import inspect
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, rows: Sequence[Sequence[int]], scale: float) -> Tensor:
    """Attend causally within each document.

    Args:
        q: [S, B, H, D] bf16 or fp16, on CUDA.
        k, v: [S, B, Hk, D]; Hk divides H.
        rows: for each row the first token of each document and the end of the last one. Tokens after that are padding:
            they form a document of their own, whose output is meaningless and must be masked in the loss.
        scale: factor of the scores.

    Returns:
        [S, B, H, D]
    """
    from torch.nn.attention.varlen import varlen_attn

    length, batch = q.shape[:2]
    offsets, longest = flat_offsets(rows, length)
    # Pinned memory: a copy from pageable memory would wait for the device in every layer.
    borders = torch.tensor(offsets, dtype=torch.int32).pin_memory().to(q.device, non_blocking=True)
    q_flat, k_flat, v_flat = (t.transpose(0, 1).reshape(batch * length, t.size(2), t.size(3)) for t in (q, k, v))
    # [B * S, H, D] each. Before torch 2.12 `varlen_attn` takes fewer key-value heads without an argument for it.
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
    assert isinstance(out, Tensor), "the log-sum-exp is not requested"
    return out.view(batch, length, q.size(2), q.size(3)).transpose(0, 1)  # [S, B, H, D]


def flat_offsets(rows: Sequence[Sequence[int]], length: int) -> tuple[list[int], int]:
    """Return the document borders of all rows of `length` tokens concatenated, and the longest document in tokens."""
    borders = {0, length * len(rows)}
    for index, row in enumerate(rows):
        borders.update(index * length + offset for offset in (0, *row, length))
    offsets = sorted(borders)
    return offsets, max(after - before for before, after in itertools.pairwise(offsets))
