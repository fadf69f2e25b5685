"""A run on one page: `report.html`, with its numbers and all that draws them inside the file."""

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
from igla_mega.config.load import load_recipe
from igla_mega.config.schema import Recipe
from igla_mega.report.history import FILES, Heat, History, events_of, thin

ASSETS = Path(__file__).with_name("assets")
SCRIPTS = ("data", "catalog", "plots", "heats", "tables", "page", "live")
"""Files of the page's script, in the order in which they are joined; any may call what a later one declares."""

MAX_ROWS = 150_000
"""Training steps a page holds one by one; a longer run is held as the least and the most of equal stretches."""
EXACT_ROWS = 20_000
"""Above so many rows values have 16 bits of precision: five digits, and half the page."""
MAX_DIFFERENCES, MAX_SLOWEST = 400, 16
MAX_KEYS, MAX_DEPTH = 20_000, 16
MAX_RECIPE_BYTES = 1 << 20
RECENT_STEPS = 50
"""Steps whose median is the run's pace."""
STEPS_TO_COMPARE = 8
"""A plan is set beside what was measured after so many steps: the first ones are slow."""
STALE_SECONDS, STALE_STEPS = 90.0, 12
"""A run is stale when it has written nothing for so long, and for so many of its steps."""
POLL_SECONDS = 2.0


class Page:
    """Several runs' folders, and the page that shows them; the first one is the page's own.

    Raises:
        ConfigError: a folder is not there, or is none of a run.
    """

    def __init__(self, folders: Sequence[Path]):
        for folder in folders:
            _expect_run(folder)
        self.runs = [_Run(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]

    def update(self) -> None:
        """Read what the runs have written since."""
        for run in self.runs:
            run.history.update()

    def news(self, since: Sequence[str | None]) -> dict[str, Any]:
        """What the page does not have yet.

        Args:
            since: what `news` gave of each run before, under that name; None for everything.
        """
        marks = [*since, *[None] * len(self.runs)]
        return {"runs": [{"index": i, **run.news(marks[i])} for i, run in enumerate(self.runs)]}

    def html(self, *, live: bool = False) -> str:
        """The whole page.

        Args:
            live: it asks the server it came from for what is new.
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
        """Keys of the recipes whose values differ, with the value of each run."""
        flat = [_flat(run.recipe_text) for run in self.runs]
        keys = sorted(set().union(*flat))
        rows = [[key, *[one.get(key) for one in flat]] for key in keys if len({one.get(key) for one in flat}) > 1]
        shown = rows[:MAX_DIFFERENCES]
        return {"heads": [run.name for run in self.runs], "rows": shown, "more": len(rows) - len(shown)}

    def _all(self) -> Iterator[tuple["_Run", dict[str, Any]]]:
        for index, news in enumerate(self.news(())["runs"]):
            yield self.runs[index], news


class _Run:
    """One run of a page."""

    def __init__(self, folder: Path, name: str):
        self.name = name
        self.history = History(folder)
        self.recipe_text, self.recipe, self.recipe_problem = _recipe(folder / "recipe.yaml")
        self.history.sequence_length = self.recipe.sequence_length if self.recipe else None
        # A recipe without a name is called by its file's.
        title = self.recipe.name if self.recipe and self.recipe.name not in ("", "recipe") else name
        self.title = title.encode("utf-8", "replace").decode()  # a name may hold what no text can
        self._total: int | None = None
        self._planned: dict[str, Any] | None = None
        self.history.update()

    def news(self, since: str | None) -> dict[str, Any]:
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
        """Every row's values; `seconds` is the time spent in steps."""
        metrics = self.history.metrics
        found = {"step": np.array(metrics.steps)}
        found |= {key: metrics.column(key) for key in metrics.columns}
        if "step_seconds" in found:
            found["seconds"] = np.cumsum(np.nan_to_num(found["step_seconds"]))
        return {key: values for key, values in found.items() if key in ("step", "loss") or not np.isnan(values).all()}

    def rest(self) -> dict[str, Any]:
        """What is not of every step."""
        history, metrics = self.history, self.history.metrics
        problems = history.problems() + ([self.recipe_problem] if self.recipe_problem else [])
        count = len(metrics.steps)
        if count > MAX_ROWS:
            problems.append(
                f"{count:,} steps: drawn are the least and the most of each {-(-2 * count // MAX_ROWS)} steps."
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
        """The state of the run, and the numbers that are asked for first."""
        metrics, recipe = self.history.metrics, self.recipe
        step, total = int(metrics.steps[-1]) if metrics.steps else 0, self.total_steps
        pace = self._recent("step_seconds")
        state, says = self._state(step, total, pace, time.time() if now is None else now)
        facts = [("step", f"{step:,}" + (f" of {total:,}" if total else ""))]
        if state == "running" and total and pace and total > step:
            facts.append(("time left", _clock((total - step) * pace)))
        loss = self._recent("loss", last=1)
        if loss is not None:
            facts.append(("loss now", _loss(loss)))
        for key, (_, values) in sorted(metrics.series.items()):
            if key.startswith("validation_loss/") and len(facts) < 8:
                facts.append((f"validation, {key.removeprefix('validation_loss/')}", _loss(values[-1])))
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
            "state": state,
            "says": says,
            "step": step,
            "total_steps": total,
            "facts": facts,
            "subtitle": _subtitle(recipe),
            "loss_unit": "nats per pair" if recipe and recipe.form == "preference_pairs" else "nats per target token",
        }

    def _state(self, step: int, total: int | None, pace: float | None, now: float) -> tuple[str, str]:
        written = self.history.written_at()
        if written is None:
            return "empty", "nothing written yet"
        last = next((e["event"] for e in reversed(self.history.events) if e["event"] in _TURNS), None)
        ago = now - written
        since = f"{_clock(ago)} ago" if ago >= 1 else "now"
        if last == "finished" or (total is not None and step >= total):
            return "finished", f"finished, {since}"
        if last == "stopping":
            return "stopped", f"stopped, {since}"
        if last == "hang":
            return "hung", f"ended because it was stuck, {since}"
        if ago > max(STALE_SECONDS, STALE_STEPS * (pace or 0.0)):
            return "stale", f"nothing new for {_clock(ago)}"
        return ("running", "running") if step else ("empty", "no step yet")

    def _recent(self, key: str, last: int = RECENT_STEPS) -> float | None:
        column = self.history.metrics.columns.get(key)
        found = [value for value in (column[-last:] if column else ()) if value == value]
        return statistics.median(found) if found else None

    @property
    def devices(self) -> int | None:
        """Ranks of the run: as it said when it began, as many as have told their step times, else by its metrics."""
        metrics = self.history.metrics
        if said := next((event["ranks"] for event in reversed(self.history.events) if "ranks" in event), None):
            return said
        if metrics.rank_times:
            return len(metrics.rank_times)
        try:
            return self._finished.num_ranks if self.recipe else None
        except ConfigError:
            return None

    @property
    def _finished(self):
        from igla_mega.plan.finished import FinishedRun

        metrics = self.history.metrics
        keys = [key for key in ("tokens_per_second", "tflops_per_device", "mfu", "memory_bytes", "step_seconds")]
        columns = {key: metrics.columns[key][-512:] for key in keys if key in metrics.columns}
        rows = tuple(dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=False))
        return FinishedRun(self.history.folder, rows)

    @property
    def total_steps(self) -> int | None:
        """Steps of all stages, where the recipe says them; the data may."""
        if self._total is not None or self.recipe is None:
            return self._total
        from igla_mega.plan.choose import stages_of

        def said(recipe: Recipe, _) -> int:
            if recipe.training.total_steps is None:
                raise ConfigError("the data's size says how many steps")
            return recipe.training.total_steps

        with suppress(ConfigError):
            self._total = stages_of(self.recipe, self.devices or 1, "cpu", said)[-1].last_step
        return self._total

    def _plan(self) -> dict[str, Any] | None:
        """What was planned beside what was measured; None where there is nothing to plan or to compare."""
        enough = len(self.history.metrics.steps) >= STEPS_TO_COMPARE
        if self._planned is not None or not enough or self.recipe is None or self.recipe.stages is not None:
            return self._planned
        from igla_mega.plan.forecast import Given, forecast

        with suppress(ConfigError):
            run = self._finished
            hardware = run.hardware()
            compared = run.compare(forecast(self.recipe, hardware, run.num_ranks, Given(advise=False)))
            rows = [[name, unit, measured, planned] for name, measured, planned, unit in compared.rows]
            note = f"medians of the last {len(run.steps)} steps; the plan is for {hardware.title}"
            self._planned = {"note": note, "rows": rows} if rows else None
        return self._planned

    def _sources(self) -> dict[str, Any] | None:
        consumed = self.history.tokens_by_source()
        # Phases draw from mixes of their own.
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


_TURNS = ("started", "resumed", "stopping", "hang", "finished")


def write_report(run: Path, others: Sequence[Path] = (), out: Path | None = None) -> Path:
    """Write a page about a run, beside others if asked, from what they have written so far.

    Args:
        out: the file; `RUN/report.html` without it.

    Raises:
        ConfigError: no folder of a run, or the file cannot be written.
    """
    page = Page([run, *others]).html()
    path = out or run / "report.html"
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(page, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise ConfigError(f"{path}: cannot be written: {error.strerror}.\n  Give another place: --out FILE.") from None
    return path


def policy(*, live: bool) -> str:
    """Content-Security-Policy of the page: its own code and style, and nothing from elsewhere."""
    code = _code()
    reached = "'self'" if live else "'none'"
    scripts = " ".join(_digest(code[name]) for name in ("library", "script"))
    return (
        f"default-src 'none'; script-src {scripts}; style-src {_digest(code['style'])}; img-src data:; "
        f"connect-src {reached}; base-uri 'none'; form-action 'none'"
    )


def _expect_run(folder: Path) -> None:
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "no such folder"
        raise ConfigError(f"{folder}: {what}.\n  Give the folder of a run (`train --run DIR`).")
    if not any((folder / name).exists() for name in FILES):
        raise ConfigError(
            f"{folder}: not the folder of a run: it has none of {', '.join(FILES)}.\n"
            "  Give the folder that `train --run DIR` wrote."
        )


def _names(folders: Sequence[Path]) -> list[str]:
    """A name for each: the folder's, with its parent's where two are the same."""
    paths = [folder.resolve() for folder in folders]
    names = [path.name for path in paths]
    return [
        name if names.count(name) == 1 else f"{path.parent.name}/{name}"
        for name, path in zip(names, paths, strict=True)
    ]


def _recipe(path: Path) -> tuple[str, Recipe | None, str | None]:
    """Its text, the recipe, and why there is none."""
    if not path.is_file():
        return "", None, None
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            text = file.read(MAX_RECIPE_BYTES)
    except OSError as error:
        return "", None, f"recipe.yaml: cannot be read: {error.strerror}."
    try:
        return text, load_recipe(path.resolve()), None
    except (ConfigError, RecursionError) as error:
        first = (str(error).splitlines() or ["it is nested too deeply"])[0].removeprefix(f"{path.resolve()}: ")
        return text, None, f"recipe.yaml: not a recipe of this version: {first}"


def _flat(text: str) -> dict[str, str]:
    """A recipe's leaves as dotted keys; of what is no YAML, nothing."""
    try:
        tree = yaml_text.parse(text, "recipe.yaml")
    except (ConfigError, RecursionError):
        return {}
    found: dict[str, str] = {}
    left = MAX_KEYS  # aliases can make a small file a large tree

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
    """Columns as one deflated block: bytes of equal weight side by side, rising ones as differences."""
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
                bits = single.view(np.uint32)
                single = np.where(np.isnan(single), bits, (bits + 0x40) & 0xFFFFFF80).astype(np.uint32).view(np.float32)
            names.append([key, "f", 1])
            blocks.append(_shuffled(single))
    return {"names": names, "rows": len(part["step"]), "blob": _deflated(b"".join(blocks))}


def _pack_heat(key: str, heat: Heat) -> dict[str, Any]:
    """A heat map in 16 bits a value; the load of experts as a multiple of the fair share."""
    steps, values = heat.drawn()
    if key == "expert_load":
        values = values * np.repeat([float(count) for count in heat.shape], heat.shape)[:, None]
    most = float(values.max(initial=0.0)) or 1.0
    levels = np.clip(np.round(values / most * 65535), 0, 65535).astype(np.uint16)
    return {
        "key": key,
        "steps": steps,
        "shape": list(heat.shape),
        "rows": sum(heat.shape),
        "scale": most / 65535,
        "blob": _deflated(_shuffled(levels.reshape(-1))),
    }


def _filled(values: np.ndarray) -> np.ndarray:
    """Gaps take the value before them."""
    last = np.maximum.accumulate(np.where(np.isnan(values), 0, np.arange(len(values))))
    return np.nan_to_num(values[last])


def _shuffled(values: np.ndarray) -> bytes:
    return values.view(np.uint8).reshape(len(values), values.itemsize).T.tobytes()


def _deflated(content: bytes) -> str:
    return base64.b64encode(zlib.compress(content, 6)).decode()


def _rounded(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.6g}") for value in values]


def _mark(since: str | None) -> tuple[int, int, list[str]]:
    parts = (since or "").split(".")
    if len(parts) != 3 or not all(part.isascii() and part.isdigit() and len(part) < 16 for part in parts[:2]):
        return -1, 0, []
    return int(parts[0]), int(parts[1]), parts[2].split("-")


@cache
def _code() -> dict[str, str]:
    def read(*names: str) -> str:
        return "\n".join((ASSETS / name).read_text(encoding="utf-8") for name in names)

    # One scope for all of them, and none of their names in the window.
    joined = '"use strict";\n(() => {\n' + read(*(f"{name}.js" for name in SCRIPTS)) + "})();\n"
    return {"style": read("uPlot.min.css", "page.css"), "library": read("uPlot.min.js"), "script": joined}


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _inside_script(data: Any) -> str:
    """JSON that nothing inside can end: no `<` is written as itself."""
    text = json.dumps(data, allow_nan=False, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _fill(template: str, **values: str) -> str:
    parts = template.split("{{")
    return parts[0] + "".join(values[name] + rest for name, rest in (part.split("}}", 1) for part in parts[1:]))


def _subtitle(recipe: Recipe | None) -> str:
    if recipe is None or recipe.model is None:
        return "A training run of igla_mega"
    parts = [f"{_short(recipe.model.num_parameters(recipe.moe))} parameters"]
    if recipe.sequence_length:
        parts.append(f"sequences of {recipe.sequence_length:,} tokens")
    return ", ".join([*parts, recipe.distributed.precision, recipe.distributed.strategy])


def _loss(nats: float) -> str:
    return f"{nats:.3f}" if abs(nats) < 1e6 else f"{nats:.3g}"


def _short(number: float) -> str:
    """Three digits and a unit: 1.23M."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def _clock(seconds: float) -> str:
    days, hours, minutes = int(seconds // 86400), int(seconds % 86400 // 3600), int(seconds % 3600 // 60)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min" if minutes else f"{seconds:.0f} s"
