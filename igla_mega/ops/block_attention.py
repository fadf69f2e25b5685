"""Attention of one block of queries to one block of keys, by torch's own fused kernels, with its log-sum-exp.

Tensors are [B, H, S, D] in any strides with D innermost; keys and values may have fewer heads, each of which serves
H / Hk query heads. Every query sees a key: `ops/visibility.py` makes blocks like that, so that no kernel's convention
for an empty row matters here. `lse` is fp32 (fp64 for fp64), natural log.

The backward pass takes the output and log-sum-exp of the *whole* row, over all blocks: each block's gradient is then
exact by itself, and they add up.
"""

import torch
from torch import Tensor

# Rows of scores that exist at once where no fused kernel takes the type.
_DENSE_ROWS = 1024


def block_forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Attend within one block.

    Args:
        q: [B, H, Sq, D]
        k, v: [B, Hk, Sk, D]
        causal: query i sees keys 0 to i; Sq equals Sk.

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
    """This block's share of the gradients of q, k and v.

    Args:
        out, lse: of the whole rows, over every block that these queries see.
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
            # The kernel reads it as [B, H, S] in a row.
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
    groups = q.size(1) // k.size(1)
    k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
    outs, lses = [], []
    for _, scores in _scores(q, k, causal, scale):
        lses.append(scores.logsumexp(-1))
        outs.append(torch.softmax(scores, -1) @ v)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def _dense_backward(grad_out, q, k, v, out, lse, causal, scale):
    groups, num_kv_heads = q.size(1) // k.size(1), k.size(1)
    wide_k, wide_v = (t.repeat_interleave(groups, 1) for t in (k, v))
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(wide_k), torch.zeros_like(wide_v)
    delta = (grad_out * out).sum(-1, keepdim=True)
    for rows, scores in _scores(q, wide_k, causal, scale):
        probabilities = torch.exp(scores - lse[:, :, rows, None])
        grad_v += probabilities.transpose(2, 3) @ grad_out[:, :, rows]
        grad_scores = probabilities * (grad_out[:, :, rows] @ wide_v.transpose(2, 3) - delta[:, :, rows]) * scale
        grad_q[:, :, rows] = grad_scores @ wide_k
        grad_k += grad_scores.transpose(2, 3) @ q[:, :, rows]
    return grad_q, *(grad.unflatten(1, (num_kv_heads, groups)).sum(2) for grad in (grad_k, grad_v))


def _scores(q, k, causal, scale):
    """Scores of a slice of queries at a time; -inf where a key is not seen."""
    for start in range(0, q.size(2), _DENSE_ROWS):
        rows = slice(start, min(start + _DENSE_ROWS, q.size(2)))
        scores = q[:, :, rows] @ k.transpose(2, 3) * scale
        if causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(start + 1)
            scores = scores.masked_fill(later, -torch.inf)
        yield rows, scores
