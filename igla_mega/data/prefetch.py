"""Micro-batches put together ahead of their step: the one interface of both loaders."""

from collections.abc import Callable, Hashable, Iterator
from typing import Any, Protocol

from igla_mega.data.ahead import ahead
from igla_mega.data.micro_batch import MicroBatch

Make = Callable[[int, Any], Iterator[MicroBatch]]
"""Of a step and a rank's share, its micro-batches."""


class Loader(Protocol):
    """Gives the micro-batches of one step after another; any other order costs what was put together ahead."""

    def step(self, step: int, share: Any) -> Iterator[MicroBatch]: ...


class Prefetch:
    """A thread that stays some micro-batches ahead, across steps."""

    def __init__(self, make: Make, depth: int):
        """
        Args:
            depth: micro-batches ahead; 0 makes each when it is asked for.
        """
        self._make, self._depth = make, depth
        self._next: tuple[int, Hashable] | None = None
        self._stream: Iterator[tuple[MicroBatch, bool]] = iter(())

    def step(self, step: int, share: Any) -> Iterator[MicroBatch]:
        """The micro-batches of a step, in order."""
        if self._depth == 0:
            yield from self._make(step, share)
            return
        if self._next != (step, share):
            self.close()
            self._stream = ahead(steps_from(self._make, step, share), self._depth)
        self._next = None
        for batch, is_last in self._stream:
            if is_last:  # known before it is used: who knows how many there are does not ask for one more
                self._next = step + 1, share
            yield batch
            if is_last:
                return

    def close(self) -> None:
        """Let the thread end."""
        close = getattr(self._stream, "close", None)
        if close is not None:
            close()


def steps_from(make: Make, step: int, share: Any) -> Iterator[tuple[MicroBatch, bool]]:
    """The micro-batches of this step and all that follow, each with whether it is its step's last."""
    while True:
        held: MicroBatch | None = None
        failure: Exception | None = None
        batches = make(step, share)
        while failure is None:
            try:
                batch = next(batches, None)
            except Exception as error:  # raised behind the batch that is held
                batch, failure = None, error
            if held is not None:
                yield held, batch is None and failure is None
            held = batch
            if batch is None:
                break
        if failure is not None:
            raise failure
        step += 1
