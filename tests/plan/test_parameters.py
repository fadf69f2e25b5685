"""What a rank holds, held to the byte to engines built for ranks of 256 and 4096 without memory for their weights."""

from contextlib import ExitStack
from unittest import mock

import pytest
import ranks

from igla_mega.config.load import load_recipe
from igla_mega.layout.layout import lay_out
from igla_mega.plan.parameters import held

RECIPE = "pretrain_7b"
DDP, TIED = "distributed.strategy=DDP", "model.tie_embeddings=true"
MOE = ["moe.num_experts=8", "moe.num_experts_per_tok=2", "model.num_layers=4"]
LORA = [DDP, "base_model=none", "lora.rank=8", "lora.alpha=8"]


def sizes(**distributed) -> list[str]:
    return [f"distributed.{key}={value}" for key, value in distributed.items()]


CASES = [
    (256, 0, [DDP, *sizes(tensor_parallel=4, pipeline_parallel=4)]),
    (256, 255, [DDP, *sizes(tensor_parallel=4, pipeline_parallel=4)]),
    (256, 130, [DDP, *sizes(tensor_parallel=8, pipeline_parallel=2, virtual_pipeline=2)]),
    (256, 100, [DDP, *sizes(distributed_optimizer=False)]),
    (256, 255, [DDP, TIED, *sizes(pipeline_parallel=2, precision="FP32")]),
    (256, 17, ["model.num_layers=8"]),
    (256, 255, ["model.num_layers=8", *sizes(tensor_parallel=2)]),
    (256, 255, [DDP, *MOE, *sizes(expert_parallel=8)]),
    (256, 17, [DDP, *MOE, "moe.shared_intermediate_size=1024", *sizes(tensor_parallel=2, pipeline_parallel=2)]),
    (256, 100, [*LORA, "lora.target_modules=[q_proj,o_proj,gate_proj]", *sizes(tensor_parallel=4)]),
    (4096, 4095, [DDP, *sizes(tensor_parallel=2, pipeline_parallel=4, virtual_pipeline=2), "training.batch_size=4096"]),
    # `fully_shard` makes 4096 views of each parameter: two layers say as much as 32.
    (4096, 4095, ["training.batch_size=4096", "model.num_layers=2"]),
]


def built(world_size: int, rank: int, overrides: list[str]) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Bytes of weights, gradients and optimizer state: of the engine of one rank, and by the plan."""
    import torch
    import torch.distributed as dist
    from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
    from torch.distributed.device_mesh import DeviceMesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from igla_mega.distributed.mesh import build_mesh
    from igla_mega.engine.build import build_engine
    from igla_mega.engine.optimizer import moments_of
    from igla_mega.model import lora

    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    recipe = load_recipe(RECIPE, overrides=overrides)
    layout = lay_out(recipe, world_size, "cuda")
    new_group, type_of, from_group = dist.new_group, torch.Tensor.type, DeviceMesh.from_group

    def real_mesh(*args, **kwargs):
        with unset_fake_temporarily():
            return from_group(*args, **kwargs)

    def gather(found, mine, group=None):
        found[:] = [mine] * len(found)

    def cuda_type(self, *args, **kwargs):
        name = type_of(self, *args, **kwargs)
        return name if args or kwargs else name.replace("torch.meta", "torch.cuda")

    with ExitStack() as stack:
        for place, name, instead in (
            (dist, "new_group", lambda *args, **kwargs: new_group(*args, **{**kwargs, "backend": "fake"})),
            (dist, "all_gather_object", gather),
            (torch.Tensor, "type", cuda_type),
            (DeviceMesh, "from_group", real_mesh),
            (lora, "initialize", lambda *args: None),  # draws from generators that fake tensors do not have
        ):
            stack.enter_context(mock.patch.object(place, name, instead))
        mesh = build_mesh(layout, 1)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        engine, _ = build_engine(recipe, layout, mesh, torch.device("cpu"), initialize=False)
        if layout.strategy == "FSDP":
            params = [param for _, param in engine.optimizer.params]  # type: ignore[attr-defined]
            weights = gradients = sum(4 * param.to_local().numel() for param in params)
            state = [moment for param in params for moment in moments_of(engine.optimizer.adam, param).values()]  # type: ignore[attr-defined]
            moments = sum(4 * moment.to_local().numel() for moment in state)
        else:
            storages = {
                p.untyped_storage()._cdata: p.untyped_storage().nbytes() for c in engine.chunks for p in c.parameters()
            }
            weights = sum(storages.values())
            buffers = [b for c in engine.chunks for b in (*c.buffers, *c.expert_parallel_buffers)]  # type: ignore
            gradients = sum(buffer.grad_data.nbytes for buffer in buffers)
            masters = ("master",) if recipe.distributed.precision == "FP32" else ()  # then the weights themselves
            moments = sum(
                4 * values.numel()
                for state in engine.states()
                for name, values in state.values.items()
                if name not in masters
            )
        planned = held(recipe, layout, mesh.pipeline.rank, device="cpu", data_rank=mesh.data_context.rank)
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return (weights, gradients, moments), (planned.weights, planned.gradients, planned.optimizer)


@pytest.mark.parametrize(("world_size", "rank", "overrides"), CASES)
def test_weights_gradients_and_optimizer_state_are_those_of_the_built_engine_to_the_byte(world_size, rank, overrides):
    engine, planned = ranks.run(1, built, world_size, rank, overrides)[0]
    assert planned == engine


def test_all_ranks_together_hold_every_parameter_once():
    recipe = load_recipe(RECIPE)
    layout = lay_out(recipe, 256, "cuda")
    assert recipe.model is not None
    shares = [held(recipe, layout, 0, data_rank=rank).updated for rank in range(256)]
    assert sum(shares) == recipe.model.num_parameters()


def test_all_ranks_of_a_distributed_optimizer_update_every_parameter_once():
    recipe = load_recipe(RECIPE, overrides=[DDP, *sizes(tensor_parallel=2, pipeline_parallel=2)])
    layout = lay_out(recipe, 64, "cuda")
    assert recipe.model is not None
    shares = [
        held(recipe, layout, stage, data_rank=rank, device="cuda").updated for stage in range(2) for rank in range(16)
    ]
    norms = 4096 * (2 * 32 + 1)  # each tensor-parallel rank has all of these
    assert sum(shares) == (recipe.model.num_parameters() - norms) // 2 + norms


def test_four_bits_a_weight_take_an_eighth_and_their_scales():
    plain = load_recipe(RECIPE, overrides=LORA)
    coded = load_recipe(RECIPE, overrides=[*LORA, "quantization.bits=4"])
    layout = lay_out(plain, 1, "cuda")
    weights = [held(recipe, layout, 0).weights for recipe in (plain, coded)]
    projections = 32 * (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 11008)
    # Half a byte a weight, a byte of scale for 64 of them, four bytes for 256 of those, and a table for each of seven.
    assert weights[0] - weights[1] == 2 * projections - projections // 2 - projections // 64 - projections // 4096 - (
        7 * 32 * 1028
    )


def test_only_adapters_have_gradients_and_optimizer_state():
    recipe = load_recipe(RECIPE, overrides=[*LORA, "lora.rank=64"])
    found = held(recipe, lay_out(recipe, 1, "cuda"), 0)
    adapters = 32 * 64 * (4096 + 4096 + 4096 + 1024)  # of q_proj and v_proj
    assert (found.trained, found.gradients, found.optimizer) == (adapters, 4 * adapters, 12 * adapters)


def test_experts_are_split_over_expert_parallel_ranks():
    recipe = load_recipe("moe_8x7b")
    assert recipe.model is not None
    layout = lay_out(recipe, 8, "cuda")
    assert layout.expert == 8
    experts = 32 * 8 * 3 * 4096 * 14336
    assert held(recipe, layout, 0).elements == recipe.model.num_parameters(recipe.moe) - experts * 7 // 8
