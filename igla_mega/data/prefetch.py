"""Assemble micro-batches ahead of their step in a background thread; defines the interface of both loaders."""

from collections.abc import Callable, Hashable, Iterator
from typing import Any, Protocol

from igla_mega.data.ahead import ahead
from igla_mega.data.micro_batch import MicroBatch

Make = Callable[[int, Any], Iterator[MicroBatch]]
"""Function from (step, batch shard of a rank) to the micro-batches of that step."""


class Loader(Protocol):
    """Source of micro-batches, step by step; requesting steps out of order discards what was prefetched."""

    def step(self, step: int, share: Any) -> Iterator[MicroBatch]: ...


class Prefetch:
    """Loader whose background thread runs a fixed number of micro-batches ahead, across steps."""

    def __init__(self, make: Make, depth: int):
        """Set up the loader; the thread starts at the first step.

        Args:
            depth: number of micro-batches ahead; 0 assembles each when it is requested.
        """
        self._make, self._depth = make, depth
        self._next: tuple[int, Hashable] | None = None
        self._stream: Iterator[tuple[MicroBatch, bool]] = iter(())

    def step(self, step: int, share: Any) -> Iterator[MicroBatch]:
        """Yield the micro-batches of a step, in order."""
        if self._depth == 0:
            yield from self._make(step, share)
            return
        if self._next != (step, share):
            self.close()
            self._stream = ahead(steps_from(self._make, step, share), self._depth)
        self._next = None
        for batch, is_last in self._stream:
            # Set before the yield: a consumer that counts its micro-batches never resumes the generator after the last.
            if is_last:
                self._next = step + 1, share
            yield batch
            if is_last:
                return

    def close(self) -> None:
        """Stop the thread."""
        close = getattr(self._stream, "close", None)
        if close is not None:
            close()


def steps_from(make: Make, step: int, share: Any) -> Iterator[tuple[MicroBatch, bool]]:
    """Yield (micro-batch, True if the last of its step) for this step and all following ones."""
    while True:
        held: MicroBatch | None = None
        failure: Exception | None = None
        batches = make(step, share)
        while failure is None:
            try:
                batch = next(batches, None)
            except Exception as error:  # raised only after the batch already held was delivered
                batch, failure = None, error
            if held is not None:
                yield held, batch is None and failure is None
            held = batch
            if batch is None:
                break
        if failure is not None:
            raise failure
        step += 1
