"""Make an interrupted preparation resumable: a lock with the name of its holder, and a journal of finished work."""

import fcntl
import getpass
import json
import os
import socket
import time
import zlib
from pathlib import Path
from typing import Any

from igla_mega.config import json_text
from igla_mega.config.errors import ConfigError
from igla_mega.config.files import no_follow, read_bytes, replace_durably


class Lock:
    """File lock held by one process at a time; the kernel releases it when the process ends, even if it is killed."""

    def __init__(self, prefix: str | Path, patience_seconds: float = 0.0):
        """Acquire `<prefix>.lock`.

        Args:
            patience_seconds: maximum time to wait for another process.

        Raises:
            ConfigError: another process, which the error names, holds the lock.
        """
        end = time.monotonic() + patience_seconds
        self.path = Path(f"{prefix}.lock")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            self._stream = open(self.path, "a+", encoding="utf-8", opener=no_follow)  # noqa: SIM115 (closed when released)
            try:
                fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < end:
                    self._stream.close()
                    time.sleep(0.1)
                    continue
                self._stream.seek(0)
                holder = self._stream.read().strip() or "another process"
                self._stream.close()
                raise ConfigError(
                    f"{prefix}: another process is writing this dataset ({holder}).\n  Wait for it, or write elsewhere."
                ) from None
            # Between `open` and `flock` the previous holder may have released the lock and removed this very file: a
            # lock on a removed file excludes no other process, so the file must still be the one at the path.
            if self.path.exists() and os.path.samestat(os.fstat(self._stream.fileno()), os.stat(self.path)):
                break
            self._stream.close()
        self._stream.truncate(0)
        self._stream.write(f"process {os.getpid()} of {_user()} on {socket.gethostname()}, since {time.ctime()}\n")
        self._stream.flush()

    def release(self) -> None:
        """Remove the lock file, then release the lock."""
        # In this order: removed after the release, it could be the file that another process has just locked.
        self.path.unlink(missing_ok=True)
        self._stream.close()

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _user() -> str:
    """Return the user's name, or its number if it has none."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose /etc/passwd does not list its user
        return str(os.getuid())


class Journal:
    """File of JSON lines, each with a checksum, so that lines torn by a crash are detected and dropped."""

    def __init__(self, path: str | Path, job: str, continues: str | None = None):
        """Open the journal of a job, or start an empty one.

        Args:
            job: digest of the inputs and options; a journal of another job is replaced.
            continues: digest of another job whose finished shards are also valid for this one.
        """
        self.path = Path(path)
        self.entries = self._read(job, continues)
        if not self.entries:
            self.entries = [{"job": job}]
            self._write(b"")
            self._append(self.entries[0])

    @property
    def shards(self) -> list[dict[str, Any]]:
        """Entries of the finished shards, in order."""
        return [entry for entry in self.entries if "documents" in entry]

    @property
    def finished(self) -> bool:
        """True if all data is written; only renaming the files to their final names may be outstanding."""
        return bool(self.entries[-1].get("finished"))

    def add(self, entry: dict[str, Any]) -> None:
        """Append an entry durably: it is on disk when this returns."""
        self._append(entry)
        self.entries.append(entry)

    def cut(self, shards: int) -> None:
        """Drop all entries after the first `shards` shards."""
        self.entries = [self.entries[0], *self.shards[:shards]]
        self._write(b"".join(map(_line, self.entries)))

    def _read(self, job: str, continues: str | None) -> list[dict[str, Any]]:
        """Return the valid entries of the file; none if it is missing or belongs to another job."""
        try:
            lines = read_bytes(self.path, most=1 << 40).split(b"\n")[:-1]
        except OSError:
            return []
        entries = []
        # The first bad checksum ends the reading: after a crash, what follows a torn line is not trustworthy.
        for line in lines:
            digest, _, text = line.partition(b" ")
            if digest != b"%08x" % zlib.crc32(text):
                break
            try:
                entry = json_text.loads(text)
            except ValueError:
                break
            if not isinstance(entry, dict):
                break
            entries.append(entry)
        if not entries or entries[0].get("job") not in (job, continues):
            return []
        entries[0] = {"job": job}
        self._write(b"".join(map(_line, entries)))
        return entries

    def _append(self, entry: dict[str, Any]) -> None:
        """Write one line and flush it to the disk."""
        with open(self.path, "ab", opener=no_follow) as stream:
            stream.write(_line(entry))
            stream.flush()
            os.fsync(stream.fileno())

    def _write(self, content: bytes) -> None:
        """Replace the whole file atomically."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self.path, content)


def _line(entry: dict[str, Any]) -> bytes:
    """Return the line of an entry: CRC-32 in hexadecimal, a space, JSON."""
    text = json.dumps(entry, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file atomically and durably: after a crash it has either its old or its new content."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb", opener=no_follow) as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    replace_durably(partial, path)
