import json
import sys

import pytest
import torch
from report_runs import opened

from igla_mega.config.errors import ConfigError
from igla_mega.config.schema import Logging
from igla_mega.monitor.heartbeat import read
from igla_mega.train import metrics, trackers
from igla_mega.train.trackers import write_event

QUIET = Logging(tensorboard=False)


def written(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_resumed_run_appends_behind_its_checkpoint(tmp_path):
    for resume_step, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        trackers = opened(tmp_path, QUIET, resume_step)
        for step in steps:
            trackers.metrics({"step": step, "loss": 10.0 * resume_step + step})
            trackers.ledger({"step": step, "sources": {}})
        trackers.close()
    assert [(entry["step"], entry["loss"]) for entry in written(tmp_path / "metrics.jsonl")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 23.0),
        (4, 24.0),
    ]
    assert [entry["step"] for entry in written(tmp_path / "ledger.jsonl")] == [1, 2, 3, 4]


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
    trackers = opened(tmp_path, QUIET)
    trackers.metrics({"step": 1, "loss": 2.5})
    assert written(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.5}]
    trackers.close()


def charts(folder):
    """Step and value of every scalar, as tools that read event files with TensorBoard's defaults get them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert events.Tags()["tensors"] == []
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_lists_every_number_as_a_scalar_of_its_step(tmp_path):
    trackers = opened(tmp_path, Logging())
    trackers.metrics({"step": 1, "stage": "tiny", "loss": 2.5, "mfu": None, "tokens": 2**40, "spike": True})
    trackers.metrics({"step": 2, "loss": 2.25, "validation_loss": {"web": 3.5}})
    trackers.close()
    assert charts(tmp_path) == {
        "loss": [(1, 2.5), (2, 2.25)],
        "tokens": [(1, 2**40)],
        "spike": [(1, 1.0)],
        "validation_loss/web": [(2, 3.5)],
    }


def test_tensorboard_lists_each_step_once_after_a_resume_and_after_a_rewind(tmp_path):
    for resume_step, steps in ((0, (1, 2, 3)), (2, (3, 4, 5))):
        trackers = opened(tmp_path, Logging(), resume_step)
        for step in steps:
            trackers.metrics({"step": step, "loss": 10.0 * resume_step + step})
        if resume_step:
            trackers.rewind(3)
            trackers.metrics({"step": 4, "loss": 44.0})
        trackers.close()
    assert charts(tmp_path) == {"loss": [(1, 1.0), (2, 2.0), (3, 23.0), (4, 44.0)]}


def test_an_opening_makes_later_steps_of_the_charts_invalid_once(tmp_path):
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    opened(tmp_path, Logging(), 2).close()
    [file] = (tmp_path / "tensorboard").iterdir()
    assert [event.step for event in EventFileLoader(str(file)).Load() if event.HasField("session_log")] == [3]


def test_wandb_asked_for_and_absent_is_an_error_that_names_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"logging\.wandb: offline needs the package wandb") as raised:
        opened(tmp_path, Logging(tensorboard=False, wandb="offline"))
    assert "pip install wandb" in str(raised.value) and "logging.wandb=off" in str(raised.value)


def test_wandb_offline_writes_into_the_run_folder(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    trackers = opened(tmp_path, Logging(tensorboard=False, wandb="offline"))
    trackers.metrics({"step": 1, "loss": 2.5})
    trackers.close()
    [record] = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert record.stat().st_size > 0


def test_runs_of_one_name_have_ids_of_their_own_and_keep_them(tmp_path):
    first, second, earlier = (tmp_path / name / "run" for name in ("a", "b", "c"))
    for folder in (first, second, earlier / "wandb"):
        folder.mkdir(parents=True)
    ids = [trackers._wandb_id(folder) for folder in (first, second, first, earlier)]
    assert ids[0] == ids[2] != ids[1] and ids[3] == "run"


def test_peaks_are_positive_and_of_a_sane_size():
    assert 10e6 < metrics.peak_memory_bytes(torch.device("cpu")) < 1e12
    assert 1e8 < metrics.measured_peak_flops(torch.float32) < 1e14


def test_a_line_that_a_killed_run_has_half_written_spoils_no_other(tmp_path):
    (tmp_path / "events.jsonl").write_text('{"step": 1}\n{"step": 2, "ev')
    write_event(tmp_path, "resumed", 3, "from step 1")
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert lines[1] == '{"step": 2, "ev' and json.loads(lines[2])["step"] == 3 and len(lines) == 3


def test_every_part_that_watches_a_run_gets_its_steps_and_events(tmp_path):
    out, prom = tmp_path / "out", tmp_path / "run.prom"
    append = f"import os; open({str(out)!r}, 'a').write(os.environ['IGLA_EVENT'] + os.environ['IGLA_STEP'])"
    logging = Logging(tensorboard=False, prometheus=str(prom), on_event={"saved": (sys.executable, "-c", append)})
    trackers = opened(tmp_path, logging, 0)
    trackers.metrics({"step": 3, "loss": 2.5})
    trackers.event("saved", 3, "saved", where="shared")
    trackers.close()
    assert out.read_text() == "saved3"
    assert 'igla_mega_loss{run="' in prom.read_text() and "igla_mega_last_checkpoint_step" in prom.read_text()
    record = read(tmp_path)
    assert (record["step"], record["saved_step"], record["end"]) == (3, 3, None)


def test_a_file_of_state_that_cannot_be_written_is_given_up_and_the_run_is_not(tmp_path, capsys):
    trackers = opened(tmp_path, Logging(tensorboard=False, prometheus="/proc/a.prom"), 0)
    for step in (1, 2, 3):
        trackers.event("saved", step, "saved", where="shared")
        trackers.metrics({"step": step, "loss": 1.0})
    trackers.close()
    assert 1 <= capsys.readouterr().err.count("a tracker cannot write") <= 2
    assert [one["step"] for one in written(tmp_path / "metrics.jsonl")] == [1, 2, 3]
