"""Tests of NF4 against bitsandbytes: codes, scales and values bit for bit, whole and of each shard."""

import pytest
import ranks
import tiny
import torch
import torch.distributed as dist
import tuned

from igla_mega.config.errors import ConfigError
from igla_mega.model import nf4
from igla_mega.model.nf4 import Nf4

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(96, 128), (512, 256), (1376, 512), (10, 64)]


def weight(shape, dtype=torch.float32):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])) * 0.02).to(dtype)


def reference(values, double=True):
    """Return bitsandbytes' codes and their dequantized values."""
    import bitsandbytes.functional as functional

    codes, state = functional.quantize_4bit(values, blocksize=64, quant_type="nf4", compress_statistics=double)
    return codes, state, functional.dequantize_4bit(codes, state)


@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_whole_projection_is_that_of_bitsandbytes(shape, dtype, double):
    values = weight(shape, dtype)
    codes, state, expected = reference(values, double)
    ours = Nf4(values, dim=0, double=double)
    assert torch.equal(ours.codes, codes.view(-1)) and torch.equal(ours.scales, state.absmax)
    assert torch.equal(ours.weight(dtype), expected)
    # A module of bitsandbytes converts its values to the type of the products.
    for compute_dtype in DTYPES:
        assert torch.equal(ours.weight(compute_dtype), expected.to(compute_dtype))


def shards_of_a_weight(shape, dtype):
    group, wrong = dist.group.WORLD, []
    values = weight(shape, dtype)
    whole_codes, _, expected = reference(values)
    whole_codes = torch.stack([whole_codes.view(-1) >> 4, whole_codes.view(-1) & 15], 1).view(shape)
    for dim in (0, 1):
        part = values.chunk(group.size(), dim)[group.rank()]
        ours = Nf4(part, dim=dim, group=group)
        codes = torch.stack([ours.codes >> 4, ours.codes & 15], 1).view(part.shape)
        if not torch.equal(codes, whole_codes.chunk(group.size(), dim)[group.rank()]):
            wrong.append(f"codes, dim {dim}")
        if not torch.equal(ours.weight(dtype), expected.chunk(group.size(), dim)[group.rank()]):
            wrong.append(f"values, dim {dim}")
    return wrong


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("shape", [(512, 256), (1376, 512)], ids=str)
def test_shards_are_those_of_the_whole(shape, num_ranks):
    for dtype in (torch.float32, torch.bfloat16):
        assert ranks.run(num_ranks, shards_of_a_weight, shape, dtype) == [[]] * num_ranks


def uneven():
    with pytest.raises(ConfigError, match="2 leaves 96 weights of a row on a rank, not a multiple of NF4's 64"):
        Nf4(torch.randn(8, 96), dim=1, group=dist.group.WORLD)


def test_a_block_on_two_ranks_is_refused():
    ranks.run(2, uneven)


def test_a_weight_takes_a_little_over_four_bits():
    assert Nf4(weight((4096, 1024)), dim=0).num_bytes() * 8 / (4096 * 1024) < 4.13
    assert Nf4(weight((4096, 1024)), dim=0, double=False).num_bytes() * 8 / (4096 * 1024) < 4.51


MODEL = {"hidden_size": 128, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 256}


def against_bitsandbytes(tmp_path):
    """Take ten steps of LoRA on a 4-bit base, and PEFT's on bitsandbytes' layers for comparison."""
    import bitsandbytes as bnb

    model = tuned.llama(
        tmp_path / "hf", hidden_size=128, num_attention_heads=4, num_key_value_heads=2, intermediate_size=256
    )
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, linear in list(block.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    four = bnb.nn.Linear4bit(
                        linear.in_features,
                        linear.out_features,
                        bias=False,
                        quant_type="nf4",
                        compute_dtype=torch.float32,
                    )
                    four.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
                    setattr(block, name, four.to("cpu"))
    model.requires_grad_(False)
    section, recipe = tuned.section(), tiny.recipe(model=MODEL, training={"learning_rate": 5e-4})
    wrapped = tuned.with_peft(model, section)
    start = tuned.peft_adapters(wrapped)
    built, shards, _ = tuned.engine(recipe, section, base=tmp_path / "hf-native", start=start, quantized=torch.float32)
    assert not any(name.endswith(("qkv.weight", "fc1.weight")) for name, _ in built.chunks[0].named_parameters())
    ours = tuned.steps(built, 10, recipe.training.learning_rate)
    theirs = tuned.peft_steps(wrapped, 10, recipe)
    trained, expected = tuned.gathered(built, shards), tuned.peft_adapters(wrapped)
    return (
        *(max(abs(a[i] - b[i]) for a, b in zip(ours, theirs, strict=True)) for i in (0, 1)),
        max((trained[n] - expected[n]).abs().max().item() for n in expected),
    )


def test_ten_steps_of_qlora_equal_those_of_peft_and_bitsandbytes(tmp_path):
    [(loss, norm, matrices)] = ranks.run(1, against_bitsandbytes, tmp_path, limit_seconds=200)
    print(f"QLoRA: loss {loss:.1e}, gradient norm {norm:.1e}, adapters {matrices:.1e}")
    assert loss < 1e-5 and norm < 1e-5 and matrices < 1e-5


def make_base(tmp_path):
    tuned.llama(tmp_path / "hf", hidden_size=128, num_attention_heads=4, num_key_value_heads=2, intermediate_size=256)


def trained(layout, base, compute_dtype):
    recipe = tiny.recipe(model=MODEL, training={"learning_rate": 2e-3}, **layout)
    built, _, _ = tuned.engine(recipe, tuned.section(dropout=0.2), base=base, quantized=compute_dtype)
    return tuned.steps(built, 5, recipe.training.learning_rate, dropout_seed=3)


LAYOUTS = [
    (2, {"tensor_parallel": 2, "sequence_parallel": False}),
    (2, {"tensor_parallel": 2, "sequence_parallel": True}),
    (2, {"pipeline_parallel": 2, "gradient_checkpointing": "full"}),
    (2, {}),
    (4, {"tensor_parallel": 2, "sequence_parallel": True, "pipeline_parallel": 2}),
]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    ranks.run(1, make_base, folder)
    return folder / "hf-native", ranks.run(1, trained, {}, folder / "hf-native", torch.float32)[0]


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_a_layout_equals_one_process(case, one_process):
    base, expected = one_process
    reports = ranks.run(case[0], trained, case[1], base, torch.float32)[0]
    loss, norm = (max(abs(a[i] - b[i]) for a, b in zip(reports, expected, strict=True)) for i in (0, 1))
    print(f"{case}: loss {loss:.1e}, gradient norm {norm:.1e}")
    assert loss < 1e-5 and norm < 1e-5


def test_no_weight_outlives_its_product():
    """The backward pass dequantizes again: nothing of the weight's size is kept between the passes."""
    codes = Nf4(weight((512, 256)), dim=0)
    stack = nf4.Stack(0, "mlp.linear_fc2", 1, {"down_proj": 512})
    kept: list[int] = []
    stacked = nf4.StackedNf4(stack, {"down_proj": codes}, torch.bfloat16)
    x = torch.randn(4, 256, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        out = nf4._Product.apply(x, stacked)
    out.sum().backward()
    assert kept == [] and x.grad is not None and out.dtype == torch.float32
