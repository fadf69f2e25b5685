"""Read the files of a run folder, and follow them: each update reads only what was appended."""

import math
from array import array
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from igla_mega.monitor.heartbeat import words_of
from igla_mega.report.lines import Lines

FILES = ("metrics.jsonl", "events.jsonl", "samples.jsonl", "ledger.jsonl", "recipe.yaml")
"""Files of a run folder; a folder with none of them is not a run's."""

MAX_COLUMNS = 400
"""Maximum number of columns of a heat map; of a longer run, each column is the mean over equally many steps."""
MAX_SERIES, MAX_POINTS = 400, 4000
"""Maximum number of columns or series; points of a series, beyond which every other point is dropped."""
MAX_CELLS = 1 << 16
"""Maximum number of values in one table of an entry, such as layers x experts."""
MAX_EVENTS, MAX_SAMPLES, MAX_GRIDS, MAX_TEXT, MAX_NAME = 5000, 400, 100, 4000, 200
MAX_STEP = 1 << 48
HISTOGRAM_STEP = math.log(1.02)
"""Width of the histogram bins of step times, 2 % on a logarithmic scale: quantiles need not keep every time."""


class Heat:
    """Vectors over steps, one column a step; of a long run, each column is the mean over equally many steps."""

    def __init__(self, shape: tuple[int, ...]):
        self.shape = shape
        self.steps: list[float] = []
        self.columns: list[np.ndarray] = []
        self._size, self._held = 1, 0
        self._sum = np.zeros(sum(shape))

    def add(self, step: float, values: np.ndarray) -> None:
        """Add the values [rows] of a step; halves the resolution where there are too many columns."""
        self._sum = self._sum + values
        self._held += 1
        if self._held < self._size:
            return
        self.steps.append(step)
        self.columns.append((self._sum / self._held).astype(np.float32))
        self._sum, self._held = np.zeros_like(self._sum), 0
        if len(self.columns) >= 2 * MAX_COLUMNS:
            self.columns = [(a + b) / 2 for a, b in zip(self.columns[::2], self.columns[1::2], strict=True)]
            self.steps = self.steps[1::2]
            self._size *= 2

    def drawn(self) -> tuple[list[float], np.ndarray]:
        """Return the last step of each column, and the values [rows, columns], at most MAX_COLUMNS of them."""
        steps, columns = list(self.steps), list(self.columns)
        size = math.ceil(len(columns) / MAX_COLUMNS) or 1
        if size > 1:
            cuts = [slice(at, at + size) for at in range(0, len(columns), size)]
            columns = [np.mean(columns[cut], axis=0) for cut in cuts]
            steps = [steps[cut][-1] for cut in cuts]
        return steps, np.stack(columns, axis=1) if columns else np.zeros((sum(self.shape), 0), np.float32)


@dataclass
class Metrics:
    """metrics.jsonl as columns: a row is a training step; what is measured at intervals is a separate series."""

    steps: array = field(default_factory=lambda: array("d"))
    columns: dict[str, array] = field(default_factory=dict)
    series: dict[str, tuple[array, array]] = field(default_factory=dict)
    heats: dict[str, Heat] = field(default_factory=dict)
    stages: list[tuple[float, str]] = field(default_factory=list)
    matrix: dict[str, Any] | None = None
    needle: deque = field(default_factory=lambda: deque(maxlen=MAX_GRIDS))
    rank_times: list[Counter] = field(default_factory=list)
    slowest: Counter = field(default_factory=Counter)
    not_finite: list[float] = field(default_factory=list)
    taken_again: int = 0
    unkept: int = 0
    ordered: bool = True

    def add(self, entry: Mapping[str, Any]) -> str | None:
        """Add one entry of the file.

        Returns:
            Reason if the entry cannot be used; None if it was added.
        """
        step = step_of(entry)
        if step is None:
            return "no step"
        self._stage(step, entry.get("stage"))
        row = "loss" in entry
        for key, value in entry.items():
            if key in ("step", "stage"):
                continue
            key = key[:MAX_NAME]
            if row and (key == "loss" or isinstance(value, int | float)):
                self._cell(key, value)
            elif isinstance(value, dict):
                self._group(step, key, value)
            elif isinstance(value, list):
                self._table(step, key, value, entry)
            elif isinstance(value, int | float):
                self._point(key, step, value)
        if row:
            if self.steps and step <= self.steps[-1]:
                self.ordered = False
            self.steps.append(step)
            if number(entry["loss"]) is None and len(self.not_finite) < MAX_EVENTS:
                self.not_finite.append(step)
        return None

    def column(self, key: str) -> np.ndarray:
        """Return one value for each row, NaN where there is none."""
        held = self.columns.get(key, array("d"))
        return np.concatenate([np.array(held, np.float64), np.full(len(self.steps) - len(held), np.nan)])

    def put_in_order(self) -> bool:
        """Sort rows by step; of several rows of one step the last written one is kept.

        Returns:
            True if the order had to change.
        """
        if self.ordered:
            return False
        steps = np.array(self.steps)
        # np.unique returns the first occurrence: of the reversed array, that is the last written one.
        unique, index = np.unique(steps[::-1], return_index=True)
        rows = len(steps) - 1 - index
        columns = {key: self.column(key)[rows] for key in self.columns}
        self.taken_again += len(steps) - len(unique)
        self.steps = array("d", unique.tobytes())
        self.columns = {key: array("d", values.tobytes()) for key, values in columns.items()}
        for key, (at, values) in self.series.items():
            last = dict(zip(at, values, strict=True))
            self.series[key] = array("d", sorted(last)), array("d", (last[step] for step in sorted(last)))
        self.ordered = True
        return True

    def quantiles(self) -> list[list[float]]:
        """Return the 5, 25, 50, 75 and 95 % quantiles of each rank's step times, in seconds."""
        found = []
        for times in self.rank_times:
            bins = sorted(times)
            passed, total = np.cumsum([times[b] for b in bins]), sum(times.values())
            at = [bins[int(np.searchsorted(passed, q * total))] for q in (0.05, 0.25, 0.5, 0.75, 0.95)]
            found.append([math.exp((b + 0.5) * HISTOGRAM_STEP) for b in at])
        return found

    def _cell(self, key: str, value: Any) -> None:
        """Set a value of the current row; earlier rows without this key become NaN."""
        column = self.columns.get(key)
        if column is None:
            if len(self.columns) >= MAX_SERIES:
                self.unkept += 1
                return
            column = self.columns[key] = array("d")
        missing = len(self.steps) - len(column)
        if missing:
            column.extend([math.nan] * missing)
        found = number(value)
        column.append(math.nan if found is None else found)

    def _point(self, key: str, step: float, value: Any) -> None:
        """Append a point to a series; a second one of the same step replaces the first."""
        if (found := number(value)) is None:
            return
        if key not in self.series:
            if len(self.series) >= MAX_SERIES:
                self.unkept += 1
                return
            self.series[key] = array("d"), array("d")
        steps, values = self.series[key]
        if steps and steps[-1] == step:
            values[-1] = found
            return
        if steps and step < steps[-1]:
            self.ordered = False
        steps.append(step)
        values.append(found)
        if len(steps) > 2 * MAX_POINTS:
            self.series[key] = steps[1::2], values[1::2]

    def _group(self, step: float, key: str, group: Mapping[str, Any]) -> None:
        """Add the values of a nested object, each under the name `key/name`."""
        if key == "needle":
            if grid := needle_grid(group):
                self.needle.append({"step": step, **grid})
            return
        if key == "needle_exact":
            self._exact(step, needle_grid(group))
            return
        if key == "rank_step_seconds" and isinstance(slowest := group.get("slowest_rank"), int):
            if len(self.slowest) < MAX_CELLS:
                self.slowest[slowest] += 1
            group = {name: value for name, value in group.items() if name != "slowest_rank"}
        for name, value in group.items():
            if isinstance(value, list):
                self._heat(step, f"{key}/{name[:MAX_NAME]}", [value])
            else:
                self._point(f"{key}/{name[:MAX_NAME]}", step, value)

    def _exact(self, step: float, grid: Mapping[str, Any] | None) -> None:
        """Add the shares of exact matches to the last needle grid, if it has the same step, lengths and depths."""
        last = self.needle[-1] if self.needle else {}
        if grid and [last.get(key) for key in ("step", "lengths", "depths")] == [step, grid["lengths"], grid["depths"]]:
            last["exact"] = grid["values"]

    def _table(self, step: float, key: str, value: list, entry: Mapping[str, Any]) -> None:
        """Add a list: the forgetting matrix, the step times of all ranks, or the rows of a heat map."""
        if key == "forgetting_matrix":
            self.matrix = matrix_of(entry) or self.matrix
        elif key == "rank_step_seconds":
            self._heat(step, key, [value])
            if all(isinstance(one, int | float) and 0 < one < math.inf for one in value):
                while len(self.rank_times) < len(value) <= MAX_COLUMNS:
                    self.rank_times.append(Counter())
                for times, seconds in zip(self.rank_times, value, strict=False):
                    times[math.floor(math.log(seconds) / HISTOGRAM_STEP)] += 1
        elif value and isinstance(value[0], list):
            self._heat(step, key, value)

    def _heat(self, step: float, key: str, table: list) -> None:
        """Add a table of finite numbers as a column of the heat map `key`; anything else is ignored."""
        if not all(isinstance(row, list) and row for row in table) or sum(map(len, table)) > MAX_CELLS:
            return
        try:
            # Checked by the dtype of the result: faster than looking at each value.
            values = np.array(list(chain.from_iterable(table)))
        except (TypeError, ValueError, OverflowError):
            return
        if values.ndim != 1 or values.dtype.kind not in "iuf" or not np.isfinite(values).all():
            return
        shape = tuple(len(row) for row in table)
        if key not in self.heats and len(self.heats) >= 16:
            return
        # The stages of a run may have different models: only the newest shape is kept.
        if key not in self.heats or self.heats[key].shape != shape:
            self.heats[key] = Heat(shape)
        self.heats[key].add(step, values)

    def _stage(self, step: float, name: Any) -> None:
        """Record a change of the stage's name."""
        if not isinstance(name, str) or not name or len(self.stages) >= MAX_EVENTS:
            return
        if not self.stages or self.stages[-1][1] != name[:MAX_NAME]:
            self.stages.append((step, name[:MAX_NAME]))


class History:
    """Everything read so far from the folder of a run; `update` reads what was appended."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.generation = 0
        """Number that increases when existing rows changed, so that a page must load them again."""
        self.sequence_length: int | None = None
        self._lines = {name: Lines(folder / name) for name in FILES[:4]}
        self._forget(*self._lines)

    def _forget(self, *names: str) -> None:
        """Drop everything read from these files, to read them from the beginning."""
        for name in names:
            self._lines[name] = Lines(self.folder / name)
            if name == "metrics.jsonl":
                self.metrics = Metrics()
            elif name == "events.jsonl":
                self.events: deque[dict[str, Any]] = deque(maxlen=MAX_EVENTS)
            elif name == "samples.jsonl":
                self.samples: deque[dict[str, Any]] = deque(maxlen=MAX_SAMPLES)
            else:
                self.ledger: Counter[tuple[str, int | None]] = Counter()

    def update(self) -> bool:
        """Read what was written since the last call.

        Returns:
            True if anything was.
        """
        replaced = [name for name, lines in self._lines.items() if lines.replaced()]
        before = sum(lines.offset for lines in self._lines.values())
        self._forget(*replaced)
        lines = self._lines["metrics.jsonl"]
        for entry in lines.new():
            if why := self.metrics.add(entry):
                lines.refuse(why)
        moved = self.metrics.put_in_order()
        self.generation += moved or "metrics.jsonl" in replaced
        for entry in self._lines["events.jsonl"].new():
            self.events.append(_event(entry))
        for entry in self._lines["samples.jsonl"].new():
            if isinstance(entry.get("text"), str):
                kept = {key: str(entry.get(key) or "")[:MAX_TEXT] for key in ("prompt", "text", "stage")}
                self.samples.append({"step": step_of(entry) or 0, **kept})
        for entry in self._lines["ledger.jsonl"].new():
            if not _count(entry, self.ledger):
                self._lines["ledger.jsonl"].refuse("no samples of sources")
        return bool(replaced) or before != sum(one.offset for one in self._lines.values())

    def problems(self) -> list[str]:
        """Return a sentence for each thing that is broken or missing."""
        found = [problem for lines in self._lines.values() for problem in lines.problems()]
        metrics = self.metrics
        if not (self.folder / "metrics.jsonl").is_file():
            found.insert(
                0, "metrics.jsonl: does not exist. The run has not taken a step yet, or writes to another folder."
            )
        elif not metrics.steps:
            found.insert(0, "metrics.jsonl: contains no training step yet.")
        if metrics.not_finite:
            first = metrics.not_finite[0]
            found.append(
                f"metrics.jsonl: the loss of {len(metrics.not_finite):,} steps is not finite, first at {first:,.0f}."
            )
        if metrics.taken_again:
            found.append(
                f"metrics.jsonl: {metrics.taken_again:,} steps were written twice; the last written values are shown."
            )
        if metrics.unkept:
            found.append(f"metrics.jsonl: more than {MAX_SERIES} different keys; only the first ones are shown.")
        return found

    def tokens_by_source(self) -> dict[str, int]:
        """Return the tokens consumed from each source according to the ledger; samples, if their length is unknown."""
        totals: dict[str, int] = {}
        for (name, length), samples in self.ledger.items():
            each = (length or self.sequence_length or 1) if self.sequence_length else 1
            totals[name] = totals.get(name, 0) + samples * each
        return totals


def number(value: object) -> float | None:
    """Return a finite number as a float, None for anything else."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def step_of(entry: Mapping[str, Any]) -> float | None:
    """Return the step of an entry; None if it has none or an impossible one."""
    step = number(entry.get("step"))
    return step if step is not None and 0 <= step < MAX_STEP else None


def matrix_of(entry: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a forgetting matrix with text names and losses that are finite or None; None if it is malformed."""
    names, phases, rows = (entry.get(key) for key in ("domains", "phases", "forgetting_matrix"))
    if not (isinstance(names, list) and isinstance(phases, list) and isinstance(rows, list)):
        return None
    if len(rows) != len(phases) or any(not isinstance(row, list) or len(row) > len(names) for row in rows):
        return None
    if not 0 < len(names) * len(phases) <= MAX_CELLS:
        return None
    return {
        "step": step_of(entry),
        "domains": [str(name)[:MAX_NAME] for name in names],
        "phases": [str(phase)[:MAX_NAME] for phase in phases],
        "losses": [[number(loss) for loss in row] + [None] * (len(names) - len(row)) for row in rows],
    }


def needle_grid(group: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return accuracy by length (rows) and depth (columns), both ascending; None if it is malformed."""
    if not all(isinstance(row, dict) for row in group.values()) or len(group) > 100:
        return None
    if any(len(name) > MAX_NAME for name in chain(group, *group.values())):
        return None
    lengths = sorted(group, key=_as_number)
    depths = sorted({depth for row in group.values() for depth in row}, key=_as_number)[:100]
    values = [[number(group[length].get(depth)) for depth in depths] for length in lengths]
    return {"lengths": lengths, "depths": depths, "values": values} if depths else None


def thin(columns: Mapping[str, np.ndarray], most: int) -> dict[str, np.ndarray]:
    """Reduce columns to about `most` rows: the minimum and maximum of every column in each interval, in their order.

    The two rows of an interval carry its first and its last step.
    """
    count = len(columns["step"])
    if count <= most:
        return dict(columns)
    # Minimum and maximum, not the mean: a spike of one step must stay visible.
    size = math.ceil(2 * count / most)
    whole = count // size * size
    found = {}
    for name, values in columns.items():
        parts = [values[:whole].reshape(-1, size)] + ([values[whole:][None]] if whole < count else [])
        ends = []
        for part in parts:
            if name == "step":
                ends.append(part[:, [0, -1]])
                continue
            empty = np.isnan(part).all(axis=1)
            low = np.where(np.isnan(part), np.inf, part).argmin(axis=1)
            high = np.where(np.isnan(part), -np.inf, part).argmax(axis=1)
            pair = np.stack([np.minimum(low, high), np.maximum(low, high)], axis=1)
            taken = np.take_along_axis(part, pair, axis=1)
            taken[empty] = np.nan
            ends.append(taken)
        found[name] = np.concatenate(ends).reshape(-1)
    return found


def events_of(history: History) -> list[dict[str, Any]]:
    """Return all events by step, with changes of stage and non-finite losses that the run wrote no event for."""
    found = list(history.events)
    reported = {event["step"] for event in found if event["event"] == "nonfinite"}
    for (_, before), (step, name) in pairwise(history.metrics.stages):
        found.append({"time": None, "step": step, "event": "stage", "message": f"{name}, after {before}"})
    for step in history.metrics.not_finite[:MAX_EVENTS]:
        if step not in reported:
            found.append({"time": None, "step": step, "event": "nonfinite", "message": "the loss is not finite"})
    return sorted(found, key=lambda event: event["step"])


def _event(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return an entry of events.jsonl as the page shows it, with every text cut to its maximum."""
    more = {k: v for k, v in entry.items() if k not in ("time", "step", "event", "message")}
    message = str(entry.get("message") or "")
    if more and not message:
        message = ", ".join(f"{key} {value}" for key, value in more.items())
    # Details that the message may not contain: which store was saved to, and the file of a hang's report.
    for key in ("where", "report"):
        if isinstance(detail := entry.get(key), str) and detail not in message:
            message = f"{message} ({detail})"
    kind = str(entry.get("event") or "event")[:40]
    step, when = step_of(entry), number(entry.get("time"))
    found = {"time": when, "step": step or 0.0, "event": kind, "message": message[:MAX_TEXT]}
    ranks, lost, layout = (entry.get(key) for key in ("ranks", "lost_steps", "layout"))
    if isinstance(ranks, int) and 0 < ranks < 1 << 24:
        found["ranks"] = ranks
    if isinstance(layout, str):
        found["layout"] = layout[:MAX_NAME]
    if isinstance(lost, int) and not isinstance(lost, bool) and 0 <= lost < MAX_STEP:
        found["lost_steps"] = lost
        if "lost" not in message:
            found["message"] = f"{message[: MAX_TEXT - 50]} ({words_of(lost)})"
    return found | ({"echo": True} if entry.get("echo") is True else {})


def _count(entry: Mapping[str, Any], totals: Counter) -> bool:
    """Add the samples of a ledger entry to the totals; False if it has none."""
    sources = entry.get("sources")
    if not isinstance(sources, dict):
        return False
    length = entry.get("sequence_length")
    for name, taken in sources.items():
        try:
            first, end = taken["samples"]
            totals[str(name)[:MAX_NAME], length if isinstance(length, int) else None] += int(end) - int(first)
        except (TypeError, ValueError, KeyError):
            return False
    return True


def _as_number(text: str) -> tuple[float, str]:
    """Return a sort key: numbers by value, then other texts."""
    try:
        return float(text), text
    except ValueError:
        return math.inf, text
