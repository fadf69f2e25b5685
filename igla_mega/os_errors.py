"""Put errors of the operating system into words: the file, the reason, and what to do."""

import errno
import io
import os
import re
import traceback
from typing import Any

_WAYS_OUT = {
    (errno.ENOSPC,): "Free some space on that disk (see `df -h` and `df -i`), or give a path on another one.",
    (errno.EDQUOT,): "Your quota of that disk is used up: delete files there, or give a path on another one.",
    (errno.EFBIG,): "Raise the limit of a file's size (`ulimit -f`), or give a path on another file system.",
    (errno.EACCES, errno.EPERM): "Change its permissions, or give another path.",
    (errno.EROFS,): "That file system is mounted read-only: mount it for writing, or give another path.",
    (errno.EMFILE, errno.ENFILE): "Raise the limit of open files (`ulimit -n`).",
    (errno.ENAMETOOLONG,): "Give a shorter name or path.",
    (errno.ENOENT,): "Correct the path.",
    (errno.EEXIST, errno.ENOTEMPTY, errno.EBUSY): "Move away what is there, or give another path.",
    (errno.ENOTDIR,): "Part of this path is a file, not a folder: move that file away, or give another path.",
    (errno.EISDIR,): "It is a folder where a file is expected: move it away, or give another path.",
    (errno.ELOOP,): "It is a symbolic link, which is not followed here, or links form a circle: remove the link.",
}
_CHECK_DISK = "Check the disk or the mount (`dmesg`, `df`), then run the same command again."
"""Way out of every other error of a file: EIO, ESTALE, ENODEV and the like."""
_OF_FILES = {code for codes in _WAYS_OUT for code in codes} - {errno.EMFILE, errno.ENFILE} | {errno.EIO, errno.ESTALE}
"""Errors that are of a file and of nothing else."""


def words_of(error: BaseException, where: str | None = None) -> str | None:
    """Return an error of the operating system as a message: the file, the reason, and what to do.

    An error without a file, such as one of a socket, is returned in its own words.

    Args:
        where: file to name if the error knows none, such as one of a worker process.

    Returns:
        None if it is no such error. An error of a library in Rust is one by its text, "... (os error 28)". Empty if the
        reader of the standard output has closed it, as `| head` does.
    """
    code = _code_of(error)
    if code is None and not isinstance(error, OSError):
        return None
    frames = traceback.extract_tb(error.__traceback__)
    printing = bool(frames) and (frames[-1].line or "").startswith("print(")
    if printing and code == errno.EPIPE:
        return ""
    file = "standard output" if printing else _file_of(error) or where
    if file is None:
        # Of Python's tempfile; its error lists the folders that it tried.
        no_folder = "No usable temporary directory" in str(error)
        return (
            f"{error}.\n  Free some space there, or set TMPDIR to a folder on another disk."
            if no_folder
            else str(error)
        )
    reason = (code and os.strerror(code)) or (str(error).splitlines() or [type(error).__name__])[0]
    remedy = next((way for codes, way in _WAYS_OUT.items() if code in codes), _CHECK_DISK)
    return f"{file}: {reason[:1].lower()}{reason[1:]}.\n  {remedy}"


def _code_of(error: BaseException) -> int | None:
    """Return the number of an error of the operating system; None if it has none."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def _file_of(error: BaseException | None) -> str | None:
    """Return the file of an error or, if it has none, of the error that it follows from; None if no file is known.

    The system names no file where a write, a flush or a close fails: it is the one that the innermost function holds.
    """
    if error is None:
        return None
    if isinstance(error, OSError) and isinstance(error.filename, str | bytes | os.PathLike):
        # A copy or a rename names two: the second is the one that is written, unless the first does not exist.
        second = error.filename2 if error.errno != errno.ENOENT else None
        return os.fsdecode(second if isinstance(second, str | bytes) else error.filename)
    frames = [frame for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__)))]
    if _code_of(error) not in _OF_FILES:
        # It may be an error of a connection, and an outer function holds files that have nothing to do with it.
        frames = frames[:1]
    held = (_held_file(frame.f_locals, paths=not isinstance(error, OSError)) for frame in frames)
    return next(filter(None, held), None) or _file_of(error.__cause__ or error.__context__)


def _held_file(names: dict[str, Any], *, paths: bool) -> str | None:
    """Return the file that a function has open, itself or as an attribute of its object; one to write comes first.

    Args:
        names: the function's variables.
        paths: True to take a path too: libraries in Rust hold their files out of sight.
    """
    held = [*names.values(), *getattr(names.get("self"), "__dict__", {}).values()]
    files = [one for one in held if isinstance(one, io.IOBase) and isinstance(getattr(one, "name", None), str)]
    written = [one for one in files if set(str(getattr(one, "mode", ""))) & set("wax+")]
    if written or files:
        return str(getattr((written or files)[0], "name"))  # noqa: B009 (not all of them have it)
    return next((os.fsdecode(one) for one in held if paths and isinstance(one, os.PathLike)), None)
