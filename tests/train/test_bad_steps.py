"""Steps that go wrong in whole runs: named, told from faults of the machine, left out or gone back from."""

import math
import os

import pytest
import small_run
from small_run import Fault, events, lines, losses, write_recipe

from igla_mega.report.page import Page
from igla_mega.train.bad_steps import highest_loss

LAYOUTS = {
    "one": (1, {}),
    "data": (2, {}),
    "tensor": (2, {"tensor_parallel": 2}),
    "pipeline": (2, {"pipeline_parallel": 2}),
    "fsdp": (2, {"strategy": "FSDP"}),
    "bf16": (2, {"precision": "BF16"}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_loss_that_is_not_finite_stops_before_the_update_and_is_traced_to_rank_and_module(layout, tmp_path):
    num_ranks, distributed = LAYOUTS[layout]
    recipe = write_recipe(tmp_path, distributed=distributed)
    rank = num_ranks - 1
    module = "layers.0.mlp.linear_fc2" if layout == "pipeline" else "layers.1.mlp.linear_fc2"
    said = small_run.train(num_ranks, recipe, tmp_path / "run", Fault(rank, 5, module))
    assert all("FloatingPointError: step 5 is bad" in one and "training.on_nonfinite=skip" in one for one in said)
    assert "decoder.layers.1.mlp.linear_fc2" in said[0] and "micro-batch 2, forward" in said[0]
    assert "the same bits" in said[0]
    [entry] = lines(tmp_path / "run", "bad_steps.jsonl")
    assert (entry["step"], entry["ranks"], entry["micro_batch"]) == (5, [rank], 2)
    assert (entry["what"], entry["value"], entry["verdict"], entry["action"]) == (
        "loss",
        "nan",
        "deterministic",
        "stop",
    )
    assert entry["samples"] == {"words": {"samples": [32, 40], "epochs": [0, 0]}}
    assert max(losses(tmp_path / "run")) == 4
    summary = Page([tmp_path / "run"]).runs[0].summary()
    assert summary["state"] == "failed" and summary["cause"].startswith("step 5 is bad"), summary
    assert [one["lost_steps"] for one in lines(tmp_path / "run", "events.jsonl") if one["event"] == "failed"] == [0]


@pytest.mark.parametrize("layout", ["data", "tensor", "pipeline", "fsdp"])
def test_a_gradient_that_is_not_finite_behind_a_finite_loss_is_traced_too(layout, tmp_path):
    num_ranks, distributed = LAYOUTS[layout]
    recipe = write_recipe(tmp_path, distributed=distributed)
    fault = Fault(0, 5, "layers.0.mlp.linear_fc2", backward=True, value=math.inf)
    said = small_run.train(num_ranks, recipe, tmp_path / "run", fault)
    assert all("step 5 is bad" in one for one in said)
    [entry] = lines(tmp_path / "run", "bad_steps.jsonl")
    assert entry["what"] == "gradient norm" and entry["pass"] == "backward"
    assert entry["ranks"] == [0] and entry["micro_batch"] == 2, entry
    assert entry["module"] == "decoder.layers.0.mlp.linear_fc2"


@pytest.mark.parametrize("layout", ["data", "tensor", "pipeline"])
def test_a_fault_that_does_not_come_again_is_the_machines_and_the_run_is_as_if_it_had_not_been(layout, tmp_path):
    num_ranks, distributed = LAYOUTS[layout]
    recipe = write_recipe(tmp_path, distributed=distributed)
    small_run.train(num_ranks, recipe, tmp_path / "clean")
    said = small_run.train(num_ranks, recipe, tmp_path / "run", Fault(num_ranks - 1, 5, "final_layernorm", times=1))
    assert "a hardware fault" in said[0]
    assert losses(tmp_path / "run") == losses(tmp_path / "clean")
    [entry] = lines(tmp_path / "run", "bad_steps.jsonl")
    assert (entry["verdict"], entry["action"]) == ("transient", "taken")


@pytest.mark.parametrize("layout", ["one", "data", "fsdp"])
def test_a_skipped_step_updates_nothing_and_a_resume_repeats_the_run_bit_for_bit(layout, tmp_path):
    num_ranks, distributed = LAYOUTS[layout]
    recipe = write_recipe(tmp_path, distributed=distributed, training={
        "learning_rate": 1e-2, "batch_size": 8, "total_steps": 8, "on_nonfinite": "skip"
    })  # fmt: skip
    fault = Fault(0, 5, "final_layernorm")
    small_run.train(num_ranks, recipe, tmp_path / "run", fault)
    assert sorted(losses(tmp_path / "run")) == [1, 2, 3, 4, 6, 7, 8]
    left_out = [one["step"] for one in lines(tmp_path / "run", "ledger.jsonl") if one.get("skipped")]
    assert left_out == [5] and "skipped" in events(tmp_path / "run")
    # Without its last checkpoint it resumes from the one before, which has the skipped step.
    whole = losses(tmp_path / "run")
    for name in ("step_00000008",):
        os.rename(tmp_path / "run/checkpoints" / name, tmp_path / name)
    small_run.train(num_ranks, recipe, tmp_path / "run", fault)
    assert losses(tmp_path / "run") == whole


@pytest.mark.parametrize(("skips", "left_out"), [("bad_step", [6]), ("since_checkpoint", [5, 6])])
def test_rewinding_goes_back_to_the_last_checkpoint_and_leaves_the_samples_out(skips, left_out, tmp_path):
    training = {"on_nonfinite": "rewind", "rewind_skips": skips}
    base = {"learning_rate": 1e-2, "batch_size": 8, "total_steps": 8}
    recipe = write_recipe(tmp_path, training={**base, **training})
    said = small_run.train(2, recipe, tmp_path / "run", Fault(1, 6, "final_layernorm"))
    assert "back to the checkpoint of step 4; left out from there: step" in said[0]
    assert sorted(losses(tmp_path / "run")) == [step for step in range(1, 9) if step not in left_out]
    ledger = lines(tmp_path / "run", "ledger.jsonl")
    assert [one["step"] for one in ledger] == list(range(1, 9))
    assert [one["step"] for one in ledger if one.get("skipped")] == left_out
    # In a world of floats that repeat, going back and leaving out is leaving out.
    if skips == "bad_step":
        skipping = write_recipe(tmp_path / "skip", training={**base, "on_nonfinite": "skip"})
        small_run.train(2, skipping, tmp_path / "skip/run", Fault(1, 6, "final_layernorm"))
        assert losses(tmp_path / "skip/run") == losses(tmp_path / "run")


def test_without_a_checkpoint_rewinding_leaves_the_step_out(tmp_path):
    recipe = write_recipe(tmp_path, training={
        "learning_rate": 1e-2, "batch_size": 8, "total_steps": 4, "on_nonfinite": "rewind"
    })  # fmt: skip
    said = small_run.train(1, recipe, tmp_path / "run", Fault(0, 2, "final_layernorm"))
    assert "no checkpoint" in said[0] and sorted(losses(tmp_path / "run")) == [1, 3, 4]


def test_skipping_has_an_end(tmp_path):
    recipe = write_recipe(tmp_path, training={
        "learning_rate": 1e30, "batch_size": 8, "total_steps": 40, "on_nonfinite": "skip", "bad_steps_in_a_row": 3,
        "warmup_steps": 0, "gradient_clip": 0.0,
    })  # fmt: skip
    [said] = small_run.train(1, recipe, tmp_path / "run")
    assert "so were the 3 before it" in said, said
    assert [one["action"] for one in lines(tmp_path / "run", "bad_steps.jsonl")] == ["skip"] * 3 + ["stop"]


@pytest.mark.parametrize("action", ["warn", "stop", "skip"])
def test_a_loss_out_of_all_proportion_is_a_spike(action, tmp_path):
    recipe = write_recipe(tmp_path, training={
        "learning_rate": 1e-3, "batch_size": 8, "total_steps": 8, "on_spike": action, "spike_window": 4
    })  # fmt: skip
    [said] = small_run.train(1, recipe, tmp_path / "run", Fault(0, 6, "final_layernorm", value=60.0))
    assert "step 6: loss spike: " in said
    assert "spike" in events(tmp_path / "run")
    taken = {"warn": range(1, 9), "stop": range(1, 6), "skip": [1, 2, 3, 4, 5, 7, 8]}[action]
    assert sorted(losses(tmp_path / "run")) == list(taken)


def test_a_spike_is_told_by_the_median_and_not_before_half_a_window():
    assert highest_loss([3.0] * 49, 100, 10.0) == math.inf
    assert highest_loss([3.0] * 50, 100, 10.0) == pytest.approx(3.3)
    noisy = [3.0 + 0.1 * (-1) ** n for n in range(99)] + [50.0]
    assert 4.0 < highest_loss(noisy, 100, 10.0) < 5.0


def test_a_bad_step_of_a_mixture_counts_no_visits_and_moves_no_bias(tmp_path):
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "bias_update_rate": 1e-3}
    recipe = write_recipe(tmp_path, moe=moe)
    for name, fault in (("clean", None), ("run", Fault(0, 5, "final_layernorm", times=1))):
        small_run.train(2, recipe, tmp_path / name, fault)
    assert lines(tmp_path / "run", "bad_steps.jsonl")[0]["verdict"] == "transient"
    assert losses(tmp_path / "run") == losses(tmp_path / "clean")
    loads = [
        [one["expert_load"] for one in lines(tmp_path / name, "metrics.jsonl") if "expert_load" in one]
        for name in ("clean", "run")
    ]
    assert loads[0] == loads[1] and len(loads[0]) == 8
