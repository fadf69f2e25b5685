"""Tests of the model: its size, its initial weights in every layout, its rotary frequencies."""

import resource

import pytest
import ranks
import tiny
import torch

from igla_mega.config.features import Moe
from igla_mega.config.load import load_recipe
from igla_mega.config.schema import Model
from igla_mega.distributed.mesh import build_mesh
from igla_mega.model import build
from igla_mega.model.shards import local_runs
from igla_mega.plan.choose import choose_layout

TP, PP, FSDP = {"tensor_parallel": 2}, {"pipeline_parallel": 2}, {"strategy": "FSDP"}


def built_on_meta(model: Model, moe: Moe | None = None):
    layout = choose_layout(tiny.recipe(), 1, "cpu")
    build_mesh(layout, 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    config = build.transformer_config(model, layout, build.Execution(torch.bfloat16, torch.device("cpu")), moe)
    [chunk] = build.build_chunks(config, model, moe=moe)
    grown_bytes = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    params = dict(chunk.named_parameters())
    assert all(param.is_meta and param.dtype == torch.bfloat16 for param in params.values())
    return sum(param.numel() for param in params.values()), grown_bytes, sorted(params)


def test_recipe_1_on_the_meta_device_has_the_parameters_of_the_formula_and_takes_no_memory():
    model = load_recipe("pretrain_7b").model
    [(num_parameters, grown_bytes, _)] = ranks.run(1, built_on_meta, model)
    assert num_parameters == model.num_parameters() == 5_933_109_248
    assert grown_bytes < 200e6


def test_recipe_7_on_the_meta_device_has_the_parameters_of_the_formula_and_takes_no_memory():
    recipe = load_recipe("moe_8x7b")
    assert recipe.model is not None
    [(num_parameters, grown_bytes, _)] = ranks.run(1, built_on_meta, recipe.model, recipe.moe)
    assert num_parameters == recipe.model.num_parameters(recipe.moe) == 46_702_792_704
    assert grown_bytes < 200e6
    shared = recipe.moe.model_copy(update={"shared_intermediate_size": 2048})
    small = recipe.model.model_copy(update={"num_layers": 2})
    assert ranks.run(1, built_on_meta, small, shared)[0][0] == small.num_parameters(shared)


@pytest.mark.parametrize(
    "changes", [{"tie_embeddings": True}, {"num_kv_heads": 4}, {"num_kv_heads": 1}, {"head_dim": 24}], ids=str
)
def test_variants_have_the_parameters_of_the_formula_and_no_biases(changes):
    model = tiny.recipe(model=changes).model
    [(num_parameters, _, names)] = ranks.run(1, built_on_meta, model)
    assert num_parameters == model.num_parameters()
    assert not [name for name in names if name.endswith("bias")]
    assert ("output_layer.weight" in names) is not model.tie_embeddings


def initial_pieces(recipe):
    engine, shards = tiny.engine(recipe)
    return [
        (shard.name, shard.shape, offset, piece.float().clone().numpy())
        for shard, values, start in local_runs(engine.chunks, shards)
        for offset, piece in shard.rectangles(values, start)
    ]


def initial_weights(num_ranks: int, recipe) -> dict[str, torch.Tensor]:
    """Assemble the whole weights from the ranks' parts; copies must agree and no part may be missing."""
    whole: dict[str, torch.Tensor] = {}
    for pieces in ranks.run(num_ranks, initial_pieces, recipe):
        for name, shape, offset, values in pieces:
            piece = torch.from_numpy(values)
            weight = whole.setdefault(name, torch.full(shape, torch.nan))
            place = weight[tuple(slice(at, at + size) for at, size in zip(offset, piece.shape, strict=True))]
            assert torch.equal(place.nan_to_num(), torch.where(place.isnan(), 0.0, piece)), f"{name}: copies differ"
            place.copy_(piece)
    assert not [name for name, weight in whole.items() if weight.isnan().any()]
    return whole


@pytest.fixture(scope="module")
def of_one_process():
    return initial_weights(1, tiny.recipe())


@pytest.mark.parametrize(
    ("num_ranks", "layout"),
    [(2, TP), (2, FSDP), (2, PP), (2, {**PP, "virtual_pipeline": 2}), (4, {**TP, **FSDP}), (2, {})],
    ids=str,
)
def test_initial_weights_are_the_same_in_every_layout(num_ranks, layout, of_one_process):
    weights = initial_weights(num_ranks, tiny.recipe(**layout))
    assert weights.keys() == of_one_process.keys()
    assert [name for name, weight in weights.items() if not torch.equal(weight, of_one_process[name])] == []


def test_tied_embeddings_start_equal_on_both_pipeline_ends():
    one = initial_weights(1, tiny.recipe(model={"tie_embeddings": True}))
    two = initial_weights(2, tiny.recipe(model={"tie_embeddings": True}, **PP))
    assert "output_layer.weight" not in one and one.keys() == two.keys()
    assert all(torch.equal(weight, two[name]) for name, weight in one.items())


def test_initial_weights_have_the_configured_spread(of_one_process):
    for name, weight in of_one_process.items():
        if weight.dim() == 1:
            assert (weight == 1).all(), name
            continue
        residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
        wanted = 0.05 / 8**0.5 if residual else 0.05  # init_std of the tiny recipe; 2 x 4 layers
        # Six standard errors of a standard deviation estimated from so many draws.
        assert abs(weight.std() / wanted - 1) < 6 / (2 * weight.numel()) ** 0.5, name
    first, second = (of_one_process[f"decoder.layers.{i}.mlp.linear_fc1.weight"] for i in (0, 1))
    assert not torch.equal(first, second)


def test_another_seed_gives_other_weights(of_one_process):
    other = initial_weights(1, tiny.recipe(training={"seed": 99}))
    assert not any(torch.equal(w, other[n]) for n, w in of_one_process.items() if w.dim() > 1)


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position": 8192},
        {"factor": 32.0, "low_freq_factor": 2.0, "high_freq_factor": 6.0, "original_max_position": 512},
    ],
    ids=["default", "llama 3.1", "other bands"],
)
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_rotary_frequencies_are_those_of_transformers(scaling, theta):
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    sizes = {"hidden_size": 256, "num_heads": 2, "num_kv_heads": 2, "intermediate_size": 8, "vocab_size": 8}
    model = Model.model_validate(
        {**sizes, "num_layers": 1, "max_position": 16384, "rope_theta": theta, "rope_scaling": scaling}
    )
    rope = {"rope_type": "default", "rope_theta": theta}
    if scaling:
        names = {"original_max_position": "original_max_position_embeddings"}
        rope |= {"rope_type": "llama3", **{names.get(key, key): value for key, value in scaling.items()}}
    config = transformers.LlamaConfig(
        hidden_size=256, num_attention_heads=2, max_position_embeddings=16384, rope_parameters=rope
    )
    # fp32 roundings; the share of a blended band is a difference of near numbers, which makes them larger.
    theirs = LlamaRotaryEmbedding(config).inv_freq
    torch.testing.assert_close(build.inverse_frequencies(model), theirs, rtol=3e-6, atol=0.0)
    exact = build.inverse_frequencies(model, torch.float64)
    torch.testing.assert_close(exact, theirs.double(), rtol=3e-6, atol=0.0)


def test_rotary_angles_are_exact_131072_positions_out():
    frequencies = 1e7 ** -(torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    positions = torch.tensor([[0, 1, 65537, 131071], [5, 6, 7, 8]])
    angles = build.rotary_angles(positions, frequencies.float(), frequencies)
    assert angles.shape == (4, 2, 1, 128) and angles.dtype == torch.float32
    truth = torch.cos(positions.t()[:, :, None, None] * torch.cat((frequencies, frequencies)))
    assert (torch.cos(angles) - truth).abs().max() < 3e-5
    # What fp32 would have given.
    rounded = torch.cos(positions.t()[:, :, None, None].float() * torch.cat((frequencies, frequencies)).float())
    assert (rounded - truth).abs().max() > 1e-3


def test_rotary_angles_are_off_by_less_than_3e_5_radians_everywhere():
    frequencies = 1e7 ** -(torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    positions = torch.arange(0, 131072, 7).unsqueeze(0)
    truth = torch.cos(positions.t() * frequencies)
    error = (torch.cos(build.rotary_angles(positions, frequencies.float(), frequencies)[:, 0, 0, :64]) - truth).abs()
    assert error.max() < 3e-5
    assert error[positions.t() * frequencies > build.NEAR_RADIANS].max() < 5e-7
