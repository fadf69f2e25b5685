"""Bytes and work of context parallelism, held to the sums done by hand for recipe 2 on A100s."""

from dataclasses import replace

import pytest

from igla_mega.config.load import load_recipe
from igla_mega.layout.attention import describe, ring_cost
from igla_mega.plan.choose import choose_layout

MIB = 2**20


@pytest.fixture(scope="module")
def koshey():
    recipe = load_recipe("koshey_7b")
    return recipe.model, choose_layout(recipe, 128, "cuda")


def test_a_hop_of_the_ring_carries_keys_and_values_and_on_the_way_back_their_fp32_gradients(koshey):
    cost = ring_cost(*koshey, "p2p", bytes_per_value=2)
    # 16384 tokens x 8 heads x 128 channels, twice, in bf16; the gradients are twice as wide.
    assert (cost.num_steps, cost.forward_bytes, cost.backward_bytes) == (8, 64 * MIB, 192 * MIB)
    assert cost.forward_flops == 2 * 16384**2 * 32 * 128
    assert cost.backward_flops == 2.5 * cost.forward_flops


@pytest.mark.parametrize(("schedule", "forward", "steps"), [("allgather", 448, 1), ("a2a", 280, 1)])
def test_schedules_without_a_ring_send_once(koshey, schedule, forward, steps):
    cost = ring_cost(*koshey, schedule, bytes_per_value=2)
    assert (cost.forward_bytes, cost.num_steps) == (forward * MIB, steps)


@pytest.mark.parametrize("schedule", ["p2p", "allgather", "a2a", "a2a+p2p"])
def test_every_schedule_does_the_same_work(koshey, schedule):
    cost = ring_cost(*koshey, schedule, bytes_per_value=2, inner_size=4)
    assert cost.forward_flops * cost.num_steps == 2 * 131072**2 // 8 * 32 * 128


def test_a_ring_across_nodes_sends_less_over_the_slow_link(koshey):
    model, layout = koshey
    wide = replace(layout, context=16)
    pure = ring_cost(model, wide, "p2p", bytes_per_value=2)
    assert pure.num_steps * pure.forward_bytes == 16 * 32 * MIB
    assert ring_cost(model, wide, "a2a+p2p", bytes_per_value=2, inner_size=8).num_steps == 2


def test_the_lines_name_schedule_reason_and_bandwidth(koshey):
    model, layout = koshey
    lines = describe(ring_cost(model, layout, "p2p", bytes_per_value=2), layout, "heads do not divide", 312e12)
    assert lines[0] == (
        "context parallel: p2p over 8 ranks (heads do not divide); 16,384 tokens of each sequence per rank"
    )
    # 64 MiB within 2.2 TFLOP at 312 TFLOP/s.
    assert "9.52 GB/s forward, 11.4 GB/s backward" in lines[2]
