"""Read a JSONL file while another process appends to it."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from igla_mega.config.files import regular

MAX_LINE_BYTES = 1 << 24
"""Maximum length of a line; a longer one is skipped without being kept in memory."""
BLOCK_BYTES = 1 << 22
"""Number of bytes read at once."""


class Lines:
    """Reader of a JSONL file that continues where the last read stopped.

    A last line without a line end is still being written, and is left for the next read. Lines that are not JSON
    objects are skipped and counted.
    """

    def __init__(self, path: Path):
        self.path = path
        self.offset = 0
        self.number = 0
        self.broken: list[tuple[int, str]] = []
        self.num_broken = 0
        self._inode: int | None = None
        self._tail = b""
        self._skipping = False

    def replaced(self) -> bool:
        """Return True if the file was replaced or became shorter: a resumed run rewrites its files."""
        try:
            found = os.stat(self.path)
        except OSError:
            return self.offset > 0
        return self._inode is not None and (found.st_ino != self._inode or found.st_size < self.offset)

    def new(self) -> Iterator[dict[str, Any]]:
        """Yield the objects appended since the last call."""
        try:
            file = open(self.path, "rb", opener=regular)  # noqa: SIM115 (closed by `with` below)
        except OSError as error:
            if not isinstance(error, FileNotFoundError) and not self.num_broken:
                self._break(str(error.strerror))
            return
        with file:
            self._inode = os.fstat(file.fileno()).st_ino
            file.seek(self.offset)
            while block := file.read(BLOCK_BYTES):
                self.offset += len(block)
                # The tail of the previous block belongs to the first line of this one.
                *whole, rest = block.split(b"\n")
                if whole:
                    whole[0] = self._tail + whole[0]
                    self._tail = rest
                elif not self._skipping:
                    self._tail += rest
                for line in whole:
                    yield from self._parse(line)
                if len(self._tail) > MAX_LINE_BYTES:
                    self._tail, self._skipping = b"", True

    @property
    def half_written(self) -> bool:
        """True if the last line has no line end."""
        return bool(self._tail.strip()) or self._skipping

    def _parse(self, line: bytes) -> Iterator[dict[str, Any]]:
        """Yield the object of a complete line, or count the line as broken."""
        self.number += 1
        if self._skipping:
            self._skipping = False
            self._break(f"longer than {MAX_LINE_BYTES >> 20} MiB")
            return
        if not line.strip():
            return
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            self._break("not JSON")
            return
        if isinstance(entry, dict):
            yield entry
        else:
            self._break("not an object")

    def _break(self, why: str) -> None:
        self.num_broken += 1
        if len(self.broken) < 5:
            self.broken.append((self.number, why))

    def refuse(self, why: str) -> None:
        """Count the line that was just read as broken."""
        self._break(why)

    def problems(self) -> Iterator[str]:
        """Yield a sentence for each kind of unreadable line."""
        name = self.path.name
        if self.num_broken:
            first = ", ".join(f"line {number} ({why})" for number, why in self.broken)
            more = ", ..." if self.num_broken > len(self.broken) else ""
            lines = "1 line is" if self.num_broken == 1 else f"{self.num_broken:,} lines are"
            yield f"{name}: {lines} skipped: {first}{more}."
        if self.half_written:
            yield f"{name}: the last line is incomplete and was skipped."
