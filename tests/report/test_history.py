import json
import math
import os

import numpy as np
import pytest
from report_runs import append, small_run, train_entry

from igla_mega.report.history import MAX_COLUMNS, Heat, History, events_of, thin


def read(folder):
    found = History(folder)
    found.update()
    return found


def test_every_row_and_all_that_is_measured_at_intervals_is_read(tmp_path):
    found = read(small_run(tmp_path))
    assert list(found.metrics.steps) == list(range(1, 201))
    assert found.metrics.columns["loss"][79] == pytest.approx(8 / math.e + 1)
    assert found.metrics.series["validation_loss/code"][1][-1] == pytest.approx(2.7)
    assert [list(part) for part in found.metrics.series["unigram_entropy"]] == [[0.0], [6.2]]
    assert found.metrics.needle[-1]["values"] == [[1.0, 0.5], [0.5, 0.0]]
    assert found.metrics.matrix["losses"] == [[2.5, None], [3.25, 2.0]]
    happened = [(event["step"], event["event"]) for event in events_of(found)]
    assert happened == [(0, "started"), (100, "saved"), (101, "stage"), (120, "spike")]
    assert found.problems() == []


def test_only_what_was_appended_is_read_again(tmp_path):
    found = read(small_run(tmp_path))
    offset, generation = found._lines["metrics.jsonl"].offset, found.generation
    assert not found.update()
    append(tmp_path / "metrics.jsonl", train_entry(201))
    assert found.update() and found.metrics.steps[-1] == 201
    assert found._lines["metrics.jsonl"].offset > offset and found.generation == generation


def test_what_is_broken_is_counted_and_the_rest_is_read(tmp_path):
    deep = "[" * 100_000
    lines = [
        "not json",
        json.dumps(train_entry(1)),
        "[1, 2]",
        '{"loss": 1.0}',
        deep,
        "\xff",
        json.dumps(train_entry(2)),
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "ledger.jsonl").write_text('{"sources": {"web": {"samples": "x"}}}\n')
    (tmp_path / "events.jsonl").write_text('{"event": {"a": 1}, "step": "x", "time": null}\n')
    found = read(tmp_path)
    assert list(found.metrics.steps) == [1, 2]
    [metrics, ledger] = found.problems()
    assert metrics.startswith(
        "metrics.jsonl: 5 lines are skipped: line 1 (not JSON), line 3 (not an object), line 4 (no step)"
    )
    assert ledger.startswith("ledger.jsonl: 1 line is skipped")


def test_of_steps_taken_twice_the_last_written_are_shown(tmp_path):
    append(tmp_path / "metrics.jsonl", *({**train_entry(step), "loss": 2.0} for step in range(1, 11)))
    append(tmp_path / "metrics.jsonl", *({**train_entry(step), "loss": 1.0} for step in range(8, 13)))
    found = read(tmp_path)
    assert list(found.metrics.steps) == list(range(1, 13))
    assert list(found.metrics.columns["loss"]) == [2.0] * 7 + [1.0] * 5
    assert any("3 steps were written twice" in problem for problem in found.problems())


def test_a_file_that_a_resume_has_rewritten_is_read_anew(tmp_path):
    found = read(small_run(tmp_path))
    kept = (tmp_path / "metrics.jsonl").read_text().splitlines()[:51]
    (tmp_path / "other").write_text("\n".join(kept) + "\n")
    os.replace(tmp_path / "other", tmp_path / "metrics.jsonl")
    generation = found.generation
    assert found.update() and found.generation > generation and len(found.metrics.steps) == 50


def test_losses_that_are_no_number_are_gaps_that_are_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 5.0}\n{"step": 2, "loss": NaN}\n{"step": 3, "loss": 1e999}\n'
    )
    found = read(tmp_path)
    assert np.isnan(found.metrics.column("loss")[1:]).all()
    assert [event["step"] for event in events_of(found)] == [2.0, 3.0]
    assert "the loss of 2 steps is not finite, first at 2" in found.problems()[0]


def test_numbers_too_large_and_texts_in_their_place_do_no_harm(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        f'{{"step": 1, "loss": {10**400}, "grad_norm": "x", "mfu": true, "expert_load": [["a"]]}}\n'
        '{"step": 2, "loss": 1.0, "expert_load": [[1], [2, 3]], "rank_step_seconds": [0.1, null]}\n'
        f'{{"step": {10**400}, "loss": 1.0}}\n'
        '{"step": 3, "needle": {"a": {"b": "c"}}, "forgetting_matrix": [[1]]}\n'
    )
    found = read(tmp_path)
    assert list(found.metrics.steps) == [1, 2] and found.metrics.heats["expert_load"].shape == (1, 2)
    assert found.metrics.matrix is None


def test_names_and_steps_that_no_run_has_are_cut_or_left_out(tmp_path):
    long = "k" * 100_000
    append(
        tmp_path / "metrics.jsonl",
        {"step": 1, "loss": 1.0, long: 2.0, "moe_alarms": {"starving": ["0.1"], "dropping": [3]}},
        {"step": 1, "validation_loss": {long: 2.0}, "needle": {long: {"0": 1.0}}},
        {"step": 1e300, "loss": 1.0},
        {"step": -1, "loss": 1.0},
    )
    found = read(tmp_path)
    assert list(found.metrics.steps) == [1] and "line 3 (no step), line 4 (no step)" in found.problems()[0]
    assert max(map(len, [*found.metrics.columns, *found.metrics.series])) < 300 and not found.metrics.needle
    assert "moe_alarms/starving" not in found.metrics.heats, "names are no numbers"


def test_a_needle_has_its_word_for_word_grid_beside_it(tmp_path):
    chosen, exact = {"64": {"0": 0.5, "100": 1.0}}, {"64": {"0": 0.0, "100": 0.5}}
    append(
        tmp_path / "metrics.jsonl", {"step": 1, "needle": chosen, "needle_exact": exact}, {"step": 2, "needle": chosen}
    )
    first, second = read(tmp_path).metrics.needle
    assert first["values"] == [[0.5, 1.0]] and first["exact"] == [[0.0, 0.5]] and "exact" not in second


def test_an_event_says_where_more_is_to_be_read(tmp_path):
    append(
        tmp_path / "events.jsonl",
        {"step": 7, "event": "hang", "message": "rank 1 is missing", "report": "hang/report_1.txt"},
        {"step": 8, "event": "save_failed", "message": "No space left on device", "where": "local"},
        {"step": 9, "event": "saved", "message": "saved in 0.4 s (shared)", "where": "shared"},
    )
    assert [event["message"] for event in events_of(read(tmp_path))] == [
        "rank 1 is missing (hang/report_1.txt)",
        "No space left on device (local)",
        "saved in 0.4 s (shared)",
    ]


def test_a_heat_map_of_a_long_run_keeps_means_in_bounded_memory():
    heat = Heat((2,))
    for step in range(1, 10_001):
        heat.add(step, np.array([step / 10_000, 1.0]))
    steps, values = heat.drawn()
    assert len(heat.columns) < 2 * MAX_COLUMNS and values.shape[1] <= MAX_COLUMNS
    assert values[0, -1] == pytest.approx(steps[-1] / 10_000, abs=0.01) and (values[1] == 1.0).all()
    assert values[0, 0] == pytest.approx(steps[0] / 2 / 10_000, abs=0.001)


def test_a_thinned_run_keeps_its_spikes_in_their_order():
    values = np.zeros(10_001)
    values[5000], values[5003], values[7] = 9.0, -3.0, np.nan
    thinned = thin({"step": np.arange(10_001.0), "loss": values}, 1000)
    assert len(thinned["step"]) == len(thinned["loss"]) <= 1002
    assert np.nanmax(thinned["loss"]) == 9.0 and np.nanmin(thinned["loss"]) == -3.0
    assert np.nanargmax(thinned["loss"]) < np.nanargmin(thinned["loss"]) and (np.diff(thinned["step"]) >= 0).all()


def test_quantiles_of_a_ranks_times_are_within_two_percent(tmp_path):
    times = np.random.default_rng(0).lognormal(0.0, 0.3, (1000, 3)) * [1.0, 1.0, 1.5]
    append(
        tmp_path / "metrics.jsonl",
        *({"step": i + 1, "loss": 1.0, "rank_step_seconds": list(t)} for i, t in enumerate(times)),
    )
    found = np.array(read(tmp_path).metrics.quantiles())
    assert found == pytest.approx(np.quantile(times, [0.05, 0.25, 0.5, 0.75, 0.95], axis=0).T, rel=0.021)


def test_of_many_ranks_least_median_most_and_the_slowest_are_kept(tmp_path):
    times = {"min": 0.9, "median": 1.0, "max": 1.4, "slowest_rank": 77}
    append(tmp_path / "metrics.jsonl", {"step": 1, "loss": 1.0, "rank_step_seconds": times})
    metrics = read(tmp_path).metrics
    assert metrics.series["rank_step_seconds/max"][1][0] == 1.4 and metrics.slowest == {77: 1}


def test_the_ledger_is_counted_in_tokens_where_their_number_is_known(tmp_path):
    first, second = {"web": {"samples": [0, 3]}}, {"web": {"samples": [3, 7]}, "code": {"samples": [0, 1]}}
    append(tmp_path / "ledger.jsonl", {"step": 1, "sources": first}, {"step": 2, "sources": second})
    found = read(tmp_path)
    assert found.tokens_by_source() == {"web": 7, "code": 1}
    found.sequence_length = 10
    assert found.tokens_by_source() == {"web": 70, "code": 10}


def test_a_phases_tokens_are_counted_in_its_own_length(tmp_path):
    append(tmp_path / "ledger.jsonl", {"step": 1, "sources": {"web": {"samples": [0, 3]}}, "sequence_length": 5})
    found = read(tmp_path)
    found.sequence_length = 10
    assert found.tokens_by_source() == {"web": 15}
