"""Tests of the modules of a layer, each against a plain formula in float64."""

from types import SimpleNamespace

import pytest
import torch

from igla_mega.config.errors import ConfigError
from igla_mega.model.spec import CoreAttention, RMSNorm, fp8_settings, use_transformer_engine


def dense_attention(query, key, value):
    """Attend with a softmax over a full score matrix, in the type of the inputs; [S, B, H, D] in, [S, B, H * D] out."""
    groups = query.shape[2] // key.shape[2]
    key, value = (t.repeat_interleave(groups, dim=2) for t in (key, value))
    scores = torch.einsum("qbhd,kbhd->bhqk", query, key) / query.shape[3] ** 0.5
    num_queries, num_keys = scores.shape[2:]
    ahead = torch.arange(num_keys) > torch.arange(num_queries)[:, None] + num_keys - num_queries
    weights = scores.masked_fill(ahead, -torch.inf).softmax(-1)
    return torch.einsum("bhqk,kbhd->qbhd", weights, value).flatten(2)


def attend(query, key, value):
    core = CoreAttention(SimpleNamespace(kv_channels=query.shape[3]), 1, None, "self")
    return core(query, key, value, None)


def random_inputs(num_queries, num_keys, kv_heads):
    generator = torch.Generator().manual_seed(num_queries + 100 * num_keys + kv_heads)
    sizes = ((num_queries, 2, 4, 16), (num_keys, 2, kv_heads, 16), (num_keys, 2, kv_heads, 16))
    return [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]


SHAPES = [
    pytest.param(33, 33, 4, id="causal"),
    pytest.param(33, 33, 2, id="grouped queries"),
    pytest.param(33, 33, 1, id="one kv head"),
    pytest.param(1, 20, 2, id="one query behind a cache"),
    pytest.param(5, 20, 2, id="five queries behind a cache"),
    pytest.param(1, 1, 4, id="first token"),
]


@pytest.mark.parametrize(("num_queries", "num_keys", "kv_heads"), SHAPES)
def test_attention_is_dense_causal_attention(num_queries, num_keys, kv_heads):
    exact = random_inputs(num_queries, num_keys, kv_heads)
    single = [t.float().requires_grad_() for t in exact]
    reference = [t.clone().requires_grad_() for t in exact]
    out, expected = attend(*single), dense_attention(*reference)
    # Averages of unit normals: some tens of roundings of fp32.
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-6)
    upstream = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out.backward(upstream.float())
    expected.backward(upstream)
    for ours, theirs in zip(single, reference, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("num_queries", "num_keys", "kv_heads"), SHAPES)
def test_attention_error_in_bf16_is_at_most_twice_that_of_the_dense_formula(num_queries, num_keys, kv_heads):
    narrow = [t.bfloat16() for t in random_inputs(num_queries, num_keys, kv_heads)]
    exact = dense_attention(*(t.double() for t in narrow))
    error = (attend(*narrow).double() - exact).abs().max()
    assert error <= 2 * (dense_attention(*narrow).double() - exact).abs().max()


def norm(dtype, sequence_parallel=False):
    config = SimpleNamespace(params_dtype=dtype, sequence_parallel=sequence_parallel)
    built = RMSNorm(config, 48, eps=1e-3)
    torch.nn.init.uniform_(built.weight, 0.5, 1.5, generator=torch.Generator().manual_seed(1))
    return built


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-7)])
def test_rms_norm_divides_by_the_root_of_the_mean_square(dtype, tolerance):
    built = norm(dtype)
    x = torch.randn(5, 2, 48, generator=torch.Generator().manual_seed(2)).to(dtype)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-3).sqrt() * built.weight.double()
    out = built(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


def test_the_norms_weight_starts_at_one_and_is_marked_under_sequence_parallelism():
    config = SimpleNamespace(params_dtype=torch.bfloat16, sequence_parallel=True)
    weight = RMSNorm(config, 8).weight
    assert (weight == 1).all() and weight.dtype == torch.bfloat16 and weight.sequence_parallel
    assert not norm(torch.float32).weight.sequence_parallel


def test_transformer_engine_requested_by_name_and_absent_is_an_error():
    with pytest.raises(ConfigError, match="kernels: te needs Transformer Engine") as raised:
        use_transformer_engine("te", torch.device("cpu"))
    assert "kernels=local" in str(raised.value)
    assert not any(use_transformer_engine(word, torch.device("cpu")) for word in ("auto", "local", "require"))


def test_fp8_without_transformer_engine_is_an_error_with_a_remedy():
    with pytest.raises(ConfigError, match="FP8 needs Transformer Engine") as raised:
        fp8_settings("tensorwise", torch.device("cpu"), transformer_engine=False)
    assert "precision=BF16" in str(raised.value)


def test_an_fp8_recipe_that_the_gpu_lacks_names_those_it_has(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert fp8_settings("blockwise", torch.device("cuda"), True) == {"fp8": "hybrid", "fp8_recipe": "blockwise"}
    with pytest.raises(ConfigError, match=r"needs compute capability 10\.0, but NVIDIA H200 has 9\.0") as raised:
        fp8_settings("mxfp8", torch.device("cuda"), True)
    assert "Use tensorwise or delayed or blockwise" in str(raised.value)
