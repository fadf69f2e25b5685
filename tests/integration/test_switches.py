"""Every switch of the fast path changes how fast a step is, and nothing else; and a step asks the device for little."""

from functools import partial
from types import SimpleNamespace

import pytest
import ranks
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from igla_mega.engine import build, ddp
from igla_mega.engine.step import scheduled, train_step

STEADY = {"training": {"learning_rate": 1e-3}}
TOLERANCE = 1e-5
"""Absolute, on losses of 5.6 nats and norms of 1 to 3, over six steps: sums in another order, in fp32."""


def with_optimizer(recipe, **changed):
    return recipe.model_copy(update={"optimizer": recipe.optimizer.model_copy(update=changed)})


def assert_equal(reports, reference):
    assert len(reports) == len(reference) == 6
    assert len({loss for loss, _ in reference}) == 6, "it trains"
    for (loss, norm), (other_loss, other_norm) in zip(reports, reference, strict=True):
        assert abs(loss - other_loss) < TOLERANCE and abs(norm - other_norm) < TOLERANCE


@pytest.fixture(scope="module")
def all_on():
    return ranks.run(1, tiny.trained, tiny.recipe(**STEADY))[0]


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("off", [{"fused_layers": False}, {"loss_chunk": 7}, {"kernels": "local"}], ids=str)
def test_a_switch_changes_no_loss_and_no_norm(off, num_ranks, all_on):
    assert_equal(ranks.run(num_ranks, tiny.trained, tiny.recipe(**STEADY, **off))[0], all_on)


def test_neither_does_the_fused_optimizer(all_on):
    for recipe in (tiny.recipe(**STEADY), tiny.recipe(**STEADY, strategy="FSDP")):
        reports = ranks.run(2, tiny.trained, with_optimizer(recipe, fused=False))[0]
        assert_equal(reports, all_on)


def test_fused_experts_train_as_eager_ones():
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 32}
    on, off = (ranks.run(1, tiny.trained, tiny.recipe(**STEADY, moe=moe, fused_layers=way))[0] for way in (True, False))
    assert_equal(on, off)


def overlapped(recipe, num_steps: int = 6):
    """As on a GPU: gradients reduced within the backward pass, weights gathered within the forward pass, by buckets."""
    wrap, buckets, started = ddp.wrap, [], []

    def wrap_overlapped(chunks, config, **how):
        wrapped = wrap(chunks, config, **how)
        for chunk in wrapped:
            buckets.extend(chunk.bucket_groups)
            for group in chunk.bucket_groups:
                reduce = group.start_grad_sync
                group.start_grad_sync = lambda reduce=reduce, **how: (started.append(1), reduce(**how))
        return wrapped

    ddp.wrap = wrap_overlapped
    build._overlaps = lambda *_: True
    ddp.DistributedDataParallelConfig = partial(ddp.DistributedDataParallelConfig, bucket_size=20_000)
    built = tiny.engine(recipe)[0]
    assert built.chunks[0].ddp_config.overlap_param_gather == built.chunks[0].ddp_config.use_distributed_optimizer
    reports = tiny.steps(built, 0, num_steps, recipe.training.learning_rate)
    return reports, len(buckets), len(started)


PP = {"pipeline_parallel": 2}


@pytest.mark.parametrize(
    ("num_ranks", "layout"),
    [
        (2, {"distributed_optimizer": False}),
        (2, {"distributed_optimizer": True}),
        (2, {"distributed_optimizer": True, "micro_batch_size": 4}),
        (4, {"distributed_optimizer": True, "tensor_parallel": 2, "sequence_parallel": True}),
        (4, {"distributed_optimizer": True, **PP, "virtual_pipeline": 2}),
    ],
    ids=str,
)
def test_overlapped_communication_changes_no_loss_and_no_norm(num_ranks, layout, all_on):
    results = ranks.run(num_ranks, overlapped, tiny.recipe(**STEADY, **layout))
    reports, num_buckets, num_started = results[0]
    assert_equal(reports, all_on)
    assert num_buckets > 1, "one bucket would overlap nothing"
    assert num_started == 6 * num_buckets, "every bucket once a step"


def test_a_rank_that_owns_no_parameters_has_nothing_to_clip():
    optimizer = object.__new__(ddp.MegatronAdamW)
    optimizer.max_norm = 1.0
    optimizer.megatron = SimpleNamespace(get_grad_norm=lambda: 3.0, is_stub_optimizer=True)
    assert optimizer._clip() == 3.0


class _HostReads(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def host_reads(recipe) -> int:
    """In a step, beyond one for each micro-batch: on a CPU, where it is free, the loss looks at its upstream."""
    built = tiny.engine(recipe)[0]
    tiny.steps(built, 0, 2)
    counted = _HostReads()
    with counted:
        train_step(built, tiny.batches(2, built.layout, 0), step=2, seed=1, learning_rate=1e-3)
    return counted.count - built.layout.num_microbatches


def test_a_step_reads_from_the_device_as_often_whatever_its_size():
    sizes = [{}, {"micro_batch_size": 8}, {"model": {"num_layers": 8}}, {"precision": "BF16"}]
    counts = [ranks.run(1, host_reads, tiny.recipe(**STEADY, **size))[0] for size in sizes]
    # The loss, whether it is finite, and the gradient's norm; what is read as a list is not counted here.
    assert len(set(counts)) == 1 and counts[0] <= 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_neither_pass_nor_the_update_waits_for_the_device():
    assert ranks.run(1, _waits_for_nothing) == [True]


def _waits_for_nothing() -> bool:
    from igla_mega.distributed import host
    from igla_mega.distributed.mesh import build_mesh
    from igla_mega.engine.build import build_engine
    from igla_mega.plan.choose import choose_layout
    from igla_mega.train.loop import on_device

    device = host.prepare()
    recipe = tiny.recipe(precision="BF16", model={"hidden_size": 256, "num_heads": 4}, micro_batch_size=2)
    layout = choose_layout(recipe, 1, "cuda")
    engine, _ = build_engine(recipe, layout, build_mesh(layout, 1), device)

    def passes(step):
        batches = iter(list(on_device(tiny.batches(step, layout, 0), device)))
        engine.optimizer.zero_grad()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")
        scheduled(engine, engine.chunks, batches, engine.objective.forward_step, forward_only=False)
        torch.cuda.set_sync_debug_mode("default")
        engine.optimizer.megatron.prepare_grads()
        engine.optimizer._clip()
        torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")
        engine.optimizer.megatron.step_with_ready_grads()
        torch.cuda.set_sync_debug_mode("default")

    for step in range(4):
        passes(step)
    return True
