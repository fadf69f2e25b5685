"""Compute attention of one block of queries to one block of keys with torch's fused kernels, and its log-sum-exp.

Tensors are [B, H, S, D] in any strides with D innermost; keys and values may have fewer heads (Hk), each of which
serves H / Hk query heads. Every query sees a key: `ops/visibility.py` builds only such blocks, so it does not matter
that kernels treat an empty row differently. `lse` is fp32 (fp64 for fp64), natural log.

The backward pass takes the output and log-sum-exp of the *whole* row, over all blocks: the probabilities
`exp(score - lse)` are then those of the full softmax, so the gradients of the blocks are exact and add up.
"""

import torch
from torch import Tensor

# Maximum number of query rows whose scores are in memory at once, for types without a fused kernel.
_DENSE_ROWS = 1024


def block_forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Attend within one block.

    Args:
        q: [B, H, Sq, D]
        k, v: [B, Hk, Sk, D]
        causal: True if query i sees keys 0 to i (Sq equals Sk), False if it sees all keys.
        scale: factor of the scores.

    Returns:
        out [B, H, Sq, D], and lse [B, H, Sq] = log(sum(exp(scale * q . k))).
    """
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    if q.dtype in (torch.bfloat16, torch.float16):
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
        return out, lse
    return _dense_forward(q, k, v, causal, scale)


def block_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return this block's share of the gradients of q, k and v.

    Args:
        out, lse: output and log-sum-exp of the whole rows, over every block that these queries see.
    """
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, q, k, v, out, lse, 0.0, causal, scale=scale
        )
    if q.dtype in (torch.bfloat16, torch.float16):
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
        return torch.ops.aten._scaled_dot_product_flash_attention_backward(
            grad_out,
            q,
            k,
            v,
            out,
            # The kernel assumes contiguous [B, H, S] without checking it.
            lse.contiguous(),
            None,
            None,
            q.size(2),
            k.size(2),
            0.0,
            causal,
            no_dropout,
            no_dropout[:0],
            scale=scale,
        )
    return _dense_backward(grad_out, q, k, v, out, lse, causal, scale)


def _dense_forward(q, k, v, causal, scale):
    """Attend with plain matrix products, a slice of queries at a time: fp32 and fp64 on CUDA."""
    groups = q.size(1) // k.size(1)
    k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
    outs, lses = [], []
    for _, scores in _scores(q, k, causal, scale):
        lses.append(scores.logsumexp(-1))
        outs.append(torch.softmax(scores, -1) @ v)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def _dense_backward(grad_out, q, k, v, out, lse, causal, scale):
    """Return dq, dk and dv by FlashAttention's backward equations (Dao et al. 2022, arXiv:2205.14135, appendix B.4)."""
    groups, num_kv_heads = q.size(1) // k.size(1), k.size(1)
    wide_k, wide_v = (t.repeat_interleave(groups, 1) for t in (k, v))
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(wide_k), torch.zeros_like(wide_v)
    # The softmax gradient's row sum of P * dP, from the output instead of the scores of all blocks.
    delta = (grad_out * out).sum(-1, keepdim=True)  # [B, H, Sq, 1]
    for rows, scores in _scores(q, wide_k, causal, scale):
        probabilities = torch.exp(scores - lse[:, :, rows, None])
        grad_v += probabilities.transpose(2, 3) @ grad_out[:, :, rows]
        grad_scores = probabilities * (grad_out[:, :, rows] @ wide_v.transpose(2, 3) - delta[:, :, rows]) * scale
        grad_q[:, :, rows] = grad_scores @ wide_k
        grad_k += grad_scores.transpose(2, 3) @ q[:, :, rows]
    # Sum over the query heads that share a key-value head: [B, Hk, Sk, D].
    return grad_q, *(grad.unflatten(1, (num_kv_heads, groups)).sum(2) for grad in (grad_k, grad_v))


def _scores(q, k, causal, scale):
    """Yield slices of queries with their scores [B, H, rows, Sk], -inf where a key is not visible."""
    for start in range(0, q.size(2), _DENSE_ROWS):
        rows = slice(start, min(start + _DENSE_ROWS, q.size(2)))
        scores = q[:, :, rows] @ k.transpose(2, 3) * scale
        if causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(start + 1)
            scores = scores.masked_fill(later, -torch.inf)
        yield rows, scores
