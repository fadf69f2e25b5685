import json
import sys

import pytest
import torch

from igla_mega.config.errors import ConfigError
from igla_mega.config.schema import Logging
from igla_mega.train import metrics, trackers
from igla_mega.train.trackers import Trackers, write_event

QUIET = Logging(tensorboard=False)


def opened(run_dir, logging, resume_step=0):
    trackers = Trackers(run_dir, logging, {})
    trackers.open(resume_step)
    return trackers


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


def test_tensorboard_gets_every_number_at_its_step(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trackers = opened(tmp_path, Logging())
    trackers.metrics({"step": 1, "stage": "tiny", "loss": 2.5, "mfu": None})
    trackers.metrics({"step": 2, "loss": 2.25, "validation_loss": {"web": 3.5}})
    trackers.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = {
        tag: [(event.step, event.tensor_proto.float_val[0]) for event in events.Tensors(tag)]
        for tag in events.Tags()["tensors"]
    }
    assert found == {"loss": [(1, 2.5), (2, 2.25)], "validation_loss/web": [(2, 3.5)]}


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
