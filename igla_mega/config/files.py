"""Open files in shared folders and at paths that somebody gave, and replace files durably."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from igla_mega.config.errors import ConfigError

MOST_BYTES = 1 << 28
"""Maximum size of a file that is read whole: settings, notes, tokenizers; corpora and weights are read in pieces."""
_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
    stat.S_IFSOCK: "a socket",
}


class NotReadable(ConfigError, OSError):
    """Error for a path that leads to no regular file, or to one that is too large to be what it should be."""

    def __init__(self, path: str | Path, fact: str):
        super().__init__(f"{path}: {fact}.")
        self.errno = errno.EISDIR if fact.startswith("a folder") else errno.EINVAL
        self.strerror, self.filename = fact, str(path)

    def __str__(self) -> str:
        return str(self.args[0])


def no_follow(path: str, flags: int) -> int:
    """Open a file to write for `open(..., opener=no_follow)`; refuse a symbolic link or a FIFO in its place.

    In a shared run folder somebody could plant `.lock -> /home/victim/.bashrc` before the run starts.

    Raises:
        NotReadable: the path is a FIFO, a device, a socket or a folder.
        OSError: the path is a symbolic link (ELOOP), or as for `os.open`.
    """
    return _opened(path, flags | os.O_NOFOLLOW)


def regular(path: str | Path, flags: int = os.O_RDONLY) -> int:
    """Open a file to read for `open(..., opener=regular)`; refuse anything but a regular file.

    Opening a FIFO waits for a writer, a device may do anything, and `/dev/zero` has no end.

    Raises:
        NotReadable: the path leads to a FIFO, a device, a socket or a folder.
        OSError: as for `os.open`.
    """
    try:
        return _opened(path, flags)
    except OSError as error:
        if error.errno != errno.ELOOP or flags & os.O_NOFOLLOW:
            raise
        raise NotReadable(path, "a symbolic link to itself, not a regular file") from None


def _opened(path: str | Path, flags: int) -> int:
    """Open a regular file without waiting for the other end of a FIFO."""
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY, 0o666)
    except OSError as error:
        # A socket; a FIFO without a reader, or a folder, which was to be written.
        if error.errno not in (errno.ENXIO, errno.EISDIR):
            raise
        raise NotReadable(path, _what(os.stat(path).st_mode)) from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise NotReadable(path, _what(mode))
    os.set_blocking(descriptor, True)
    return descriptor


def _what(mode: int) -> str:
    """Return what is at a path instead of a file."""
    return f"{_KINDS.get(stat.S_IFMT(mode), 'something')}, not a regular file"


def refuse_special(path: str | Path) -> None:
    """Refuse anything but a regular file, before a library opens the path itself.

    Raises:
        NotReadable: the path leads to a FIFO, a device, a socket or a folder.
        OSError: there is nothing, or it may not be read.
    """
    os.close(regular(path))


def read_bytes(path: str | Path, most: int = MOST_BYTES) -> bytes:
    """Return the content of a regular file.

    Raises:
        NotReadable: the path leads to no regular file, or to one of more than `most` bytes.
        OSError: as for `open`.
    """
    with open(path, "rb", opener=regular) as stream:
        size = os.fstat(stream.fileno()).st_size
        content = stream.read(size + 1) if size <= most else b""
        # More than `size` where the file grows, and of files of /proc, which have no size.
        while size <= most and len(content) > size and (piece := stream.read(1 << 16)):
            content, size = content + piece, len(content) + len(piece) - 1
    if size > most or len(content) > most:
        raise NotReadable(path, f"more than {most:,} bytes, too large for a file of this kind")
    return content


def read_text(path: str | Path, errors: str = "strict", most: int = MOST_BYTES) -> str:
    """Return the text of a regular file in UTF-8, with the line ends that `open` would give.

    Raises:
        NotReadable, OSError: as for `read_bytes`.
        UnicodeDecodeError: it is not UTF-8.
    """
    text = read_bytes(path, most).decode("utf-8", errors)
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, replacing its content; refuse a symbolic link in its place.

    Raises:
        OSError: as for `no_follow`.
    """
    with open(path, "w", encoding="utf-8", opener=no_follow) as stream:
        stream.write(text)


def replace_durably(temporary: Path, final: Path) -> None:
    """Give a file, already flushed, its final name, and flush the folder: the new content survives a power cut."""
    os.replace(temporary, final)
    sync_folder(final.parent)


def sync_folder(folder: str | Path) -> None:
    """Flush a folder's entries to the disk: without it, a new name may be lost in a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with naming(folder):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Name a file in the errors of calls that know only its descriptor or, in other libraries, no file at all."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
