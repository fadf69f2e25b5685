"""Write the state of a run as a file of Prometheus' text format, for node_exporter's textfile collector."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from igla_mega.config.files import read_text, write_text

EVERY_SECONDS = 5.0
"""Minimum time between two writes of the file, in seconds; an event is written at once."""
GAUGES = {
    "step": ("igla_mega_step", "Optimizer steps taken."),
    "loss": ("igla_mega_loss", "Training loss of the last step, nats per target token."),
    "tokens_per_second": ("igla_mega_tokens_per_second", "Throughput of the last step, all ranks together."),
    "mfu": ("igla_mega_mfu", "Model FLOP/s utilization of the last step, 0 to 1."),
    "saved_step": ("igla_mega_last_checkpoint_step", "Step of the last complete checkpoint."),
    "saved_time": ("igla_mega_last_checkpoint_timestamp_seconds", "Unix time of the last complete checkpoint."),
    "time": ("igla_mega_updated_timestamp_seconds", "Unix time of this file's last update."),
}
"""Value -> name of its metric, and its help text."""
STATES = ("running", "finished", "stopped", "failed")
_OF_EVENT = {"started": "running", "resumed": "running", "finished": "finished", "stopping": "stopped"}
_ALWAYS = frozenset((*_OF_EVENT, "saved", "failed", "hang"))


class TextFile:
    """File of gauges, replaced atomically so that the collector never reads a part of it."""

    def __init__(self, path: Path, run: str):
        self.path, self._run = path, run
        self._values: dict[str, float] = {}
        self._state, self._written = "running", 0.0

    def metrics(self, scalars: Mapping[str, float], step: int) -> None:
        """Take over the numbers of a step."""
        self._values |= {key: scalars[key] for key in GAUGES if isinstance(scalars.get(key), int | float)}
        self._values["step"] = step
        if time.monotonic() - self._written > EVERY_SECONDS:
            self.write()

    def event(self, entry: Mapping[str, Any]) -> None:
        """Take over the state and the last checkpoint from an event."""
        kind = entry["event"]
        if kind == "saved" and entry.get("where") == "shared":
            self._values |= {"saved_step": entry["step"], "saved_time": entry["time"]}
        self._state = _OF_EVENT.get(kind, "failed" if kind in ("failed", "hang") else self._state)
        if kind in _ALWAYS:
            self.write()

    def write(self) -> None:
        """Replace the file.

        Raises:
            OSError: it cannot be written.
        """
        self._written = time.monotonic()
        _replace(self.path, text_of(self._run, self._state, self._values | {"time": time.time()}))

    def close(self) -> None:
        """Write the last numbers."""
        self.write()


def text_of(run: str, state: str, values: Mapping[str, float]) -> str:
    """Return the text: a gauge for each value, and one for each state, which is 1 for the current one."""
    label = _label(run)
    lines = []
    for key, (name, words) in GAUGES.items():
        if key in values:
            lines += [
                f"# HELP {name} {words}",
                f"# TYPE {name} gauge",
                f'{name}{{run="{label}"}} {_number(values[key])}',
            ]
    return "\n".join([*lines, *_states(label, state)]) + "\n"


def mark_failed(path: Path, run: str) -> None:
    """Set the state in a file that a run has written, whose process could not; its numbers stay.

    Raises:
        OSError: there is no such file, or it cannot be replaced.
    """
    heads = ("igla_mega_state{", "# HELP igla_mega_state ", "# TYPE igla_mega_state ")
    lines = read_text(path, "replace").splitlines()
    lines = [line for line in lines if not line.startswith(heads)]
    _replace(path, "\n".join([*lines, *_states(_label(run), "failed")]) + "\n")


def _states(label: str, state: str) -> list[str]:
    """Return the gauges of the states, 1 for the current one."""
    head = ["# HELP igla_mega_state State of the run: 1 for the current one.", "# TYPE igla_mega_state gauge"]
    return head + [f'igla_mega_state{{run="{label}",state="{one}"}} {int(one == state)}' for one in STATES]


def _label(text: str) -> str:
    """Return a label value with the format's three escapes."""
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _replace(path: Path, text: str) -> None:
    """Replace a file atomically; the collector reads files that end in `.prom` only."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    write_text(temporary, text)
    os.replace(temporary, path)


def _number(value: float) -> str:
    """Return a number as the format writes it: NaN and infinities have names of their own."""
    if value != value:
        return "NaN"
    if value in (float("inf"), float("-inf")):
        return "+Inf" if value > 0 else "-Inf"
    return repr(value)
