"""Files of JSON lines that survive a kill, a full disk and a power cut, and say what they have lost."""

import contextlib
import json
import os
import threading
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from igla_mega.config import json_text
from igla_mega.config.files import naming, no_follow, read_bytes, replace_durably


def rewind(path: Path, step: int | None) -> list[str]:
    """Remove the entries that a killed run wrote after its last checkpoint, and what is not a line of JSON.

    A kill or a full disk leaves an incomplete last line, a power cut blocks of NUL bytes, also in the middle of a file.
    A file without either is not written.

    Args:
        step: of the checkpoint; None to keep the entries of all steps.

    Returns:
        A message about lines that could not be read; none if every line could.
    """
    if not path.exists():
        return []
    content, kept, damaged = read_bytes(path, most=1 << 40), [], 0
    for line, entry in _lines(content):
        if entry is None:
            damaged += 1
        elif step is None or entry.get("step", 0) <= step:
            kept.append(line + b"\n")
    if (new := b"".join(kept)) != content:
        temporary = path.with_name(f".{path.name}")
        with open(temporary, "wb", opener=no_follow) as stream:
            stream.write(new)
            stream.flush()
            os.fsync(stream.fileno())
        # Renamed over the file, so that a kill in between loses nothing.
        replace_durably(temporary, path)
    if not damaged:
        return []
    lines = "1 line that was" if damaged == 1 else f"{damaged:,} lines that were"
    return [f"{path.name}: removed {lines} incomplete or not JSON, as a kill, a full disk or a power cut leaves them"]


def _lines(content: bytes) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Yield the lines of a file, each with its entry; None for what is not an object with a number for its step.

    NUL bytes are a block of the file that was never written: what is whole on either side of it is kept.
    """
    for line in content.split(b"\n"):
        found = [(part, _entry(part)) for part in line.split(b"\0") if part.strip()]
        yield from (one for one in found if one[1] is not None)
        if b"\0" in line or any(entry is None for _, entry in found):
            yield line, None


def _entry(line: bytes) -> dict[str, Any] | None:
    """Return the object of a line, if it is one, and its step, if it has one, is a number."""
    try:
        entry = json_text.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and type(entry.get("step", 0)) in (int, float) else None


def missing_steps(run_dir: Path, last: int, skipped: Collection[int]) -> Iterator[str]:
    """Yield for each file the steps up to `last` that have no line although they were taken.

    A run that continues in a new folder begins with a later step: only steps after the first line are expected, unless
    there is none at all.
    """
    for name, of_step, unlogged in (("metrics", "loss", skipped), ("ledger", "sources", ())):
        path = run_dir / f"{name}.jsonl"
        entries = [entry for _, entry in _lines(read_bytes(path, most=1 << 40)) if entry] if path.exists() else []
        taken = {entry.get("step") for entry in entries if of_step in entry}
        first = min((step for step in taken if isinstance(step, int)), default=1)
        if missing := [step for step in range(first, last + 1) if step not in taken and step not in unlogged]:
            text = ranges(missing)
            yield f"{path.name} has no line of step {text if len(text) < 200 else f'{text[:200]} ...'}"


def ranges(numbers: Iterable[int]) -> str:
    """Return ranks or steps as text, consecutive ones joined: `0 to 3, 7`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


class Lines:
    """Appends lines of JSON to a file; lines that cannot be written are kept in memory and written before the next."""

    def __init__(self, path: Path):
        self._path, self._waiting = path, b""
        self._descriptor: int | None = None
        self._lock = threading.Lock()

    def add(self, entry: dict[str, Any]) -> None:
        """Write a line, or keep it for the next call if it cannot be written."""
        with self._lock:
            self._waiting += (json.dumps(entry) + "\n").encode()
            # A full disk may accept part of a line: the rest follows at the next call.
            with contextlib.suppress(OSError):
                self._write()

    def sync(self) -> None:
        """Flush all lines to the disk; from any thread.

        Raises:
            OSError: the file cannot be written.
        """
        with self._lock, naming(self._path):
            if self._descriptor is None and not self._waiting:
                return
            self._write()
            descriptor = os.dup(self._opened())
        # Not under the lock: the next step may add its line while the disk works.
        try:
            with naming(self._path):
                os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Write the lines that wait, if the disk takes them now, and close the file."""
        with self._lock:
            if self._waiting:
                with contextlib.suppress(OSError):
                    self._write()
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None

    def _write(self) -> None:
        """Write the lines that wait."""
        descriptor = self._opened()
        while self._waiting:
            self._waiting = self._waiting[os.write(descriptor, self._waiting) :]

    def _opened(self) -> int:
        """Return the descriptor of the file, opening it first; terminate an incomplete last line."""
        if self._descriptor is None:
            self._descriptor = no_follow(str(self._path), os.O_RDWR | os.O_CREAT | os.O_APPEND)
            size = os.fstat(self._descriptor).st_size
            if size and os.pread(self._descriptor, 1, size - 1) != b"\n":  # a killed run's half-written line
                self._waiting = b"\n" + self._waiting
        return self._descriptor
