"""Keep `heartbeat.json` of a run folder: which process trains, how far it is, when it was last alive, how it ended.

The file has a fixed size and is overwritten in place: a full disk, which takes no new file and no new line, still takes
the end of the run. A reader may meet a half-written record, and reads again.
"""

import contextlib
import json
import os
import shlex
import socket
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from igla_mega.config import json_text
from igla_mega.config.files import no_follow, regular
from igla_mega.distributed.environment import LAUNCHER

FILE = "heartbeat.json"
INTERVAL_SECONDS = 5.0
SILENT_SECONDS = 120.0
"""Age of a heartbeat beyond which a run on another host counts as silent, in seconds. It covers a network file system
that caches for a minute, and clocks that differ by as much."""
TAIL_BYTES = 1 << 20
"""Number of bytes at the end of metrics.jsonl in which its last step is looked for."""
SIZE_BYTES, MAX_TEXT = 8192, 600
"""Size of the file; longest command and message, in characters: JSON writes a character in at most 6 bytes."""


class HeartbeatFile:
    """Writes the record of this process every `INTERVAL_SECONDS`, from a thread, until it is closed."""

    def __init__(self, run_dir: Path, *, step: int):
        self._run_dir = run_dir
        now = round(time.time(), 3)
        self._record: dict[str, Any] = {
            "time": now,
            "since": now,
            "interval": INTERVAL_SECONDS,
            **_place(),
            "pid": os.getpid(),
            "started": _started(os.getpid()),
            "launcher": int(os.environ.get(LAUNCHER, 0)),
            "command": f"igla-mega {shlex.join(sys.argv[1:])}"[:MAX_TEXT],
            "step": step,
            "saved_step": step,
            "end": None,
        }
        self._ended = threading.Event()
        _write(run_dir, self._record)
        self._thread = threading.Thread(target=self._beat, name="heartbeat-file", daemon=True)
        self._thread.start()

    def metrics(self, scalars: Mapping[str, float], step: int) -> None:
        """Record a step that is complete."""
        self._record["step"] = step

    def event(self, entry: Mapping[str, Any]) -> None:
        """Record the step of a checkpoint that is complete, and a return to an earlier one."""
        if entry["event"] == "saved" and entry.get("where") in ("shared", "local"):
            self._record["saved_step"] = max(self._record["saved_step"], entry["step"])
        elif entry["event"] == "rewound":
            self._record["step"] = entry.get("to_step", entry["step"])

    def close(self) -> None:
        """Stop the thread, and write the last state."""
        self._ended.set()
        self._thread.join()
        self._write_now()

    def _beat(self) -> None:
        while not self._ended.wait(INTERVAL_SECONDS):
            self._write_now()

    def _write_now(self) -> None:
        _write(self._run_dir, self._record | {"time": round(time.time(), 3)})


def read(run_dir: Path) -> dict[str, Any] | None:
    """Return the record of a run folder; None if there is none, or one that no version of this program wrote."""
    for _ in range(3):
        try:
            with open(run_dir / FILE, "rb", opener=regular) as file:
                record = json_text.loads(file.read(SIZE_BYTES))
        except OSError:
            return None
        except ValueError:
            continue  # read while it was written
        return record if isinstance(record, dict) and _is_record(record) else None
    return None


def write_end(run_dir: Path, end: Mapping[str, Any], *, by_launcher: bool = False) -> dict[str, Any] | None:
    """Write how a run ended into its record, if this process is the one that the record names.

    Args:
        end: `kind`, `message` and, where it is known, `exit_code`.
        by_launcher: True if this process is the launcher of the one that trained.

    Returns:
        The record as it is now; None if the folder's record is that of another process, and unchanged.
    """
    record = read(run_dir)
    own = "launcher" if by_launcher else "pid"
    if record is None or record[own] != os.getpid() or not is_here(record):
        return None
    if not by_launcher and not is_alive(record):  # an earlier process had the number of this one
        return None
    now = round(time.time(), 3)
    record["end"] = {"time": now, **end, "message": str(end["message"])[:MAX_TEXT]}
    _write(run_dir, record | ({} if by_launcher else {"time": now}))
    return record


def unrecorded_end(run_dir: Path) -> tuple[int, int, str] | None:
    """Return the last step, the lost steps and a sentence about a process that ended without recording how.

    None if the folder's last process recorded its end, or if there was none. Read before metrics.jsonl is cut.
    """
    record = read(run_dir)
    if record is None or record["end"] is not None:
        return None
    step, lost = last_step(run_dir, record), lost_steps(run_dir, record)
    message = f"process {record['pid']} on {record['host']} ended without a record after step {step}; {words_of(lost)}"
    return step, lost, message


def last_step(run_dir: Path, record: Mapping[str, Any]) -> int:
    """Return the last step that a run completed: that of the last whole line of metrics.jsonl, else of the record."""
    try:
        with open(run_dir / "metrics.jsonl", "rb", opener=regular) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        lines = []
    for line in reversed(lines):
        with contextlib.suppress(ValueError):
            entry = json_text.loads(line)
            if isinstance(entry, dict) and isinstance(entry.get("step"), int):
                return max(entry["step"], record["step"])
    return record["step"]


def lost_steps(run_dir: Path, record: Mapping[str, Any]) -> int:
    """Return how many steps were taken after the last complete checkpoint."""
    last = last_step(run_dir, record)
    return max(0, last - saved_step(run_dir, record, last))


def saved_step(run_dir: Path, record: Mapping[str, Any], last: int) -> int:
    """Return the step of the last complete checkpoint up to step `last`: of the record, or newer in the run folder.

    A process that was killed may have completed one that it did not come to record.
    """
    names = [path.name.removeprefix("step_") for path in (run_dir / "checkpoints").glob("step_*")]
    steps = [int(name) for name in names if name.isascii() and name.isdigit() and len(name) < 16]
    return max([int(record["saved_step"]), *(step for step in steps if step <= last)])


def words_of(lost: int) -> str:
    """Return the number of lost steps as text."""
    return {0: "no step is lost", 1: "1 step is lost"}.get(lost, f"{lost:,} steps are lost")


def is_alive(record: Mapping[str, Any]) -> bool:
    """Return True if the process of a record from this machine still runs; a process id may have been used again."""
    return bool(record["started"]) and _started(record["pid"]) == record["started"]


def launcher_is_alive(record: Mapping[str, Any]) -> bool:
    """Return True if the launcher of a record from this machine still runs."""
    return bool(record["launcher"]) and bool(_started(record["launcher"]))


def _is_record(record: Mapping[str, Any]) -> bool:
    """Return True if the values that readers use have their types."""
    numbers = all(
        isinstance(record.get(key), int | float) and not isinstance(record.get(key), bool) and abs(record[key]) < 1e15
        for key in ("time", "since", "pid", "started", "launcher", "step", "saved_step")
    )
    texts = all(isinstance(record.get(key), str) for key in ("host", "boot", "command"))
    end = record.get("end")
    return numbers and texts and (end is None or _is_end(end))


def _is_end(end: Any) -> bool:
    return (
        isinstance(end, dict)
        and isinstance(end.get("time"), int | float)
        and all(isinstance(end.get(key), str) for key in ("kind", "message"))
    )


def _write(run_dir: Path, record: Mapping[str, Any]) -> None:
    """Overwrite the record in place; a folder that cannot be written must not end a run."""
    text = json.dumps(record).encode().ljust(SIZE_BYTES - 1) + b"\n"
    with contextlib.suppress(OSError):
        # Opened each time: a network file system shows others what was written when the file is closed.
        descriptor = no_follow(str(run_dir / FILE), os.O_WRONLY | os.O_CREAT)
        try:
            os.pwrite(descriptor, text, 0)
        finally:
            os.close(descriptor)


def _place() -> dict[str, str]:
    """Return the host, and what tells two process tables of one host name apart: boot and namespace of process ids."""
    boot = ""
    with contextlib.suppress(OSError):
        boot = f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    return {"host": socket.gethostname(), "boot": boot}


def is_here(record: Mapping[str, Any]) -> bool:
    """Return True if the process of a record was in the process table of this machine, or container, since its boot."""
    return all(record[key] == value for key, value in _place().items())


def _started(pid: int) -> float:
    """Return when a process started, in clock ticks since boot; 0 if it has ended."""
    try:
        # After the name in brackets, which may contain anything: the state, and 19 fields later the start (proc(5)).
        fields = Path(f"/proc/{int(pid)}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return 0.0 if fields[0] in "ZX" else float(fields[19])
    except (OSError, IndexError, ValueError):
        return _started_elsewhere(pid) if not os.path.isdir("/proc/self") else 0.0


def _started_elsewhere(pid: int) -> float:
    """Return the same on systems without `/proc`, in seconds since the epoch."""
    import psutil

    try:
        process = psutil.Process(pid)
        return 0.0 if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return 0.0
