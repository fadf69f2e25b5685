"""Report the progress of a preparation: a bar on a terminal, a line every ten seconds elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[int, int], None]
"""Function to call with the bytes and tokens processed since the last call."""


@contextmanager
def progress(label: str, total_bytes: int, wanted: bool, done_bytes: int = 0) -> Iterator[Advance]:
    """Yield a function that reports newly processed bytes and tokens.

    Args:
        wanted: False to report nothing.
        done_bytes: part of `total_bytes` that an earlier run has processed.
    """
    if wanted and sys.stderr.isatty():
        with _bar(label, total_bytes, done_bytes) as advance:
            yield advance
    else:
        yield _Lines(label, total_bytes, done_bytes).advance if wanted else lambda _bytes, _tokens: None


@contextmanager
def _bar(label: str, total_bytes: int, done_bytes: int) -> Iterator[Advance]:
    """Show a bar while the context is open."""
    # Imported late: importing rich takes as long as preparing a small corpus.
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("{task.fields[tokens]:,} tokens"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total_bytes, completed=done_bytes, tokens=0)
        done_tokens = 0

        def advance(num_bytes: int, num_tokens: int) -> None:
            nonlocal done_tokens
            done_tokens += num_tokens
            bar.update(task, advance=num_bytes, tokens=done_tokens)

        yield advance


class _Lines:
    """Progress as lines, for logs."""

    def __init__(self, label: str, total_bytes: int, done_bytes: int):
        self.label, self.total_bytes = label, total_bytes
        self.began = self.reported = time.monotonic()
        # Bytes of an earlier run are kept apart: they must not count toward this run's rate.
        self.before = self.done_bytes = done_bytes
        self.done_tokens = 0

    def advance(self, num_bytes: int, num_tokens: int) -> None:
        """Count, and print a line if the last one is ten seconds old."""
        self.done_bytes += num_bytes
        self.done_tokens += num_tokens
        now = time.monotonic()
        if now - self.reported >= 10:
            self.reported = now
            rate = max(self.done_bytes - self.before, 1) / (now - self.began)
            say(
                f"{self.label}: {self.done_bytes / self.total_bytes:.0%}, {rate / 1e6:.1f} MB/s,"
                f" {self.done_tokens:,} tokens, {(self.total_bytes - self.done_bytes) / rate:.0f} s left"
            )


def say(line: str) -> None:
    """Print a line to stderr."""
    print(line, file=sys.stderr, flush=True)
