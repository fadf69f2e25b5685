"""Show the progress of a run: a bar with loss, rate and time left on a terminal, else a plain line at intervals."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from igla_mega.evaluate.bar import Lines

PLAIN_LINE_SECONDS = 10.0
"""Minimum time between two plain lines, in seconds."""


class Display:
    """Progress bar of the main rank; the other ranks have `Silent`."""

    def __init__(self, total_steps: int, step: int):
        self.console = Console(stderr=True)
        self._total, self._last_line, self._bar = total_steps, 0.0, None
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._bar.add_task("", total=total_steps, completed=step)
            self._bar.start()

    def step(self, step: int, loss: float, tokens_per_second: float, seconds_left: float) -> None:
        """Update the bar after a step, or print a line if it is due."""
        if self._bar is not None:
            text = f"loss {loss:.3f} · {tokens_per_second:,.0f} tok/s"
            self._bar.update(self._task, completed=step, description=text)
        elif time.monotonic() - self._last_line > PLAIN_LINE_SECONDS or step == self._total:
            self._last_line = time.monotonic()
            minutes, seconds = divmod(int(seconds_left), 60)
            left = f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
            self.say(f"step {step}/{self._total}  loss {loss:.3f}  {tokens_per_second:,.0f} tok/s  {left} left")

    @contextmanager
    def counting(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show a pass over `total` samples in addition to the steps; yields a function that counts samples up."""
        bar = self._bar
        if bar is None:
            lines = Lines(what, total, "samples", self.say)
            yield lines.advance
            lines.close()
            return
        task = bar.add_task(f"{what} of {total} samples", total=total)
        try:
            yield lambda count: bar.advance(task, count)
        finally:
            bar.remove_task(task)

    def say(self, text: str) -> None:
        """Print a line without disturbing the bar."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Stop updating the bar, and leave it on the screen."""
        if self._bar is not None:
            self._bar.stop()


class Silent:
    """Display of every rank but the main one: it shows nothing."""

    def step(self, *_) -> None: ...

    @contextmanager
    def counting(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        yield lambda count: None

    def say(self, text: str) -> None: ...

    def close(self) -> None: ...
