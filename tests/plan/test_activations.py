"""The plan's peak of a step, held to what torch's allocator handed out in a real one."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import ranks

from igla_mega.config.load import load_recipe
from igla_mega.layout.layout import lay_out
from igla_mega.plan.activations import in_flight, kept_by_layer, layer_ops, peak

BENCH = Path(__file__).resolve().parents[2] / "tools" / "bench"


def bench():
    """`tools/bench/memory.py`, also in a rank."""
    if str(BENCH) not in sys.path:
        sys.path.append(str(BENCH))  # last: it has a ranks.py of its own
    spec = importlib.util.spec_from_file_location("bench_memory", BENCH / "memory.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measured(name: str) -> dict:
    return bench().measure(bench().CASES[name])


@pytest.mark.parametrize("name", bench().CASES)
def test_the_peak_of_a_step_is_what_the_allocator_says_within_a_twentieth(name):
    reports = ranks.run(bench().CASES[name].ranks, measured, name)
    assert max(abs(row["error"]) for row in bench().largest(reports)) < 0.05


def layout_of(**distributed):
    recipe = load_recipe("pretrain_7b", overrides=[f"distributed.{key}={value}" for key, value in distributed.items()])
    return recipe, lay_out(recipe, 64, "cuda")


def test_recomputing_keeps_less_of_a_layer():
    recipe, layout = layout_of()
    kept = [kept_by_layer(recipe, replace(layout, recompute=how), "cuda") for how in ("none", "selective", "full")]
    assert kept[0] > kept[1] > kept[2] == 8192 * 4096 * 2


def test_a_layer_on_a_gpu_keeps_what_its_ops_need_by_hand():
    recipe, layout = layout_of()
    # Values of a token: two norms' inputs and outputs, the stacked projections, queries and keys turned, attention's
    # output, gate, up and their product; and in fp32 a log-sum-exp a head and two roots of mean squares.
    values = 4 * 4096 + 6144 + 5120 + 4096 + 3 * 11008
    angles = 4 * 8192 * 128 * 2
    assert sum(op.kept for op in layer_ops(recipe, layout, "cuda")) == 8192 * (2 * values + 4 * 32 + 8) + angles


def test_early_pipeline_ranks_hold_more_micro_batches():
    _, layout = layout_of(strategy="DDP", pipeline_parallel=4)
    assert [in_flight(layout, stage) for stage in range(4)] == [4, 3, 2, 1]
    assert in_flight(replace(layout, num_microbatches=2), 0) == 2
    assert in_flight(replace(layout, virtual_pipeline=2), 0) == 11


def test_long_contexts_are_split_over_context_ranks():
    recipe = load_recipe("koshey_7b")
    layouts = [
        lay_out(load_recipe("koshey_7b", overrides=[f"distributed.context_parallel={n}"]), 128, "cuda") for n in (8, 16)
    ]
    eight, sixteen = (peak(recipe, replace(layout, recompute="full"), 0, "cuda").kept for layout in layouts)
    assert 1.9 < eight / sixteen < 2.1
