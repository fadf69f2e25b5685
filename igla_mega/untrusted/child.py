"""Run a library on a file of anybody: first in a child process with limits, then with its panics turned into errors."""

import contextlib
import faulthandler
import gc
import os
import resource
import select
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from igla_mega.config.errors import ConfigError
from igla_mega.config.files import regular

WAITING = 20
"""Seconds that a child may take for each second of its processor time, on a machine with other work."""
_MOST_TEXT = 1 << 16
_FAILED, _DONE = b"\0refused\0", b"\0done\0"
"""Marks in what the child says: after the first follows the text of a ConfigError; the second is its end."""
_PARALLELISM = "TOKENIZERS_PARALLELISM"


def attempt(task: Callable[[], object], *, seconds: int, megabytes: int) -> str | None:
    """Run a task in a forked child; return what went wrong there, or None.

    Whatever the task does to its process (endless loops, memory, a crash in native code) ends with the child.

    Args:
        seconds: maximum processor time. It may wait `WAITING` times as long for others.
        megabytes: maximum memory in MiB, in addition to that of this process.

    Raises:
        ConfigError: the task raised it; with the same text.
    """
    read_end, write_end = os.pipe()
    with _forkable():
        child = os.fork()
    if child == 0:
        _run(task, write_end, seconds, megabytes)
    os.close(write_end)
    try:
        said, late = _listen(read_end, WAITING * seconds)
    finally:
        os.close(read_end)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)  # of no effect on one that has ended
        with contextlib.suppress(ChildProcessError):  # where SIGCHLD is ignored
            status = os.waitpid(child, 0)[1]
    if said.endswith(_DONE):
        refusal = said.rpartition(_FAILED)[2].removesuffix(_DONE).decode(errors="replace")
        if _FAILED in said:
            raise ConfigError(*refusal.split("\0"))
        return None
    text = said.decode(errors="replace")
    if late:
        return f"took more than {WAITING * seconds} s"
    if any(word in text for word in ("memory allocation of", "MemoryError", "bad_alloc")):
        return f"took more than {megabytes:,} MiB of memory"
    if "panicked at" in text:
        return f"panicked: {panic_of(text)}"
    # The limit of processor time ends a process by SIGXCPU, and one that ignores that by SIGKILL.
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if number in (signal.SIGXCPU, signal.SIGKILL):
        return f"took more than {seconds} s of processor time"
    return f"crashed ({signal.Signals(number).name if number else 'exit ' + str(os.waitstatus_to_exitcode(status))})"


def panic_of(text: str) -> str:
    """Return the message of a Rust panic from what it prints."""
    lines = [line.strip() for line in text.partition("panicked at")[2].splitlines()[1:]]
    return next((line for line in lines if line and not line.startswith("note:")), "no message")[:200]


@contextlib.contextmanager
def _forkable() -> Iterator[None]:
    """Keep the tokenizers library from warning about a fork, and from using threads in the child."""
    before = os.environ.get(_PARALLELISM)
    os.environ[_PARALLELISM] = "false"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads at a fork
            yield
    finally:
        if before is None:
            del os.environ[_PARALLELISM]
        else:
            os.environ[_PARALLELISM] = before


def _run(task: Callable[[], object], write_end: int, seconds: int, megabytes: int) -> NoReturn:
    """Run the task in the child, which ends here: nothing of the parent's may be cleaned up or written twice."""
    try:
        gc.disable()
        faulthandler.disable()  # it would print a crash on the parent's terminal
        os.environ[_PARALLELISM] = "false"
        # What native code prints before it aborts is the only reason it gives.
        for stream in (1, 2):
            os.dup2(write_end, stream)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
        _limit_memory(megabytes)
        task()
        os.write(write_end, _DONE)
    except ConfigError as error:
        os.write(write_end, _FAILED + "\0".join(error.breaches).encode(errors="replace")[:_MOST_TEXT] + _DONE)
    except BaseException as error:
        os.write(write_end, f"\n{type(error).__name__}: panicked at\n{error}\n".encode(errors="replace")[:_MOST_TEXT])
    finally:
        os._exit(0)


def _limit_memory(megabytes: int) -> None:
    """Limit the memory that this process can write, not its addresses, of which malloc reserves more than it uses."""
    with contextlib.suppress(OSError, ValueError):  # no /proc, or a lower limit is set already
        with open("/proc/self/statm", opener=regular) as statm:
            taken = int(statm.read().split()[5]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_DATA, (taken + (megabytes << 20),) * 2)


def _listen(read_end: int, seconds: float) -> tuple[bytes, bool]:
    """Return what the child says until it ends, at most its last part, and True if it was still running at the end."""
    end, said = time.monotonic() + seconds, b""
    while (left := end - time.monotonic()) > 0:
        if not select.select([read_end], [], [], left)[0]:
            break
        if not (piece := os.read(read_end, 1 << 16)):
            return said, False
        said = (said + piece)[-2 * _MOST_TEXT :]
    return said, True


class no_panic:
    """Context in which a panic of a library in Rust, which is no Exception, becomes a ConfigError."""

    __slots__ = ("_place",)

    def __init__(self, place: str | Path):
        self._place = place

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        # Each library has its own PanicException, which cannot be imported; other failures are plain Exceptions.
        if kind is not None and (kind is Exception or kind.__name__ == "PanicException"):
            raise ConfigError(
                f"{self._place}: the tokenizer fails on a text ({str(error)[:200]}).\n"
                "  Use another tokenizer, or save it again."
            ) from None
