import math

import pytest

from igla_mega.monitor import prometheus
from igla_mega.monitor.prometheus import TextFile, mark_failed

NAMES = ["a run", 'quo"ted', "back\\slash", "two\nlines", "igla_mega_state{", "ü"]


def read(text: str) -> dict:
    """Values by name and labels, by the parser of Prometheus' own client."""
    parser = pytest.importorskip("prometheus_client.parser")
    families = list(parser.text_string_to_metric_families(text))
    assert all(family.type == "gauge" and family.documentation for family in families)
    return {(s.name, *sorted(s.labels.items())): s.value for family in families for s in family.samples}


def state(found: dict) -> str:
    [one] = [key for key, value in found.items() if key[0] == "igla_mega_state" and value == 1]
    return dict(one[1:])["state"]


@pytest.mark.parametrize("name", NAMES)
def test_prometheus_reads_what_is_written_whatever_the_run_is_called(name, tmp_path):
    file = TextFile(tmp_path / "run.prom", name)
    file.event({"event": "started", "step": 0, "time": 1e9})
    file.metrics({"loss": 2.5, "tokens_per_second": 1e-9, "mfu": math.inf, "grad_norm": 1.0}, 3)
    file.event({"event": "saved", "step": 2, "time": 1.7e9 + 0.125, "where": "shared"})
    file.event({"event": "saved", "step": 1, "time": 1.8e9, "where": "remote"})
    found = read((tmp_path / "run.prom").read_text())
    label = ("run", name)
    assert found["igla_mega_step", label] == 3 and found["igla_mega_loss", label] == 2.5
    assert found["igla_mega_tokens_per_second", label] == 1e-9 and found["igla_mega_mfu", label] == math.inf
    assert found["igla_mega_last_checkpoint_step", label] == 2
    assert found["igla_mega_last_checkpoint_timestamp_seconds", label] == 1.7e9 + 0.125
    assert state(found) == "running" and len(found) == 7 + len(prometheus.STATES)
    mark_failed(tmp_path / "run.prom", name)
    again = read((tmp_path / "run.prom").read_text())
    assert state(again) == "failed" and {k: v for k, v in again.items() if "state" not in k[0]} == {
        k: v for k, v in found.items() if "state" not in k[0]
    }
    assert [path.name for path in tmp_path.iterdir()] == ["run.prom"]


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        (("started",), "running"),
        (("started", "finished"), "finished"),
        (("started", "stopping", "saved"), "stopped"),
        (("started", "stopping", "resumed"), "running"),
        (("started", "spike", "failed"), "failed"),
        (("started", "hang"), "failed"),
    ],
)
def test_the_state_follows_the_events(kinds, expected, tmp_path):
    file = TextFile(tmp_path / "run.prom", "run")
    for kind in kinds:
        file.event({"event": kind, "step": 1, "time": 1e9, "where": "shared"})
    assert state(read((tmp_path / "run.prom").read_text())) == expected


def test_a_step_that_is_not_finite_is_no_broken_file(tmp_path):
    TextFile(tmp_path / "a.prom", "run").metrics({"loss": math.nan, "mfu": -math.inf}, 1)
    assert 'igla_mega_loss{run="run"} NaN' in (tmp_path / "a.prom").read_text()
    assert 'igla_mega_mfu{run="run"} -Inf' in (tmp_path / "a.prom").read_text()


def test_the_file_is_written_at_intervals_and_at_the_end(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(prometheus, "_replace", lambda path, text: written.append(text))
    file = TextFile(tmp_path / "a.prom", "run")
    for step in range(1, 500):
        file.metrics({"loss": 1.0}, step)
    file.close()
    assert len(written) < 100 and 'igla_mega_step{run="run"} 499' in written[-1]
