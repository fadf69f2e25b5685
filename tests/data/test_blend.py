import json
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
    with pytest.raises(ConfigError, match=r"data\.mix\.b: .* is not a weight"):
        Blend({"a": 1.0, "b": weight})


@pytest.mark.parametrize("weights", [{}, {"a": 0.0, "b": 0}])
def test_a_mix_of_nothing_is_refused(weights):
    with pytest.raises(ConfigError, match="no weight above 0"):
        Blend(weights)


def test_a_changed_weight_takes_effect_at_once_and_no_sample_is_lost_or_repeated():
    generator = np.random.default_rng(3)
    for _ in range(20):
        mixes: list = [(0, CARD)]
        for _ in range(3):
            weights = dict(zip(CARD, generator.integers(0, 50, 5).tolist(), strict=True)) | {"new": 3}
            mixes.append((mixes[-1][0] + int(generator.integers(1, 300)), weights))
        mixed = blend.changing_blend(mixes)
        end = mixes[-1][0] + 500
        sources, indices = mixed.sources_of(0, end)
        for source, name in enumerate(mixed.names):
            drawn = indices[sources == source]
            assert drawn.tolist() == list(range(len(drawn))), name
        counted = {name: int((sources == i).sum()) for i, name in enumerate(mixed.names)}
        assert mixed.consumed(end) == counted
        for (first, weights), stop in zip(mixes, [*(n for n, _ in mixes[1:]), end], strict=True):
            total = sum(weights.values())
            for n in range(first, stop, 17):
                for i, name in enumerate(mixed.names):
                    exact = (n - first) * weights.get(name, 0) / total
                    assert abs(int((sources[first:n] == i).sum()) - exact) < 1


def test_samples_before_a_change_are_those_of_the_run_without_it():
    before, changed = Blend(CARD), blend.changing_blend([(0, CARD), (333, {"books": 1.0})])
    assert all(np.array_equal(a, b) for a, b in zip(before.sources_of(0, 333), changed.sources_of(0, 333), strict=True))
    assert set(changed.sources_of(333, 400)[0].tolist()) == {2}


def test_the_ledger_of_mixes_notes_a_change_once_and_forgets_what_lies_behind_the_checkpoint(tmp_path):
    file = tmp_path / "mix.json"
    one, two, three = {"a": 1.0, "b": 1.0}, {"a": 3.0, "b": 1.0}, {"b": 1.0}

    def record(mix, consumed):
        mixes = blend.followed_mixes(blend.read_mixes(file), mix, consumed)
        file.write_text(blend.mixes_text(mixes))
        return mixes

    assert record(one, 0) == [(0, one)]
    assert record({"a": 2.0, "b": 2.0}, 40) == [(0, one)], "the same shares are the same mix"
    assert record(two, 40) == [(0, one), (40, two)]
    assert record(two, 100) == [(0, one), (40, two)]
    assert record(three, 100) == [(0, one), (40, two), (100, three)]
    assert record(one, 60) == [(0, one), (40, two), (60, one)]
    entries = json.loads(file.read_text())
    assert entries[1]["consumed"] == {"a": 20, "b": 20}
    assert entries[2]["consumed"] == {"a": 35, "b": 25}
    assert record(two, 0) == [(0, two)], "another run"


@pytest.mark.parametrize(
    "content",
    [
        b"[{",
        b"",
        b"[]",
        b"\0" * 40,
        b'{"first_sample": 0}',
        b'[{"first_sample": 8, "mix": {"a": 1}}]',
        b'[{"first_sample": 0, "mix": {"a": "x"}}]',
        b'[{"first_sample": 0, "mix": {"a": 0}}]',
        b'[{"first_sample": 0, "mix": {"a": 1}}, {"first_sample": 9, "mix": {"a": 1}}, {"first_sample": 4, "mix": {}}]',
        None,
    ],
    ids=repr,
)
def test_a_damaged_ledger_of_mixes_is_refused_with_its_name(content, tmp_path):
    file = tmp_path / "mix.json"
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"mix\.json: not a list of mixes"):
        blend.read_mixes(file)


def test_weights_are_normalised_and_that_is_said():
    assert blend.normalised(CARD) is None
    assert blend.normalised({"a": 2, "b": 6}) == (
        "data.mix: the weights add up to 8, not 1; normalized to a 0.25, b 0.75"
    )
    assert "b with weight 0 is never drawn" in blend.normalised({"a": 1, "b": 0})


@pytest.mark.parametrize("weights", [{"a": 1.0, "b": 1e-12}, {"a": 1e300, "b": 1e-300}, {"a": 1e-9, "b": 1e-9}])
def test_an_extreme_weight_never_fails(weights):
    mixed = Blend(weights)
    sources, _ = mixed.lookup(np.array([0, 1, 10**15], dtype=np.int64))
    assert len(sources) == 3


def test_what_a_run_will_read_is_told_by_source():
    lines = blend.consumption({"a": 1, "b": 3}, {"a": 1000, "b": 1500}, 6000)
    assert lines[0].split() == ["a", "25.00%", "1,500", "of", "1,000", "tokens,", "1.50", "epochs"]
    assert lines[1].endswith("3.00 epochs")
