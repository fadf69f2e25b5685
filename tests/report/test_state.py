"""What the page says of a run, from records that the run's own writers have written."""

import json
import os
import resource
import shutil
import signal
import sys
import time

import pytest
from report_runs import opened, train_entry

from igla_mega.config.schema import Logging
from igla_mega.distributed.environment import LAUNCHER
from igla_mega.monitor import heartbeat
from igla_mega.monitor.heartbeat import SILENT_SECONDS
from igla_mega.report.history import History
from igla_mega.report.state import RESTART_SECONDS, state_of
from igla_mega.train import ends
from igla_mega.train.trackers import write_event

QUIET = Logging(tensorboard=False)
ELSEWHERE = {"host": "node7", "boot": "another"}
SAVED, LAST = 6, 8


def begin(run, *, resume_step=0, steps=LAST):
    """Start as `run.train` does, and take steps; the checkpoint of step `SAVED` is complete."""
    trackers = opened(run, QUIET, resume_step)
    trackers.event("resumed" if resume_step else "started", resume_step, "small: DDP", ranks=2, layout="DDP data 2")
    for step in range(resume_step + 1, steps + 1):
        trackers.metrics(train_entry(step))
        if step == SAVED:
            trackers.event("saved", step, "saved in 0.1 s", where="shared")
    return trackers


def in_a_process(write, run, **environment):
    """Call `write(run)` in a process that is then gone; it is its own rank 0, and this process its launcher."""
    run.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if not child:
        os.environ.update(environment)
        try:
            write(run)
        except BaseException:
            os._exit(9)
        os._exit(0)
    assert os.waitpid(child, 0)[1] in (0, signal.SIGKILL), "the records could not be written"


def killed(run):
    begin(run)
    heartbeat_written(run)
    os.kill(os.getpid(), signal.SIGKILL)


def heartbeat_written(run):
    record = heartbeat.read(run)
    heartbeat._write(run, record | {"step": LAST, "saved_step": SAVED})  # as its thread does every five seconds


def nan(run):
    trackers = begin(run)
    trackers.event("stopping", LAST, "stopped before the update of step 9")
    trackers.close()
    ends.failed(run, FloatingPointError("step 9 is bad, by the loss: stopped before its update."), 0, QUIET)


def failed_save(run, text="run/checkpoints: the checkpoint of step 8 could not be saved: Input/output error"):
    trackers = begin(run)
    trackers.event("save_failed", LAST, text, where="shared")
    trackers.close()
    lost = "Training after step 6 is lost. Free some space, then run the same command again to resume from there."
    ends.failed(run, RuntimeError(f"{text}\n  {lost}"), 0, QUIET)


def full_disk(run):
    """No file may grow: the lines of the end are lost, as on a full disk; what is overwritten in place is not."""
    trackers = begin(run)
    write_event(run, "spike", LAST, "x" * (2 * heartbeat.SIZE_BYTES))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (heartbeat.SIZE_BYTES, heartbeat.SIZE_BYTES))
    trackers.close()
    before = (run / "events.jsonl").stat().st_size
    ends.failed(run, RuntimeError("the checkpoint of step 8 could not be saved: No space left on device"), 0, QUIET)
    assert (run / "events.jsonl").stat().st_size == before


def finished(run):
    trackers = begin(run)
    trackers.event("saved", LAST, "saved in 0.1 s", where="shared")
    trackers.event("finished", LAST, "all 8 steps are taken")
    trackers.close()
    ends.ended(run, 0, True, "")


def stopped(run, name="SIGTERM", code=75):
    trackers = begin(run)
    trackers.event("stopping", LAST, f"stopping after step 8, as {name} requested; the same command resumes from here")
    trackers.event("saved", LAST, "saved in 0.1 s", where="shared")
    trackers.close()
    ends.ended(run, code, False, name)


def killed_while_it_saves(run):
    begin(run).event("stopping", LAST, "stopping after step 8, as SIGTERM requested")
    killed_now(run)


def killed_now(run):
    heartbeat_written(run)
    os.kill(os.getpid(), signal.SIGKILL)


def hang(run):
    begin(run)
    heartbeat_written(run)
    write_event(
        run, "hang", LAST, "the run is stuck: no progress for 60 s. Rank 1 is behind.", report="hang/report.txt"
    )
    os._exit(0)


def lost_a_peer(run):
    begin(run).close()
    ends.failed(run, MemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 1, QUIET)
    ends.failed(run, RuntimeError("Connection closed by peer [127.0.0.1]:1"), 0, QUIET)


def by_launcher(write, *said):
    """A process that ends after `write`, and its launcher, which is this process, that records what it saw."""

    def records(run):
        launched = ends.Launched(run, QUIET)
        in_a_process(write, run, **{LAUNCHER: str(os.getpid())})
        launched(*said)

    return records


SIGKILLED = ("killed", "rank 1 was ended by SIGKILL", 1)
HERE = {
    "killed without a record": (killed, "dead", "dead, last alive", "ended without a record", 2),
    "killed by a signal, seen by its launcher": (
        by_launcher(killed, *SIGKILLED), "dead", "killed, ", "rank 1 was ended by SIGKILL; 2 steps are lost.", 2,
    ),
    "out of memory on another rank": (lost_a_peer, "failed", "failed, ", "rank 1: CUDA out of memory", 2),
    "a peer was killed": (by_launcher(lost_a_peer, *SIGKILLED), "dead", "killed, ", "CUDA out of memory", 2),
    "not finite": (nan, "failed", "failed, ", "step 9 is bad, by the loss: stopped before its update. (2 steps", 2),
    "the last save failed": (failed_save, "failed", "failed, ", "Training after step 6 is lost", 2),
    "the disk is full": (full_disk, "failed", "failed, ", "No space left on device. 2 steps are lost", 2),
    "finished": (finished, "finished", "finished, ", "", 0),
    "stopped by hand": (lambda run: stopped(run, "SIGINT", 130), "stopped", "stopped, ", "stopped by SIGINT.", 0),
    "to be requeued": (stopped, "stopped", "stopped, to be started again, ", "stopped by SIGTERM.", 0),
    "killed while it saved": (killed_while_it_saves, "dead", "dead, last alive", "ended without a record", 2),
    "stuck": (hang, "hung", "ended by the watchdog, ", "no progress for 60 s. Rank 1 is behind.", 2),
    "stuck, with a launcher": (
        by_launcher(hang, "hung", "the watchdog ended the run, which was stuck", 76),
        "hung", "ended by the watchdog, ", "no progress for 60 s. Rank 1 is behind.", 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HERE)
def test_the_state_its_cause_and_the_next_command_are_those_of_the_records(name, tmp_path):
    write, kind, says, cause, lost = HERE[name]
    run = tmp_path / "run"
    if name.endswith(("launcher", "was killed")):
        write(run)
    else:
        in_a_process(write, run)
    for folder in (run, shutil.copytree(run, tmp_path / "copy")):
        # Two hours later nothing has changed, and files that were touched since say nothing.
        os.utime(folder / "metrics.jsonl")
        history = History(folder)
        history.update()
        for later in (0.0, 7200.0):
            state = state_of(history, time.time() + later)
            assert (state.kind, cause in state.cause) == (kind, True), state
            assert state.says.startswith(says) and (later == 0 or "2 h 00 min ago" in state.says), state
            assert state.command.startswith("igla-mega ") == (kind != "finished"), state
            assert ("lost" in state.cause) == (lost > 0), state


def test_a_run_on_this_machine_runs_as_long_as_its_process_does_and_is_dead_at_once_without_it(tmp_path):
    trackers = begin(tmp_path)
    history = History(tmp_path)
    history.update()
    assert state_of(history).kind == "running" and state_of(history).says == "running"
    record = heartbeat.read(tmp_path)
    assert state_of(history, record["time"] + SILENT_SECONDS - 1).kind == "running"
    stopped = state_of(history, record["time"] + SILENT_SECONDS + 1)
    assert stopped.kind == "stale" and "is stopped (SIGSTOP)" in stopped.cause and "a copy" in stopped.cause
    trackers.close()
    heartbeat._write(tmp_path, record | {"started": record["started"] + 1})  # another process has its number
    assert state_of(history).kind == "dead"


def test_on_another_host_the_age_of_the_heartbeat_decides(tmp_path, monkeypatch):
    with monkeypatch.context() as other:
        other.setattr(heartbeat, "_place", lambda: ELSEWHERE)
        trackers = begin(tmp_path)
    trackers.close()
    history, written = History(tmp_path), heartbeat.read(tmp_path)["time"]
    history.update()
    alive, silent = (state_of(history, written + SILENT_SECONDS + by) for by in (-1, 1))
    assert (alive.kind, alive.says, alive.cause, alive.command) == ("running", "running on node7", "", "")
    assert (silent.kind, silent.says) == ("stale", "no heartbeat for 2 min")
    assert "on node7 has ended, or its machine or network is down" in silent.cause and silent.command
    assert state_of(history, written - 30).kind == "running", "clocks differ"


def test_a_run_that_is_started_again_runs_and_tells_of_the_death_before(tmp_path):
    in_a_process(killed, tmp_path)
    trackers = begin(tmp_path, resume_step=SAVED)
    history = History(tmp_path)
    history.update()
    assert state_of(history).kind == "running"
    [died] = [event for event in history.events if event["event"] == "died"]
    assert "ended without a record after step 8; 2 steps are lost" in died["message"] and died["lost_steps"] == 2
    trackers.close()
    ends.ended(tmp_path, 75, False, "SIGTERM")
    in_a_process(finished, tmp_path)
    history.update()
    assert [event["event"] for event in history.events].count("died") == 1, "the others recorded how they ended"


def test_ranks_that_are_started_again_are_not_dead_as_long_as_their_launcher_lives(tmp_path, monkeypatch):
    by_launcher(killed, "restarting", "rank 1 was ended by SIGKILL; the ranks are started again", 0)(tmp_path)
    history = History(tmp_path)
    history.update()
    state = state_of(history)
    assert (state.kind, state.command) == ("restarting", "") and "rank 1 was ended by SIGKILL" in state.cause
    record = heartbeat.read(tmp_path)
    heartbeat._write(tmp_path, record | {"launcher": 2**22 + 1})  # above the largest process id
    assert state_of(history).kind == "dead"
    heartbeat._write(tmp_path, record | ELSEWHERE)
    assert state_of(history).kind == "restarting"
    assert state_of(history, time.time() + RESTART_SECONDS).kind == "stale"


def test_a_launcher_whose_ranks_never_trained_leaves_the_folder_alone(tmp_path):
    in_a_process(finished, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    ends.Launched(tmp_path, QUIET)(*SIGKILLED)
    ends.failed(tmp_path, RuntimeError("refused"), 0, QUIET)
    ends.ended(tmp_path, 0, True, "")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_rank_that_fails_before_the_run_begins_writes_nothing_about_the_run_before(tmp_path, monkeypatch):
    in_a_process(finished, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(ends, "_SINCE", time.time())
    ends.failed(tmp_path, OSError("words.bin: no such file"), 3, QUIET)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("kind", "event"), [("hung", "hang"), ("killed", "killed"), ("failed", "failed"), ("restarting", "restarting")]
)
def test_the_launcher_runs_the_command_of_what_it_saw(kind, event, tmp_path):
    out = tmp_path / "out"
    write = f"import os; open({str(out)!r}, 'a').write(os.environ['IGLA_EVENT'])"
    logging = Logging(tensorboard=False, on_event={event: (sys.executable, "-c", write)})
    launched = ends.Launched(tmp_path, logging)
    in_a_process(killed, tmp_path, **{LAUNCHER: str(os.getpid())})
    launched(kind, "rank 1 ended", 1)
    assert out.read_text() == event


def test_a_process_that_fails_runs_its_command_once(tmp_path):
    out = tmp_path / "out"
    write = f"import os; open({str(out)!r}, 'a').write(os.environ['IGLA_EVENT'])"
    logging = Logging(tensorboard=False, on_event={"failed": (sys.executable, "-c", write)})

    def fails(run):
        begin(run).close()
        for rank in (0, 1):
            ends.failed(run, FloatingPointError("step 9 is bad"), rank, logging)

    launched = ends.Launched(tmp_path, logging)
    in_a_process(fails, tmp_path, **{LAUNCHER: str(os.getpid())})
    launched("failed", "rank 0 ended first, with exit code 1", 1)
    assert out.read_text() == "failed"


def without_a_record(run, *kinds):
    for kind in kinds:
        write_event(run, kind, 5, "as it was")
    history = History(run)
    history.update()
    return state_of(history, time.time() + 60)


@pytest.mark.parametrize(
    ("kinds", "kind"),
    [
        ((), "empty"),
        (("started",), "stale"),
        (("started", "finished"), "finished"),
        (("started", "stopping", "saved"), "stopped"),
        (("started", "hang"), "hung"),
        (("started", "stopping", "resumed", "saved"), "stale"),
    ],
)
def test_of_a_folder_without_heartbeats_the_events_decide(kinds, kind, tmp_path):
    assert without_a_record(tmp_path, *kinds).kind == kind


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 8192, b"{", b"[]", b"null", b'{"time": 1}', b"\xff", b"[" * 8000, b'{"time": 1e400}']
    + [
        json.dumps({"time": 1, "since": 1, "pid": 1, "started": 1, "launcher": 1, "step": 1, "saved_step": 1,
                    "host": "h", "boot": "", "command": "", "end": None, **change}).encode()
        for change in ({"pid": None}, {"end": 3}, {"end": {"kind": 1}}, {"time": True}, {"host": 4}, {"step": 1e300})
    ],
)  # fmt: skip
def test_a_record_that_is_none_counts_as_absent(content, tmp_path):
    (tmp_path / heartbeat.FILE).write_bytes(content)
    assert heartbeat.read(tmp_path) is None
    assert without_a_record(tmp_path, "started", "finished").kind == "finished"
