"""What a child process says of its end, and what it leaves behind in this one."""

import os
import signal
import sys
import threading

import psutil
import pytest

from igla_mega.config.errors import ConfigError
from igla_mega.untrusted.child import attempt, no_panic


class PanicException(BaseException):
    """As each Rust library defines its own."""


def panic():
    raise PanicException("index out of bounds")


def fill():
    return [bytearray(1 << 24) for _ in range(1000)]


def spin():
    while True:
        pass


def wait():
    threading.Event().wait()


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        (lambda: None, None),
        (lambda: os.write(1, b"not seen"), None),
        (spin, "took more than 1 s of processor time"),
        (fill, "took more than 64 MiB of memory"),
        (panic, "panicked: index out of bounds"),
        (os.abort, "crashed (SIGABRT)"),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), "crashed (SIGSEGV)"),
        (lambda: os._exit(3), "crashed (exit 3)"),
        (lambda: sys.exit(0), "panicked: 0"),
    ],
)
def test_the_end_of_a_child_is_said(task, reason, capfd):
    before, children = dict(os.environ), psutil.Process().children()
    assert attempt(task, seconds=1, megabytes=64) == reason
    assert dict(os.environ) == before
    assert capfd.readouterr() == ("", "")
    assert psutil.Process().children() == children, "neither running nor waiting for its parent"


def test_a_child_that_waits_is_ended(monkeypatch):
    from igla_mega.untrusted import child

    monkeypatch.setattr(child, "WAITING", 1)
    assert attempt(wait, seconds=1, megabytes=64) == "took more than 1 s"


def test_a_refusal_of_the_child_is_raised_here_with_its_breaches():
    def refuse():
        raise ConfigError("a.json: wrong.\n  Repair it.", "b: äöü")

    with pytest.raises(ConfigError) as error:
        attempt(refuse, seconds=1, megabytes=64)
    assert error.value.breaches == ["a.json: wrong.\n  Repair it.", "b: äöü"]


def test_a_child_tells_what_it_wrote_before_it_crashed_in_bounded_memory():
    def talk():
        os.write(2, b"x" * (1 << 22))
        os.write(2, b"thread panicked at src/lib.rs:1:\nout of range\nnote: run with RUST_BACKTRACE\n")
        os.abort()

    assert attempt(talk, seconds=2, megabytes=64) == "panicked: out of range"


def test_only_a_panic_and_a_plain_exception_become_errors_of_a_tokenizer():
    for error in (PanicException("x"), Exception("x")):
        with pytest.raises(ConfigError, match=r"tok: the tokenizer fails on a text \(x\)"), no_panic("tok"):
            raise error
    for error in (KeyboardInterrupt(), ValueError("x"), MemoryError()):
        with pytest.raises(type(error)), no_panic("tok"):
            raise error
