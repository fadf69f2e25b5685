import time
from fractions import Fraction

import numpy as np
import pytest

from igla_mega.config.errors import ConfigError
from igla_mega.data import blend
from igla_mega.data.blend import Blend, blend_schedule

CARD = {"web": 0.4, "code": 0.2, "books": 0.15, "academic": 0.15, "conversation": 0.1}


def largest_lag(schedule: np.ndarray, counts: np.ndarray) -> Fraction:
    """Largest distance, over all prefixes and sources, of the turns taken from n * counts / period."""
    period = int(counts.sum())
    n = np.arange(1, period + 1)
    return max(
        Fraction(int(np.abs(np.cumsum(schedule == s) * period - n * count).max()), period)
        for s, count in enumerate(counts.tolist())
    )


def test_every_prefix_is_within_one_sample_of_the_weights():
    generator = np.random.default_rng(0)
    for _ in range(60):
        counts = generator.integers(0, 10 ** generator.integers(1, 4), generator.integers(1, 12))
        counts[generator.integers(len(counts))] += 1
        schedule = blend_schedule(counts.astype(np.int64))
        assert np.bincount(schedule, minlength=len(counts)).tolist() == counts.tolist()
        assert largest_lag(schedule, counts) < 1


def test_the_card_s_mix_is_exact_over_twenty_samples():
    mixed = Blend(CARD)
    assert (mixed.period, mixed.counts.tolist(), mixed.note) == (20, [8, 4, 3, 3, 2], None)


def test_weights_need_not_add_up_to_one():
    assert Blend({"a": 3, "b": 1}).counts.tolist() == [3, 1]


def test_each_source_is_read_in_order_without_gaps():
    mixed = Blend(CARD)
    sources, indices = mixed.sources_of(0, 1000)
    for source in range(5):
        drawn = indices[sources == source]
        assert drawn.tolist() == list(range(len(drawn)))


def test_a_sample_does_not_depend_on_where_one_begins_to_ask():
    mixed = Blend(CARD)
    sources, indices = mixed.sources_of(0, 500)
    later_sources, later_indices = mixed.sources_of(333, 500)
    assert np.array_equal(sources[333:], later_sources)
    assert np.array_equal(indices[333:], later_indices)


def test_consumed_counts_what_was_drawn():
    mixed = Blend(CARD)
    for samples in (0, 1, 19, 20, 777):
        sources, _ = mixed.sources_of(0, samples)
        assert list(mixed.consumed(samples).values()) == np.bincount(sources, minlength=5).tolist()


def test_a_source_of_weight_zero_is_never_drawn():
    sources, _ = Blend({"a": 0.0, "b": 0.7, "c": 0.3}).sources_of(0, 100)
    assert 0 not in sources


@pytest.mark.parametrize("weights", [[1e-12, 1.0], [1e300, 1e-300], [1e-9] * 3 + [1.0], [1 / 3, 1 / 7, 0.1234567891]])
def test_extreme_weights_are_rounded_and_said(weights):
    mixed = Blend({str(i): weight for i, weight in enumerate(weights)})
    assert mixed.period == blend.MAX_PERIOD
    assert mixed.counts.min() >= 1
    shares = np.array(weights) / sum(weights)
    assert np.abs(mixed.counts / mixed.period - shares).max() <= len(weights) / blend.MAX_PERIOD
    assert "rounded to parts of 1,000,000" in mixed.note


def test_a_thousand_sources_blend():
    generator = np.random.default_rng(1)
    mixed = Blend({f"s{i}": round(float(w), 6) for i, w in enumerate(generator.pareto(1.0, 1000) + 1e-6)})
    assert mixed.counts.min() >= 1
    assert mixed.counts.sum() == mixed.period


def test_the_longest_period_is_built_within_seconds():
    counts = np.array([400_001, 299_999, 200_003, 99_990, 7], dtype=np.int64)
    began = time.process_time()
    schedule = blend_schedule(counts)
    assert time.process_time() - began < 4.0
    assert largest_lag(schedule, counts) < 1


def test_the_built_helper_gives_the_same_schedule():
    if blend.built_blend_schedule is None:
        pytest.skip("csrc/index_helpers.cpp is not built")
    generator = np.random.default_rng(2)
    for _ in range(40):
        counts = generator.integers(1, 500, generator.integers(1, 9)).astype(np.int64)
        assert np.array_equal(blend.built_blend_schedule(counts), blend_schedule(counts))


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
def test_what_is_no_weight_is_refused_by_name(weight):
    with pytest.raises(ConfigError, match=r"data\.mix\.b: .* is no weight"):
        Blend({"a": 1.0, "b": weight})


@pytest.mark.parametrize("weights", [{}, {"a": 0.0, "b": 0}])
def test_a_mix_of_nothing_is_refused(weights):
    with pytest.raises(ConfigError, match="no weight above 0"):
        Blend(weights)
