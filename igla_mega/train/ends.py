"""Record how a run ended, as an event and in `heartbeat.json`, by the process that failed or by its launcher."""

import time
from pathlib import Path

from igla_mega.config.errors import ConfigError
from igla_mega.config.schema import Logging
from igla_mega.monitor import heartbeat
from igla_mega.monitor.on_event import notify
from igla_mega.train.trackers import event, write_event

_SINCE = time.time()
"""When this process began, about: a record from before is that of an earlier run."""
_ECHOES = ("onnection closed by peer", "onnection reset", "roken pipe")
"""Parts of errors that a rank meets because another one has ended."""


def failed(run_dir: Path, error: Exception, rank: int, logging: Logging) -> None:
    """Record that a rank ends with an error.

    The main rank writes the end of the run. Another one writes an event if its error is its own: every rank meets a
    mistake in the recipe, a bad step and a failed save.
    """
    text = str(error) or type(error).__name__
    # NCCL's errors about a lost peer are torch's DistBackendError and DistNetworkError.
    is_echo = any(words in text for words in _ECHOES) or type(error).__name__.startswith("Dist")
    if rank:
        of_all = isinstance(error, ConfigError | FloatingPointError) or type(error) is RuntimeError
        record = None if of_all or is_echo else heartbeat.read(run_dir)
        if record is not None and record["since"] >= _SINCE:
            write_event(run_dir, "failed", record["step"], f"rank {rank}: {text}", rank=rank)
        return
    code = 2 if isinstance(error, ConfigError) else 1
    end = {"kind": "failed", "message": text, "exit_code": code, "echo": is_echo}
    if (record := heartbeat.write_end(run_dir, end)) is not None:
        lost = heartbeat.lost_steps(run_dir, record)
        step = heartbeat.last_step(run_dir, record)
        notify(logging, run_dir, write_event(run_dir, "failed", step, text, lost_steps=lost, echo=is_echo))


def ended(run_dir: Path, exit_code: int, finished: bool, signal_name: str) -> None:
    """Record in the heartbeat that a run ends without an error; its event is written before.

    Args:
        signal_name: name of the signal that it stops on; empty without one.
    """
    kind = "finished" if finished else "requeued" if exit_code == 75 else "stopped"
    message = f"stopped by {signal_name}" if signal_name else "stopped as --stop-after asked"
    heartbeat.write_end(run_dir, {"kind": kind, "message": "" if finished else message, "exit_code": exit_code})


class Launched:
    """Records the ends that a launcher sees: of a rank that a signal has killed nobody else can write one."""

    def __init__(self, run_dir: Path, logging: Logging):
        self._run_dir, self._logging, self._since = run_dir, logging, time.time()

    def __call__(self, kind: str, message: str, exit_code: int) -> None:
        """Record an end of the ranks.

        Args:
            kind: `killed` by a signal, `failed`, `hung`, or `restarting` if the ranks are started again.
            exit_code: exit code of the command.
        """
        record = heartbeat.read(self._run_dir)
        if record is None or record["since"] < self._since:
            return  # the ranks did not get as far as to train: the folder may be another run's
        end = record["end"] or {"echo": True}
        known = not end.get("echo") and end.get("kind") != "restarting"
        if kind == "hung":  # its event has been written by the rank that found out
            notify(self._logging, self._run_dir, event("hang", record["step"], message))
        elif not (known and kind == "failed"):
            lost = heartbeat.lost_steps(self._run_dir, record)
            message = f"{message}; {heartbeat.words_of(lost)}"
            step = heartbeat.last_step(self._run_dir, record)
            entry = write_event(self._run_dir, kind, step, message, lost_steps=lost, exit_code=exit_code)
            notify(self._logging, self._run_dir, entry)
        if not known or (kind in ("killed", "restarting") and end["kind"] != "finished"):
            end = {"kind": kind, "message": message, "exit_code": exit_code}
            heartbeat.write_end(self._run_dir, end, by_launcher=True)
