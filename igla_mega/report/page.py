"""Write the page of a run: `report.html`, one file with all numbers and the code that draws them."""

import base64
import hashlib
import html
import json
import os
import statistics
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from igla_mega.config import yaml_text
from igla_mega.config.errors import ConfigError
from igla_mega.config.files import regular, write_text
from igla_mega.config.load import load_recipe
from igla_mega.config.schema import Recipe
from igla_mega.plan.finished import WARM_UP_STEPS
from igla_mega.report.history import FILES, Heat, History, events_of, thin
from igla_mega.report.state import clock, state_of

ASSETS = Path(__file__).with_name("assets")
SCRIPTS = ("data", "catalog", "plots", "heats", "tables", "page", "live")
"""Files of the page's script, in the order in which they are joined; each may call functions of later ones."""

MAX_ROWS = 150_000
"""Maximum number of rows in a page; a longer run is reduced to the minimum and maximum of equal intervals."""
EXACT_ROWS = 20_000
"""Number of rows above which values keep 17 of 24 bits of precision: five digits, at half the size."""
MAX_DIFFERENCES, MAX_SLOWEST = 400, 16
MAX_KEYS, MAX_DEPTH = 20_000, 16
MAX_RECIPE_BYTES = 1 << 20
RECENT_STEPS = 50
"""Number of last steps whose median is the current step time, throughput and MFU."""
STEPS_TO_COMPARE = 8
"""Minimum number of steps before a plan is compared with the measurements: the first steps are slow."""
POLL_SECONDS = 2.0


class Page:
    """Page of one or more runs; its title is that of the first one.

    Raises:
        ConfigError: a folder does not exist, or is not the folder of a run.
    """

    def __init__(self, folders: Sequence[Path]):
        for folder in folders:
            _expect_run(folder)
        self.runs = [_Run(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]

    def update(self) -> None:
        """Read what the runs have written since the last call."""
        for run in self.runs:
            run.history.update()

    def news(self, since: Sequence[str | None]) -> dict[str, Any]:
        """Return what an open page does not have yet.

        Args:
            since: value of `since` in the previous result, for each run; None for everything.
        """
        marks = [*since, *[None] * len(self.runs)]
        return {"runs": [{"index": i, **run.news(marks[i])} for i, run in enumerate(self.runs)]}

    def html(self, *, live: bool = False) -> str:
        """Return the whole page.

        Args:
            live: True if the page shall poll its server for new data.
        """
        data = {
            "runs": [{"name": run.name, "title": run.title, **news} for run, news in self._all()],
            "live": live,
            "poll_seconds": POLL_SECONDS,
            "difference": self.difference() if len(self.runs) > 1 else None,
        }
        written = "live" if live else f"written {time.strftime('%Y-%m-%d %H:%M')}"
        return _fill(
            (ASSETS / "page.html").read_text(encoding="utf-8"),
            policy=html.escape(policy(live=live)),
            title=html.escape(self.runs[0].title),
            live=written,
            data=_inside_script(data),
            **_code(),
        )

    def difference(self) -> dict[str, Any]:
        """Return the recipe keys whose values differ, with the value of each run."""
        flat = [_flat(run.recipe_text) for run in self.runs]
        keys = sorted(set().union(*flat))
        rows = [[key, *[one.get(key) for one in flat]] for key in keys if len({one.get(key) for one in flat}) > 1]
        shown = rows[:MAX_DIFFERENCES]
        return {"heads": [run.name for run in self.runs], "rows": shown, "more": len(rows) - len(shown)}

    def _all(self) -> Iterator[tuple["_Run", dict[str, Any]]]:
        """Yield each run with everything about it."""
        for index, news in enumerate(self.news(())["runs"]):
            yield self.runs[index], news


class _Run:
    """A run as a page shows it."""

    def __init__(self, folder: Path, name: str):
        self.name = name
        self.history = History(folder)
        self.recipe_text, self.recipe, self.recipe_problem = _recipe(folder / "recipe.yaml")
        self.history.sequence_length = self.recipe.sequence_length if self.recipe else None
        # A recipe without a name is loaded with the name of its file.
        title = self.recipe.name if self.recipe and self.recipe.name not in ("", "recipe") else name
        self.title = title.encode("utf-8", "replace").decode()  # a file name may have lone surrogates
        self._total: int | None = None
        self._forecast: tuple[str, int, Any] | None = None
        self.history.update()

    def news(self, since: str | None) -> dict[str, Any]:
        """Return rows after those that the page has, and the other parts that changed.

        `since` is `generation.rows.checksums`, with one checksum for each part of `rest`.
        """
        history, metrics = self.history, self.history.metrics
        generation, first, known = _mark(since)
        if generation != history.generation or first > len(metrics.steps):
            first = 0
        rest = self.rest()
        marks = [f"{zlib.crc32(json.dumps(part).encode()):08x}" for part in rest.values()]
        known += [""] * len(marks)
        found: dict[str, Any] = {
            "since": f"{history.generation}.{len(metrics.steps)}.{'-'.join(marks)}",
            "first": first,
            "summary": self.summary(),
            "rest": {name: rest[name] for name, mark, had in zip(rest, marks, known, strict=False) if mark != had},
        }
        if first < len(metrics.steps):
            found["rows"] = _pack_rows(self.columns(), first)
        return found

    def columns(self) -> dict[str, np.ndarray]:
        """Return the values of every row; `seconds` is the cumulative step time."""
        metrics = self.history.metrics
        found = {"step": np.array(metrics.steps)}
        found |= {key: metrics.column(key) for key in metrics.columns}
        if "step_seconds" in found:
            found["seconds"] = np.cumsum(np.nan_to_num(found["step_seconds"]))
        return {key: values for key, values in found.items() if key in ("step", "loss") or not np.isnan(values).all()}

    def rest(self) -> dict[str, Any]:
        """Return everything but the rows: series, events, tables, the recipe, and problems."""
        history, metrics = self.history, self.history.metrics
        problems = history.problems() + ([self.recipe_problem] if self.recipe_problem else [])
        count = len(metrics.steps)
        if count > MAX_ROWS:
            problems.append(
                f"{count:,} steps: the minimum and the maximum of each {-(-2 * count // MAX_ROWS)} steps are drawn."
            )
        return {
            "series": {key: [list(at), _rounded(values)] for key, (at, values) in metrics.series.items()},
            "events": events_of(history),
            "samples": list(history.samples),
            "needle": list(metrics.needle),
            "matrix": metrics.matrix,
            "heats": [_pack_heat(key, heat) for key, heat in metrics.heats.items() if heat.steps],
            "ranks": [_rounded(row) for row in metrics.quantiles()],
            "slowest": metrics.slowest.most_common(MAX_SLOWEST),
            "sources": self._sources(),
            "problems": problems,
            "plan": self._plan(),
            "recipe": self.recipe_text,
        }

    def summary(self, now: float | None = None) -> dict[str, Any]:
        """Return the state of the run and the numbers of the page's head. `now` is a Unix time in seconds."""
        metrics, recipe = self.history.metrics, self.recipe
        step, total = int(metrics.steps[-1]) if metrics.steps else 0, self.total_steps
        step_seconds = self._recent("step_seconds")
        state = state_of(self.history, now)
        facts = [("step", f"{step:,}" + (f" of {total:,}" if total else ""))]
        if state.kind == "running" and total and step_seconds and total > step:
            facts.append(("time left", clock((total - step) * step_seconds)))
        loss = self._recent("loss", last=1)
        if loss is not None:
            facts.append(("loss now", _loss(loss)))
        validation = {key: values[-1] for key, (_, values) in sorted(metrics.series.items()) if key.startswith(_LOSS)}
        facts += [(f"validation, {key.removeprefix(_LOSS)}", _loss(loss)) for key, loss in validation.items()]
        for title, key, say in (
            ("tokens", "tokens", _short),
            ("tokens/s", "tokens_per_second", _short),
            ("MFU", "mfu", lambda share: f"{share:.1%}"),
            ("memory", "memory_bytes", lambda count: f"{count / 2**30:.2f} GiB"),
        ):
            value = self._recent(key, last=1 if key in ("tokens", "memory_bytes") else RECENT_STEPS)
            if value is not None:
                facts.append((title, say(value)))
        if devices := self.devices:
            facts.append(("devices", f"{devices:,}"))
        return {
            "state": state.kind,
            "says": state.says,
            "cause": state.cause,
            "command": state.command,
            "step": step,
            "total_steps": total,
            "facts": facts,
            "subtitle": _subtitle(recipe, self._layout),
            "note": self._note(),
            "loss_unit": "nats per pair" if recipe and recipe.form == "preference_pairs" else "nats per target token",
        }

    def _recent(self, key: str, last: int = RECENT_STEPS) -> float | None:
        """Return the median of the last values of a column, without those of the warm-up; None if there are none."""
        column = self.history.metrics.columns.get(key)
        first = max(self._first_recent(), len(self.history.metrics.steps) - last)
        found = [value for value in (column[first:] if column else ()) if value == value]  # without NaN
        return statistics.median(found) if found else None

    def _first_recent(self) -> int:
        """Return the first row of the medians: they are over the last `RECENT_STEPS`, without the slow first ones."""
        count = len(self.history.metrics.steps)
        return max(count - RECENT_STEPS, WARM_UP_STEPS if count > 2 * WARM_UP_STEPS else 0)

    def _note(self) -> str:
        """Return which steps the rates of the page's head are measured over; empty if there are none."""
        count = len(self.history.metrics.steps) - self._first_recent()
        return f"tokens/s and MFU: medians of the last {count} steps" if count else ""

    @property
    def _layout(self) -> str:
        """Layout that the last start reported, such as `DDP data 2`; empty if an older version wrote the events."""
        return next((event["layout"] for event in reversed(self.history.events) if "layout" in event), "")

    @property
    def devices(self) -> int | None:
        """Number of ranks: from the last event that has it, else from the reported step times or the metrics."""
        metrics = self.history.metrics
        if ranks := next((event["ranks"] for event in reversed(self.history.events) if "ranks" in event), None):
            return ranks
        if metrics.rank_times:
            return len(metrics.rank_times)
        try:
            return self._finished.num_ranks if self.recipe else None
        except ConfigError:
            return None

    @property
    def _finished(self):
        """The run's last measurements, as `plan` compares them with a forecast."""
        from igla_mega.plan.finished import FinishedRun

        metrics, first = self.history.metrics, self._first_recent()
        keys = ("tokens_per_second", "tflops_per_device", "mfu", "memory_bytes", "step_seconds")
        columns = {key: metrics.columns[key][first:] for key in keys if key in metrics.columns}
        rows = tuple(dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=False))
        return FinishedRun(self.history.folder, rows, warm_up_steps=0)

    @property
    def total_steps(self) -> int | None:
        """Number of steps of all stages; None if it depends on the size of the data."""
        if self._total is not None or self.recipe is None:
            return self._total
        from igla_mega.plan.choose import stages_of

        def from_recipe(recipe: Recipe, _) -> int:
            if recipe.training.total_steps is None:
                raise ConfigError("the number of steps depends on the size of the data")
            return recipe.training.total_steps

        with suppress(ConfigError):
            self._total = stages_of(self.recipe, self.devices or 1, "cpu", from_recipe)[-1].last_step
        return self._total

    def _plan(self) -> dict[str, Any] | None:
        """Return measured and planned numbers side by side; None if either is missing."""
        enough = len(self.history.metrics.steps) >= STEPS_TO_COMPARE
        if not enough or self.recipe is None or self.recipe.stages is not None:
            return None
        from igla_mega.plan.forecast import Given, forecast

        with suppress(ConfigError):
            run = self._finished
            hardware, ranks = run.hardware(), run.num_ranks
            # The measurements change with every step, the forecast with neither.
            if self._forecast is None or self._forecast[:2] != (hardware.title, ranks):
                planned = forecast(self.recipe, hardware, ranks, Given(advise=False))
                self._forecast = (hardware.title, ranks, planned)
            rows = [[name, unit, had, planned] for name, had, planned, unit in run.compare(self._forecast[2]).rows]
            note = f"medians of the last {len(run.steps)} steps, as above; the plan is for {hardware.title}"
            return {"note": note, "rows": rows} if rows else None
        return None

    def _sources(self) -> dict[str, Any] | None:
        """Return the consumption of each source next to its share in data.mix; None if there is no ledger."""
        consumed = self.history.tokens_by_source()
        # With a curriculum each phase has a different mix, and no single share is the right one to compare with.
        mix = self.recipe.data.mix if self.recipe and self.recipe.curriculum is None else {}
        if not consumed:
            return None
        total, weights = sum(consumed.values()) or 1, sum(mix.values()) or 1.0
        items = [
            [name, consumed.get(name, 0), consumed.get(name, 0) / total, mix[name] / weights if name in mix else None]
            for name in sorted(
                consumed.keys() | mix.keys(), key=lambda one: (-mix.get(one, 0.0), -consumed.get(one, 0))
            )
        ]
        return {"unit": "tokens" if self.history.sequence_length else "samples", "items": items[:MAX_DIFFERENCES]}


_LOSS = "validation_loss/"
"""Beginning of the names of series of validation losses; a source follows."""


def write_report(run: Path, others: Sequence[Path] = (), out: Path | None = None) -> Path:
    """Write the page of a run, compared with other runs if given, from what they have written so far.

    Args:
        out: path of the page; None for `RUN/report.html`.

    Raises:
        ConfigError: a folder is not that of a run, or the file cannot be written.
    """
    page = Page([run, *others]).html()
    path = out or run / "report.html"
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(temporary, page)
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise ConfigError(f"{path}: cannot be written: {error.strerror}.\n  Give another path: --out FILE.") from None
    return path


def policy(*, live: bool) -> str:
    """Return the Content-Security-Policy of the page: only its own code and style, nothing from other origins."""
    code = _code()
    connect = "'self'" if live else "'none'"
    scripts = " ".join(_digest(code[name]) for name in ("library", "script"))
    return (
        f"default-src 'none'; script-src {scripts}; style-src {_digest(code['style'])}; img-src data:; "
        f"connect-src {connect}; base-uri 'none'; form-action 'none'"
    )


def _expect_run(folder: Path) -> None:
    """Raise ConfigError if a folder is not that of a run."""
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "no such folder"
        raise ConfigError(f"{folder}: {what}.\n  Give the folder of a run (`train --run DIR`).")
    if not any((folder / name).exists() for name in FILES):
        raise ConfigError(
            f"{folder}: not the folder of a run: it has none of {', '.join(FILES)}.\n"
            "  Give the folder that `train --run DIR` wrote."
        )


def _names(folders: Sequence[Path]) -> list[str]:
    """Return a name for each run: that of its folder, preceded by its parent's where two are equal."""
    paths = [folder.resolve() for folder in folders]
    names = [path.name for path in paths]
    return [
        name if names.count(name) == 1 else f"{path.parent.name}/{name}"
        for name, path in zip(names, paths, strict=True)
    ]


def _recipe(path: Path) -> tuple[str, Recipe | None, str | None]:
    """Return the text of a recipe, the recipe, and the reason if it cannot be loaded."""
    if not path.is_file():
        return "", None, None
    try:
        with open(path, encoding="utf-8", errors="replace", opener=regular) as file:
            text = file.read(MAX_RECIPE_BYTES)
    except OSError as error:
        return "", None, f"recipe.yaml: cannot be read: {error.strerror}."
    try:
        return text, load_recipe(path.resolve()), None
    except (ConfigError, RecursionError) as error:
        first = (str(error).splitlines() or ["it is nested too deeply"])[0].removeprefix(f"{path.resolve()}: ")
        return text, None, f"recipe.yaml: not a recipe of this version: {first}"


def _flat(text: str) -> dict[str, str]:
    """Return the leaves of a recipe by their dotted keys; an empty dictionary if the text is not YAML."""
    try:
        tree = yaml_text.parse(text, "recipe.yaml")
    except (ConfigError, RecursionError):
        return {}
    found: dict[str, str] = {}
    left = MAX_KEYS  # YAML aliases can expand a small file to a huge tree

    def walk(node: Any, key: str, depth: int) -> None:
        nonlocal left
        left -= 1
        if isinstance(node, dict) and node and depth:
            for name, value in node.items():
                if left > 0:
                    walk(value, f"{key}.{name}" if key else str(name), depth - 1)
        elif isinstance(node, list) and depth and any(isinstance(one, dict | list) for one in node):
            for number, value in enumerate(node):
                if left > 0:
                    walk(value, f"{key}[{number}]", depth - 1)
        else:
            found[key[:500]] = str(node)[:500] if not isinstance(node, dict | list) or depth else "..."

    walk(tree, "", MAX_DEPTH)
    return found


def _pack_rows(columns: Mapping[str, np.ndarray], first: int) -> dict[str, Any]:
    """Return columns as one compressed block, from row `first` on.

    Ascending columns are stored as differences, and the bytes of a column are grouped by significance: both make long
    runs of equal bytes. `assets/data.js` has the inverse.
    """
    count = len(columns["step"]) - first
    part = {key: values[first:] for key, values in columns.items()}
    trimmed = count > EXACT_ROWS
    if count > MAX_ROWS:
        part = thin(part, MAX_ROWS)
    names, blocks = [], []
    for key, values in part.items():
        if key in ("step", "tokens", "seconds"):
            scale = 1e-3 if key == "seconds" else 1
            values = np.maximum.accumulate(np.round(_filled(values) / scale))
            names.append([key, "d", scale])
            blocks.append(_shuffled(np.diff(values, prepend=0.0)))
        else:
            with np.errstate(over="ignore"):
                single = values.astype(np.float32)
            single[~np.isfinite(single)] = np.nan
            if trimmed:
                # Round to the nearest value whose low 7 bits of the mantissa are 0; NaN stays as it is.
                bits = single.view(np.uint32)
                single = np.where(np.isnan(single), bits, (bits + 0x40) & 0xFFFFFF80).astype(np.uint32).view(np.float32)
            names.append([key, "f", 1])
            blocks.append(_shuffled(single))
    return {"names": names, "rows": len(part["step"]), "blob": _deflated(b"".join(blocks))}


def _pack_heat(key: str, heat: Heat) -> dict[str, Any]:
    """Return a heat map in 16 bits per value; the load of experts becomes a multiple of the fair share."""
    steps, values = heat.drawn()
    if key == "expert_load":
        values = values * np.repeat([float(count) for count in heat.shape], heat.shape)[:, None]
    largest = float(values.max(initial=0.0)) or 1.0
    levels = np.clip(np.round(values / largest * 65535), 0, 65535).astype(np.uint16)
    return {
        "key": key,
        "steps": steps,
        "shape": list(heat.shape),
        "rows": sum(heat.shape),
        "scale": largest / 65535,
        "blob": _deflated(_shuffled(levels.reshape(-1))),
    }


def _filled(values: np.ndarray) -> np.ndarray:
    """Return the values with each NaN replaced by the value before it."""
    last = np.maximum.accumulate(np.where(np.isnan(values), 0, np.arange(len(values))))
    return np.nan_to_num(values[last])


def _shuffled(values: np.ndarray) -> bytes:
    """Return the bytes of an array grouped by significance: the first byte of every value, then the second."""
    return values.view(np.uint8).reshape(len(values), values.itemsize).T.tobytes()


def _deflated(content: bytes) -> str:
    return base64.b64encode(zlib.compress(content, 6)).decode()


def _rounded(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.6g}") for value in values]


def _mark(since: str | None) -> tuple[int, int, list[str]]:
    """Parse a `since` of `_Run.news`; a malformed one is treated as nothing received."""
    parts = (since or "").split(".")
    if len(parts) != 3 or not all(part.isascii() and part.isdigit() and len(part) < 16 for part in parts[:2]):
        return -1, 0, []
    return int(parts[0]), int(parts[1]), parts[2].split("-")


@cache
def _code() -> dict[str, str]:
    """Return the page's style and scripts."""

    def read(*names: str) -> str:
        return "\n".join((ASSETS / name).read_text(encoding="utf-8") for name in names)

    # One function scope for all files, so that none of their names becomes a property of `window`.
    joined = '"use strict";\n(() => {\n' + read(*(f"{name}.js" for name in SCRIPTS)) + "})();\n"
    return {"style": read("uPlot.min.css", "page.css"), "library": read("uPlot.min.js"), "script": joined}


def _digest(text: str) -> str:
    """Return a hash source for a Content-Security-Policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _inside_script(data: Any) -> str:
    """Return JSON that cannot end the script element around it: `<`, `>` and `&` are escaped."""
    text = json.dumps(data, allow_nan=False, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _fill(template: str, **values: str) -> str:
    """Replace each {{name}} of the template once; a value that contains {{ is not expanded again."""
    parts = template.split("{{")
    return parts[0] + "".join(values[name] + rest for name, rest in (part.split("}}", 1) for part in parts[1:]))


def _subtitle(recipe: Recipe | None, layout: str) -> str:
    """Describe the model and its training in one line; `layout` is what ran, the recipe what was asked for."""
    if recipe is None or recipe.model is None:
        return "A training run of igla_mega"
    parts = [f"{_short(recipe.model.num_parameters(recipe.moe))} parameters"]
    if recipe.sequence_length:
        parts.append(f"sequences of {recipe.sequence_length:,} tokens")
    return ", ".join([*parts, recipe.distributed.precision, layout or recipe.distributed.strategy])


def _loss(nats: float) -> str:
    return f"{nats:.3f}" if abs(nats) < 1e6 else f"{nats:.3g}"


def _short(number: float) -> str:
    """Format a number with three digits and a unit: 1.23M."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"
