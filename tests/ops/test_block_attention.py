"""Tests of block attention in plain torch, used for fp32 and fp64 on CUDA, against the fused kernel on CPU."""

import pytest
import torch

from igla_mega.ops import block_attention

SCALE = 0.3


def tensors(num_queries: int, num_keys: int, kv_heads: int):
    generator = torch.Generator().manual_seed(num_queries)
    shapes = [
        (2, 4, num_queries, 16),
        (2, kv_heads, num_keys, 16),
        (2, kv_heads, num_keys, 16),
        (2, 4, num_queries, 16),
    ]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(("num_queries", "num_keys", "causal"), [(37, 37, True), (37, 21, False), (5, 1, False)])
def test_plain_torch_equals_the_fused_kernel(num_queries, num_keys, causal, kv_heads, monkeypatch):
    monkeypatch.setattr(block_attention, "_DENSE_ROWS", 8)  # several slices
    q, k, v, grad_out = tensors(num_queries, num_keys, kv_heads)
    out, lse = block_attention.block_forward(q, k, v, causal=causal, scale=SCALE)
    plain_out, plain_lse = block_attention._dense_forward(q, k, v, causal, SCALE)
    torch.testing.assert_close(plain_out, out)
    torch.testing.assert_close(plain_lse, lse)
    grads = block_attention.block_backward(grad_out, q, k, v, out, lse, causal=causal, scale=SCALE)
    plain = block_attention._dense_backward(grad_out, q, k, v, out, lse, causal, SCALE)
    for fused, dense in zip(grads, plain, strict=True):
        torch.testing.assert_close(dense, fused)


def test_gradients_of_two_blocks_add_up_to_those_of_both():
    q, k, v, grad_out = tensors(12, 20, 2)
    out, lse = block_attention.block_forward(q, k, v, causal=False, scale=SCALE)
    whole = block_attention.block_backward(grad_out, q, k, v, out, lse, causal=False, scale=SCALE)
    parts = [
        block_attention.block_backward(grad_out, q, k[:, :, keys], v[:, :, keys], out, lse, causal=False, scale=SCALE)
        for keys in (slice(0, 7), slice(7, 20))
    ]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole[0])
    for which in (1, 2):
        torch.testing.assert_close(torch.cat([part[which] for part in parts], 2), whole[which])
