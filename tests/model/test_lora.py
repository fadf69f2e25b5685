"""Tests of adapters against PEFT on the same weights and batches, and every layout against one process."""

import pytest
import ranks
import tiny
import torch
import tuned

from igla_mega.engine.step import evaluate
from igla_mega.model import lora

NUM_STEPS = 10
TOLERANCE = 1e-5
"""Absolute tolerance, for losses of 5.6 nats and adapters of up to 0.3: the same sums in another order, in fp32."""

VARIANTS = {
    "all projections": {},
    "q and v": {"target_modules": ("q_proj", "v_proj")},
    "down alone": {"target_modules": ("down_proj",)},
    "rsLoRA": {"use_rslora": True, "rank": 3},
    "DoRA": {"use_dora": True},
    "DoRA on q and up": {"use_dora": True, "target_modules": ("q_proj", "up_proj")},
}


def against_peft(tmp_path):
    """Return the largest differences of loss, gradient norm and adapters per variant, and the adapters' movement."""
    recipe, differences = tiny.recipe(training={"learning_rate": 5e-4}), {}
    mesh = None
    for name, changes in VARIANTS.items():
        section = tuned.section(**changes)
        wrapped = tuned.with_peft(tuned.llama(tmp_path / name), section)
        start = tuned.peft_adapters(wrapped)
        built, shards, _ = tuned.engine(recipe, section, base=tmp_path / f"{name}-native", start=start, mesh=mesh)
        mesh = built.mesh
        ours = tuned.steps(built, NUM_STEPS, recipe.training.learning_rate)
        theirs = tuned.peft_steps(wrapped, NUM_STEPS, recipe)
        trained, expected = tuned.gathered(built, shards), tuned.peft_adapters(wrapped)
        assert trained.keys() == expected.keys()
        differences[name] = (
            *(max(abs(a[i] - b[i]) for a, b in zip(ours, theirs, strict=True)) for i in (0, 1)),
            max((trained[n] - expected[n]).abs().max().item() for n in expected),
            max((expected[n] - start[n]).abs().max().item() for n in start),
        )
    return differences


def test_ten_steps_equal_those_of_peft(tmp_path):
    [differences] = ranks.run(1, against_peft, tmp_path, limit_seconds=300)
    for name, (loss, norm, matrices, moved) in differences.items():
        print(f"{name}: loss {loss:.1e}, gradient norm {norm:.1e}, adapters {matrices:.1e} of {moved:.1e} moved")
        assert loss < TOLERANCE and norm < TOLERANCE and matrices < TOLERANCE and moved > 3e-3


TP, PP = {"tensor_parallel": 2}, {"pipeline_parallel": 2}
SP, FULL = {**TP, "sequence_parallel": True}, {"gradient_checkpointing": "full"}
LAYOUTS = [
    (1, FULL),
    (1, {"micro_batch_size": 4}),
    (2, {**TP, "sequence_parallel": False}),
    (2, SP),
    (2, {**SP, **FULL}),
    (2, PP),
    (2, {**PP, **FULL}),
    (2, {"distributed_optimizer": True}),
    (2, {"distributed_optimizer": False}),
    (2, {"context_parallel": 2}),
    (2, {"strategy": "FSDP"}),
    (2, {"strategy": "FSDP", **FULL}),
    (4, {"strategy": "FSDP", **SP}),
    (4, {**SP, **PP, **FULL}),
    (4, {**SP, "distributed_optimizer": True}),
]
KINDS = {"LoRA with dropout": {"dropout": 0.3}, "DoRA": {"use_dora": True}}
CASES = [("LoRA with dropout", case) for case in LAYOUTS]
# What DoRA adds is a norm over ranks.
CASES += [("DoRA", case) for case in LAYOUTS if "tensor_parallel" in case[1] or "strategy" in case[1]]


def trained(recipe, section):
    built, shards, _ = tuned.engine(recipe, section, start=warm(recipe, section))
    reports = tuned.steps(built, 5, recipe.training.learning_rate, dropout_seed=7)
    return reports, {name: matrix.numpy() for name, matrix in tuned.gathered(built, shards).items()}


def warm(recipe, section) -> dict[str, torch.Tensor]:
    """Return adapters whose lora_B is not zero."""
    generator, start = torch.Generator().manual_seed(5), {}
    for name, shape in tuned.adapters.shapes_of(recipe.model, section).items():
        if not name.endswith("lora_magnitude"):
            start[name] = torch.empty(shape).normal_(0, 0.05, generator=generator)
    return start


def label(case) -> str:
    num_ranks, layout = case
    return f"{num_ranks}-" + "-".join(f"{key}={value}" for key, value in layout.items())


@pytest.fixture(scope="module")
def one_process():
    recipe = tiny.recipe(training={"learning_rate": 2e-3})
    return {name: ranks.run(1, trained, recipe, tuned.section(**kind))[0] for name, kind in KINDS.items()}


@pytest.mark.parametrize(("kind", "case"), CASES, ids=lambda value: value if isinstance(value, str) else label(value))
def test_a_layout_equals_one_process(kind, case, one_process):
    num_ranks, layout = case
    recipe = tiny.recipe(training={"learning_rate": 2e-3}, **layout)
    results = ranks.run(num_ranks, trained, recipe, tuned.section(**KINDS[kind]))
    reference, expected = one_process[kind]
    reports, adapters = results[0]
    assert all(result[0] == reports for result in results), "every rank reports the same"
    loss, norm = (max(abs(a[i] - b[i]) for a, b in zip(reports, reference, strict=True)) for i in (0, 1))
    matrices = max(abs(adapters[n] - expected[n]).max() for n in expected)
    print(f"{kind}, {label(case)}: loss {loss:.1e}, gradient norm {norm:.1e}, adapters {matrices:.1e}")
    assert loss < TOLERANCE and norm < TOLERANCE and adapters.keys() == expected.keys()


def switched(tmp_path):
    recipe = tiny.recipe()
    built, _, switch = tuned.engine(recipe, tuned.section(), start=warm(recipe, tuned.section()))
    rows = [list(tiny.batches(0, built.layout, 0)) for _ in range(3)]
    on = evaluate(built, iter(rows[0]), 1)
    with switch.off():
        off = evaluate(built, iter(rows[1]), 1)
    return on, off, evaluate(built, iter(rows[2]), 1)


def base_loss():
    built = tiny.engine(tiny.recipe())[0]
    return evaluate(built, tiny.batches(0, built.layout, 0), 1)


def test_a_model_with_its_adapters_off_is_its_base(tmp_path):
    [(on, off, again)] = ranks.run(1, switched, tmp_path)
    assert on == again and abs(on - off) > 1e-3
    assert off == ranks.run(1, base_loss)[0]


def masks():
    """Return the same samples in one micro-batch and in two."""
    from types import SimpleNamespace

    group = SimpleNamespace(rank=lambda: 0, size=lambda: 1)
    stack = lora.Stack(3, "mlp.linear_fc1", 1, {"gate_proj": 8, "up_proj": 8})
    linear = SimpleNamespace(tp_group=group, sequence_parallel=False)
    place = lora._Place(stack, 1.0, 0.25, (0, 1), lora.Switch())
    x = torch.zeros(16, 4, 64)
    lora.seed_dropout(1, 100)
    whole, share = lora._dropout_mask(place, linear, x)
    lora.seed_dropout(1, 102)
    later, _ = lora._dropout_mask(place, linear, x[:, :2])
    return whole.numpy(), later.numpy(), share


def test_dropout_is_a_function_of_the_sample():
    [(whole, later, share)] = ranks.run(1, masks)
    assert share == 0.75 and abs(whole.mean() - share) < 0.02
    assert (whole[:, 2:] == later).all() and not (whole[:, :2] == later).all()
