"""Run the commands that a recipe gives for events, without a shell; a failure of one is reported and ends nothing."""

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from igla_mega.config.names import printable
from igla_mega.config.schema import Logging
from igla_mega.monitor.prometheus import mark_failed

LIMIT_SECONDS = 30.0
"""Time after which a command is killed, in seconds."""
CLOSE_SECONDS = 60.0
"""Maximum time that the end of a run waits for the commands of its last events, in seconds."""
MAX_WAITING = 100
"""Maximum number of events whose commands have not been started; those of further ones are dropped."""
VARIABLES = ("event", "step", "message", "time")
"""Fields of an event that its command gets, as IGLA_EVENT, IGLA_STEP, IGLA_MESSAGE and IGLA_TIME."""


class Commands:
    """Starts the command of an event in a thread, one after another, so that a slow one does not delay training."""

    def __init__(self, commands: Mapping[str, Sequence[str]], run_dir: Path):
        self._commands, self._run_dir = commands, run_dir
        self._waiting: queue.Queue = queue.Queue(MAX_WAITING)
        self._thread = threading.Thread(target=self._work, name="on-event", daemon=True)
        self._thread.start()

    def event(self, entry: Mapping[str, Any]) -> None:
        """Queue the command of an event, if there is one."""
        if entry["event"] in self._commands:
            try:
                self._waiting.put_nowait(entry)
            except queue.Full:
                _say(entry["event"], f"{MAX_WAITING} commands are waiting; this one is left out")

    def close(self) -> None:
        """Wait for the commands that are queued."""
        with contextlib.suppress(queue.Full):
            self._waiting.put(None, timeout=CLOSE_SECONDS)
            self._thread.join(CLOSE_SECONDS)

    def _work(self) -> None:
        while (entry := self._waiting.get()) is not None:
            run(self._commands[entry["event"]], entry, self._run_dir)


def notify(logging: Logging, run_dir: Path, entry: Mapping[str, Any]) -> None:
    """Report an event that no tracker sees, such as the end of a failed run: run its command, and mark the state."""
    if logging.prometheus is not None and entry["event"] in ("failed", "killed", "hang"):
        with contextlib.suppress(OSError):
            mark_failed(Path(logging.prometheus), run_dir.resolve().name)
    if command := logging.on_event.get(entry["event"]):
        run(command, entry, run_dir)


def run(command: Sequence[str], entry: Mapping[str, Any], run_dir: Path) -> None:
    """Run one command to its end or to its time limit, and report on standard error if it failed."""
    given = {f"IGLA_{key.upper()}": str(entry.get(key, "")).replace("\0", "") for key in VARIABLES}
    given["IGLA_RUN"] = str(run_dir.resolve())
    # A rank's own variables would make a Python program that it starts take itself for a rank.
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    try:
        process = subprocess.Popen(
            list(command),
            env=kept | given,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        _say(entry["event"], f"{command[0]} cannot be started ({error})")
        return
    try:
        _, said = process.communicate(timeout=LIMIT_SECONDS)
        if process.returncode:
            last = "".join(said.decode(errors="replace").strip().splitlines()[-1:])[:300]
            _say(entry["event"], f"{command[0]} ended with {process.returncode}{': ' if last else ''}{last}")
    except subprocess.TimeoutExpired:
        _kill(process)
        _say(entry["event"], f"{command[0]} did not end within {LIMIT_SECONDS:g} s, and was killed")


def _kill(process: subprocess.Popen) -> None:
    """Kill a command and what it started: they share a session of their own."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except OSError:
        process.kill()
    process.wait()


def _say(kind: str, what: str) -> None:
    print(printable(f"logging.on_event.{kind}: {what}"), file=sys.stderr, flush=True)
