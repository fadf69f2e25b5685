"""What lets a killed preparation go on: a lock that says who writes, and a journal of what is finished."""

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


class Lock:
    """Held by one process at a time; ends with the process, however that ends."""

    def __init__(self, prefix: str | Path, patience_seconds: float = 0.0):
        """
        Args:
            patience_seconds: how long to wait for another process.

        Raises:
            ConfigError: another process holds it; says which.
        """
        end = time.monotonic() + patience_seconds
        self.path = Path(f"{prefix}.lock")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            self._stream = open(self.path, "a+", encoding="utf-8")  # noqa: SIM115 (closed when released)
            try:
                fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < end:
                    self._stream.close()
                    time.sleep(0.1)
                    continue
                self._stream.seek(0)
                who = self._stream.read().strip() or "another process"
                self._stream.close()
                raise ConfigError(
                    f"{prefix}: another process is writing this dataset ({who}).\n  Wait for it, or write elsewhere."
                ) from None
            # Between open and lock its holder may have finished, and have removed this very file.
            if self.path.exists() and os.path.samestat(os.fstat(self._stream.fileno()), os.stat(self.path)):
                break
            self._stream.close()
        self._stream.truncate(0)
        self._stream.write(f"process {os.getpid()} of {_user()} on {socket.gethostname()}, since {time.ctime()}\n")
        self._stream.flush()

    def release(self) -> None:
        self.path.unlink(missing_ok=True)
        self._stream.close()

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without a name for its user
        return str(os.getuid())


class Journal:
    """Lines of JSON, each with its checksum: of which the last ones may be torn, and are then not there."""

    def __init__(self, path: str | Path, job: str, continues: str | None = None):
        """
        Args:
            job: digest of what is being made; a journal of another job is started anew.
            continues: another job whose finished shards are also this one's.
        """
        self.path = Path(path)
        self.entries = self._read(job, continues)
        if not self.entries:
            self.entries = [{"job": job}]
            self._write(b"")
            self._append(self.entries[0])

    @property
    def shards(self) -> list[dict[str, Any]]:
        """What is finished, in order."""
        return [entry for entry in self.entries if "documents" in entry]

    @property
    def finished(self) -> bool:
        """All is written; at most the names are not yet the final ones."""
        return bool(self.entries[-1].get("finished"))

    def add(self, entry: dict[str, Any]) -> None:
        """Append an entry; it is on the disk when this returns."""
        self._append(entry)
        self.entries.append(entry)

    def cut(self, shards: int) -> None:
        """Forget what comes behind the first `shards`."""
        self.entries = [self.entries[0], *self.shards[:shards]]
        self._write(b"".join(map(_line, self.entries)))

    def _read(self, job: str, continues: str | None) -> list[dict[str, Any]]:
        try:
            lines = self.path.read_bytes().split(b"\n")[:-1]
        except OSError:
            return []
        entries = []
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
        with open(self.path, "ab") as stream:
            stream.write(_line(entry))
            stream.flush()
            os.fsync(stream.fileno())

    def _write(self, content: bytes) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self.path, content)


def _line(entry: dict[str, Any]) -> bytes:
    text = json.dumps(entry, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file that is there whole, or as it was before."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)
