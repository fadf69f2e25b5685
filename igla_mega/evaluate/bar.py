"""Show how far a count is: a bar on a terminal, elsewhere plain lines with count, rate and time."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LINE_SECONDS = 10.0
"""Minimum time between two plain lines, in seconds. The last line is printed in any case."""


class Lines:
    """Progress as plain lines, for logs."""

    def __init__(self, what: str, total: int, unit: str, say: Callable[[str], None]):
        self._what, self._total, self._unit, self._say = what, total, unit, say
        self._done, self._began = 0, time.monotonic()
        self._reported = self._began

    def advance(self, count: int) -> None:
        """Count, and print a line if the last one is old enough."""
        self._done += count
        if time.monotonic() - self._reported >= LINE_SECONDS and self._done < self._total:
            self._reported = time.monotonic()
            self._say(f"{self._line()}, {(self._total - self._done) / self._rate():.0f} s left")

    def close(self) -> None:
        """Print the last line."""
        self._say(self._line())

    def _rate(self) -> float:
        """Return the count per second so far."""
        return max(self._done, 1) / max(time.monotonic() - self._began, 1e-3)

    def _line(self) -> str:
        seconds = time.monotonic() - self._began
        return (
            f"{self._what}: {self._done:,} of {self._total:,} {self._unit}, {self._rate():,.0f} {self._unit}/s, "
            f"{seconds:.1f} s"
        )


@contextmanager
def counting(what: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Yield a function that counts up to `total` on stderr."""
    if not sys.stderr.isatty():
        lines = Lines(what, total, unit, lambda line: print(line, file=sys.stderr, flush=True))
        yield lines.advance
        lines.close()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)
