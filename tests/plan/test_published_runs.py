"""The plan held to published runs of up to 1T parameters, of which every second row was not used to calibrate it.

`published_runs.json` has three sources: Narayanan et al. 2021 (arXiv:2104.04473), table 1, with micro-batches and model
chunks from Megatron-LM's examples/sc21/run_table_1.sh; Korthikanti et al. 2022 (arXiv:2205.05198), tables 3 and 5; and
Llama 3 (arXiv:2407.21783), table 4, whose 126 layers are planned as 128. The rows are sorted by name: those at even
places (the first, the third, ...) chose `calibration.HALF_WIDTH`, those at odd places are held back.
"""

import json
from pathlib import Path

import pytest

from igla_mega.config.schema import Recipe
from igla_mega.layout import hardware
from igla_mega.layout.layout import lay_out
from igla_mega.plan import calibration
from igla_mega.plan.time import Clock, model_flops_per_token

RUNS = json.loads((Path(__file__).parent / "published_runs.json").read_text())
CALIBRATING, HELD_BACK = RUNS[::2], RUNS[1::2]
FORWARD_PASSES, BACKWARD_PASSES = 6.5, 9.5
"""Reads and writes of the attention scores in bf16, counted from Megatron-LM's kernels of 2021 (no flash attention):
product 1, masked softmax 2, dropout 2.5 (its mask has one byte), product 1; backward 2, 2.5, 3, 2."""


def recipe_of(run: dict) -> Recipe:
    hidden, layers, heads = run["shape"]
    llama = run["name"].startswith("llama3")
    own = {"num_kv_heads": 8, "intermediate_size": 53248, "vocab_size": 128256, "max_position": 8192}
    # Two matrices of width 4h have as many weights as the three of a SwiGLU of width 8h / 3.
    gpt = {"num_kv_heads": heads, "intermediate_size": hidden * 8 // 24 * 8, "vocab_size": 51200, "max_position": 2048}
    return Recipe.model_validate(
        {
            "model": {"hidden_size": hidden, "num_layers": layers, "num_heads": heads, **(own if llama else gpt)},
            "training": {"batch_size": run["batch"], "total_steps": 10},
            "distributed": {
                "strategy": "DDP",
                "tensor_parallel": run["tensor"],
                "pipeline_parallel": run["pipeline"],
                "virtual_pipeline": run["chunks"],
                "micro_batch_size": run["micro_batch"],
                "gradient_checkpointing": "full" if run["recompute"] == "full" else "none",
            },
        }
    )


def stored_scores(run: dict, clock: Clock) -> float:
    """Seconds that a step spends on attention scores in memory, which flash attention does not store."""
    layout, model = clock.layout, clock.model
    if run["name"].startswith("llama3"):
        return 0.0
    passes = FORWARD_PASSES * (1 if run["recompute"] == "none" else 2) + BACKWARD_PASSES
    scores = layout.micro_batch_size * model.num_heads // layout.tensor * layout.sequence_length**2
    layer = passes * 2 * scores / (clock.bandwidth * clock.rates.memory.value)
    micro = layer * model.num_layers / layout.pipeline
    return micro * (layout.num_microbatches + (layout.pipeline - 1) / layout.virtual_pipeline)


def published(run: dict, recipe: Recipe) -> float:
    """Seconds of a step: as published, or from FLOP/s; with recomputation, by the formula of Narayanan et al."""
    if "seconds" in run:
        return run["seconds"]
    length, model = recipe.sequence_length, recipe.model
    flops = model_flops_per_token(recipe, length) * run["batch"] * length
    if run["recompute"] == "full":
        h, layers, v = model.hidden_size, model.num_layers, model.vocab_size
        flops = 96 * run["batch"] * length * layers * h**2 * (1 + length / (6 * h) + v / (16 * layers * h))
    return flops / (run["teraflops"] * 1e12 * run["gpus"])


def error(run: dict) -> float:
    """Relative error of the planned time of a step."""
    recipe, entry = recipe_of(run), hardware.find(run["gpu"])
    clock = Clock(recipe, lay_out(recipe, run["gpus"], "cuda"), entry, calibration.assumed(entry))
    planned = clock.step().seconds + stored_scores(run, clock)
    return planned / published(run, recipe) - 1


def test_half_of_the_rows_is_held_back():
    names = [run["name"] for run in RUNS]
    assert names == sorted(names) and len(CALIBRATING) == len(HELD_BACK) == 10


@pytest.mark.parametrize("run", CALIBRATING, ids=lambda run: run["name"])
def test_a_row_that_calibrates_is_met_within_14_percent(run):
    assert abs(error(run)) < 0.14


@pytest.mark.parametrize("run", HELD_BACK, ids=lambda run: run["name"])
def test_a_row_that_was_held_back_is_met_within_10_percent(run):
    assert abs(error(run)) < 0.10


def test_the_largest_models_are_planned_without_a_bias():
    """Of 310B and more: with one share for products of all sizes they came out 11 to 27 % too slow."""
    errors = [error(run) for run in HELD_BACK if run["shape"][0] >= 16384]
    assert len(errors) == 6 and abs(sum(errors) / len(errors)) < 0.05


def test_the_half_width_is_the_best_of_five_for_the_rows_that_calibrate(monkeypatch):
    def squares(factor: float) -> float:
        monkeypatch.setattr(calibration, "HALF_WIDTH", 1500 * factor)
        return sum(error(run) ** 2 for run in CALIBRATING)

    assert min((squares(factor), factor) for factor in (0, 0.5, 1, 1.5, 2))[1] == 1


def test_wider_products_reach_more_of_the_peak_and_a_measured_share_is_kept():
    rates = calibration.assumed(hardware.find("a100-80gb"))
    shares = [rates.gemm_share(1e12, width) for width in (100, 1000, calibration.WIDTH_OF_7B, 20_000, 1e6)]
    assert shares == sorted(shares) and shares[0] > 0 and shares[2] == rates.gemm.value and shares[-1] <= 0.9
    assert calibration.assumed(hardware.cpu()).gemm_share(1e9, 10) == calibration.assumed(hardware.cpu()).gemm.value
