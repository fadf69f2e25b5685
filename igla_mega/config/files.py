"""Open files of a fixed name in folders that others may write to, and replace files durably."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def no_follow(path: str, flags: int) -> int:
    """Open a file for `open(..., opener=no_follow)`; refuse a symbolic link in its place.

    In a shared run folder somebody could plant `.lock -> /home/victim/.bashrc` before the run starts.

    Raises:
        OSError: the path is a symbolic link (ELOOP), or as for `os.open`.
    """
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


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
