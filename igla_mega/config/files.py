"""Open files of a fixed name in folders that others may write to."""

import os
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
