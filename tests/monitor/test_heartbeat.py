import json
import os

import pytest

from igla_mega.monitor import heartbeat
from igla_mega.monitor.heartbeat import MAX_TEXT, SIZE_BYTES, HeartbeatFile, last_step, read, unrecorded_end, write_end


@pytest.fixture
def beat(tmp_path):
    file = HeartbeatFile(tmp_path, step=4)
    yield file
    file.close()


def test_a_record_names_the_process_its_place_and_how_far_it_is(beat, tmp_path):
    beat.metrics({"loss": 2.0}, 7)
    beat.event({"event": "saved", "step": 6, "where": "shared"})
    beat.event({"event": "saved", "step": 9, "where": "remote"})  # a copy of a checkpoint that is counted already
    beat.event({"event": "save_failed", "step": 7})
    beat.close()
    record = read(tmp_path)
    assert (record["pid"], record["step"], record["saved_step"], record["end"]) == (os.getpid(), 7, 6, None)
    assert heartbeat.is_here(record) and heartbeat.is_alive(record)
    beat.event({"event": "rewound", "step": 7, "to_step": 6})
    beat.close()
    assert read(tmp_path)["step"] == 6


def test_the_file_keeps_its_size_and_its_place_on_the_disk(beat, tmp_path):
    """What a full disk takes is an overwrite: no new block, no new name."""
    before = os.stat(tmp_path / heartbeat.FILE)
    write_end(tmp_path, {"kind": "failed", "message": "\U0001f987" * 5000, "exit_code": 1})
    after = os.stat(tmp_path / heartbeat.FILE)
    assert (before.st_size, before.st_ino) == (after.st_size, after.st_ino) == (SIZE_BYTES, after.st_ino)
    assert read(tmp_path)["end"]["message"] == "\U0001f987" * MAX_TEXT


def test_only_the_process_of_the_record_writes_its_end(beat, tmp_path):
    assert write_end(tmp_path, {"kind": "failed", "message": "x"}, by_launcher=True) is None
    record = read(tmp_path)
    for change in ({"pid": record["pid"] + 1}, {"host": "other"}, {"boot": "other"}):
        heartbeat._write(tmp_path, record | change)
        assert write_end(tmp_path, {"kind": "failed", "message": "x"}) is None and read(tmp_path)["end"] is None
    heartbeat._write(tmp_path, record | {"launcher": os.getpid()})
    assert write_end(tmp_path, {"kind": "killed", "message": "x"}, by_launcher=True)["end"]["kind"] == "killed"


@pytest.mark.parametrize(
    ("lines", "step"),
    [
        ("", 4),
        ('{"step": 8}\n', 8),
        ('{"step": 8}\n{"step": 9, "lo', 8),
        ('{"step": 8}\nnull\n\0\n{"step": 2.5}\n', 8),
        ('{"step": 3}\n', 4),
        ('{"step": 8}\n' + '{"x": "' + "y" * heartbeat.TAIL_BYTES + '"}\n', 4),
    ],
)
def test_the_last_step_is_that_of_the_last_whole_line(lines, step, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(lines)
    assert last_step(tmp_path, {"step": 4}) == step


def test_a_process_that_recorded_its_end_did_not_die(beat, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 9}) + "\n")
    step, lost, message = unrecorded_end(tmp_path)
    assert (step, lost) == (9, 5) and "ended without a record after step 9; 5 steps are lost" in message
    write_end(tmp_path, {"kind": "finished", "message": ""})
    assert unrecorded_end(tmp_path) is None


@pytest.mark.parametrize(
    ("names", "saved"),
    [((), 4), (("step_00000006", ".step_00000008.unfinished", "latest"), 6), (("step_00000002",), 4),
     (("step_00000006", "step_00000012", "step_x", "step_²"), 6)],
)  # fmt: skip
def test_a_checkpoint_that_is_complete_counts_though_nobody_recorded_it(names, saved, tmp_path):
    for name in names:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert heartbeat.saved_step(tmp_path, {"saved_step": 4}, 9) == saved


def test_a_planted_link_is_not_followed(tmp_path):
    (tmp_path / "theirs").write_text("untouched")
    (tmp_path / heartbeat.FILE).symlink_to(tmp_path / "theirs")
    HeartbeatFile(tmp_path, step=0).close()
    assert (tmp_path / "theirs").read_text() == "untouched"


def test_a_folder_that_cannot_be_written_ends_nothing(tmp_path):
    HeartbeatFile(tmp_path / "absent", step=0).close()
    assert read(tmp_path / "absent") is None


def test_the_processes_of_this_machine_are_told_apart_by_their_start():
    own = heartbeat._started(os.getpid())
    assert own > 0 and heartbeat._started(os.getppid()) != 0 and heartbeat._started(2**22 + 1) == 0
    import psutil

    ticks = os.sysconf("SC_CLK_TCK")
    assert psutil.boot_time() + own / ticks == pytest.approx(psutil.Process().create_time(), abs=2)
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert heartbeat._started(child) == 0, "a process that has ended and is not collected does not run"
    os.waitpid(child, 0)
