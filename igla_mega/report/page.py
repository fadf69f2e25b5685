"""A run on one page: `report.html`, with its plots and all that draws them inside the file."""

import html
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from igla_mega.config.errors import ConfigError
from igla_mega.config.load import load_recipe
from igla_mega.config.schema import Recipe

MAX_POINTS = 2000
"""Points of one line; a longer one is drawn as means over equal stretches of steps."""

MAX_COLUMNS = 400
"""Columns of a heat map; a longer run is drawn as means over equal stretches of steps."""

Points = tuple[list[float], list[float]]
"""Steps and values."""

INK, MUTED, GRID, MAIN, PALE = "#1f2430", "#667085", "#e8eaee", "#0072b2", "#a9cde4"
# Okabe and Ito 2008: told apart by colour-blind readers, and in grey by their dashes.
SOURCE_COLORS = ("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#444444")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")

STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 1160px; padding: 28px 24px 40px; background: #fff; color: #1f2430;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 24px; margin: 0 0 2px; }
h2 { font-size: 15px; font-weight: 600; margin: 0 0 2px; }
p { color: #667085; margin: 0; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 14px 20px; margin: 20px 0 24px;
  padding: 14px 0; border: solid #e8eaee; border-width: 1px 0; }
dt { color: #667085; font-size: 13px; }
dd { margin: 0; font-size: 19px; font-weight: 600; font-variant-numeric: tabular-nums; }
main { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 28px 32px; }
section { min-width: 0; break-inside: avoid; }
section.wide { grid-column: 1 / -1; }
section p { font-size: 13px; }
details { margin-top: 28px; }
summary { cursor: pointer; font-weight: 600; }
pre { font-size: 12.5px; line-height: 1.45; overflow-x: auto; white-space: pre-wrap; }
@media screen and (max-width: 760px) { main { grid-template-columns: minmax(0, 1fr); } }
@media print { body { max-width: none; padding: 0; } }
"""


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run folder from what the run has written so far.

    Returns:
        The file.

    Raises:
        ConfigError: no such folder, or it has no metrics yet.
    """
    entries = list(_lines(run_dir / "metrics.jsonl"))
    if not any("loss" in entry for entry in entries):
        what = "no such folder" if not run_dir.is_dir() else "has no metrics.jsonl with a training step in it"
        raise ConfigError(f"{run_dir}: {what}.\n  Give the folder of a run (`train --run DIR`) that has taken a step.")
    recipe = _recipe(run_dir / "recipe.yaml")
    ledger = list(_lines(run_dir / "ledger.jsonl"))
    path = run_dir / "report.html"
    path.write_text(_page(run_dir, entries, ledger, recipe), encoding="utf-8")
    return path


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a JSONL file; what a run is just writing, or was killed while writing, is left out."""
    if not path.is_file():
        return
    with open(path, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict):
                yield entry


def _recipe(path: Path) -> Recipe | None:
    try:
        return load_recipe(path.resolve()) if path.is_file() else None
    except ConfigError:  # of another version: the plots do without
        return None


def _page(run_dir: Path, entries: list[dict], ledger: list[dict], recipe: Recipe | None) -> str:
    name = (recipe.name if recipe else "") or run_dir.resolve().name
    scripted = False
    sections = []
    for title, note, figure, wide in _figures(entries, ledger, recipe):
        body = figure.to_html(
            full_html=False,
            include_plotlyjs=not scripted,
            config={"displaylogo": False, "responsive": True, "displayModeBar": False},
        )
        scripted = True
        sections.append(
            f'<section class="{"wide" if wide else "half"}"><h2>{html.escape(title)}</h2>'
            f"<p>{html.escape(note)}</p>{body}</section>"
        )
    facts = "".join(f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in _facts(entries))
    settings = run_dir / "recipe.yaml"
    details = ""
    if settings.is_file():
        text = html.escape(settings.read_text(encoding="utf-8", errors="replace"))
        details = f"<details><summary>recipe.yaml</summary><pre>{text}</pre></details>"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{html.escape(name)}</title>'
        f"<style>{STYLE}</style></head>\n<body><header><h1>{html.escape(name)}</h1>"
        f"<p>{html.escape(_subtitle(recipe))}</p></header><dl>{facts}</dl>\n"
        f"<main>{''.join(sections)}</main>\n{details}</body></html>\n"
    )


def _subtitle(recipe: Recipe | None) -> str:
    if recipe is None or recipe.model is None:
        return "A training run of igla_mega"
    parts = [f"{_short(recipe.model.num_parameters(recipe.moe))} parameters"]
    if recipe.sequence_length:
        parts.append(f"sequences of {recipe.sequence_length:,} tokens")
    return ", ".join([*parts, recipe.distributed.precision, recipe.distributed.strategy])


def _facts(entries: list[dict]) -> Iterator[tuple[str, str]]:
    steps = [entry for entry in entries if "loss" in entry]
    last = steps[-1]
    yield "steps", f"{last['step']:,}" if _is_number(last.get("step")) else "unknown"
    if _is_number(last.get("tokens")):
        yield "tokens", _short(last["tokens"])
    if _is_number(last["loss"]):
        yield "last training loss", f"{last['loss']:.3f}"
    validation: dict = next((e["validation_loss"] for e in reversed(entries) if e.get("validation_loss")), {})
    for source, loss in validation.items():
        if _is_number(loss):
            yield f"validation, {source}", f"{loss:.3f}"
    rates = [entry["tokens_per_second"] for entry in steps if _is_number(entry.get("tokens_per_second"))]
    if rates:
        yield "tokens/s, median", _short(sorted(rates)[len(rates) // 2])


def _figures(
    entries: list[dict], ledger: list[dict], recipe: Recipe | None
) -> Iterator[tuple[str, str, go.Figure, bool]]:
    """Yield title, unit, plot, and whether it takes the page's whole width, of all that there are numbers for."""
    yield "Loss", "nats per target token, over optimizer steps", _loss_figure(entries), True
    if matrix := next((e for e in reversed(entries) if e.get("forgetting_matrix")), None):
        note = "nats per token on each domain after each phase; colour: how far it has risen since it was learned"
        yield "Forgetting", note, _matrix_figure(matrix), True
    yield from _expert_figures(entries)
    plots: list[tuple[str, str, str, float]] = [
        ("learning_rate", "Learning rate", "per step", 1.0),
        ("grad_norm", "Gradient norm", "L2 over all parameters, before clipping", 1.0),
        ("moe_aux_loss", "Balance of the experts", "the balancing loss, mean over layers; 1 is balanced", 1.0),
        ("moe_drop_rate", "Dropped visits", "percent of the tokens' visits to experts, mean over layers", 100.0),
        ("moe_router_entropy", "Entropy of the routers", "nats, mean over layers and tokens", 1.0),
        ("ewc_nats", "What is held", "the penalty of Elastic Weight Consolidation, nats per token", 1.0),
        ("ewc_grad_norm", "Gradient norm of the pull", "L2 over all parameters; the task's is dashed", 1.0),
        ("tokens_per_second", "Throughput", "tokens per second, all ranks together", 1.0),
        ("mfu", "Model FLOP/s utilization", "percent of the device's dense peak", 100.0),
        ("memory_bytes", "Memory", "peak of the main rank, GiB", 2.0**-30),
    ]
    for key, title, note, factor in plots:
        steps, values = _series(entries, key)
        if values:
            figure = _figure(260, logarithmic=key == "grad_norm" and max(values) > 20 * max(min(values), 1e-12) > 0)
            _add_line(figure, (steps, [value * factor for value in values]), title, MAIN)
            if key == "ewc_grad_norm":
                _add_line(figure, _series(entries, "task_grad_norm"), "the task's", SOURCE_COLORS[0], dash="dash")
            if key == "learning_rate":
                figure.update_yaxes(exponentformat="e")
            if key in ("tokens_per_second", "mfu", "memory_bytes", "moe_drop_rate"):
                figure.update_yaxes(rangemode="tozero")
            figure.update_layout(showlegend=False)
            yield title, note, figure, False
    consumed = tokens_by_source(ledger, recipe.sequence_length if recipe else None)
    if consumed:
        unit = "tokens" if recipe and recipe.sequence_length else "samples"
        mix = recipe.data.mix if recipe else {}
        yield (
            f"{unit.title()} by source",
            f"{unit} consumed, and their percentage; the tick is data.mix",
            _mix_figure(consumed, mix),
            False,
        )


def tokens_by_source(ledger: Iterable[Mapping[str, Any]], sequence_length: int | None) -> dict[str, int]:
    """Tokens of each source that a run has consumed by its ledger; samples where their length is not known."""
    totals: dict[str, int] = {}
    for entry in ledger:
        length = (entry.get("sequence_length", sequence_length) or 1) if sequence_length else 1
        for name, taken in (entry.get("sources") or {}).items():
            first, end = taken["samples"]
            totals[name] = totals.get(name, 0) + (end - first) * length
    return totals


def _loss_figure(entries: list[dict]) -> go.Figure:
    figure = _figure(420)
    steps, losses = _series(entries, "loss")
    if len(steps) > 60:
        _add_line(figure, (steps, losses), "training, each step", PALE, width=1)
        _add_line(figure, (steps, _smooth(losses)), "training, running mean", MAIN, width=2.5)
    else:
        _add_line(figure, (steps, losses), "training", MAIN, width=2.5)
    sources = list(dict.fromkeys(name for e in entries for name in e.get("validation_loss") or {}))
    for index, name in enumerate(sources):
        at = [entry for entry in entries if _is_number((entry.get("validation_loss") or {}).get(name))]
        points = [entry["step"] for entry in at], [entry["validation_loss"][name] for entry in at]
        color, dash = SOURCE_COLORS[index % len(SOURCE_COLORS)], DASHES[index % len(DASHES)]
        _add_line(figure, points, f"validation, {name}", color, dash=dash, marks=len(at) <= 40)
    entropy = next((e["unigram_entropy"] for e in entries if _is_number(e.get("unigram_entropy"))), None)
    if entropy is not None:
        ends = [min(steps, default=0), max(steps, default=1)]
        _add_line(figure, (ends, [entropy, entropy]), "unigram entropy", MUTED, dash="dash")
    return figure


def _matrix_figure(entry: Mapping[str, Any]) -> go.Figure:
    """A row after each phase, the first on top; a domain that was not yet learned is left blank."""
    names, phases, rows = entry["domains"], entry["phases"], entry["forgetting_matrix"]
    learned: dict[int, float] = {}
    risen = [
        [None if loss is None else loss - learned.setdefault(column, loss) for column, loss in enumerate(row)]
        for row in rows
    ]
    most = max([abs(value) for row in risen for value in row if value is not None] + [1e-3])
    figure = _figure(90 + 44 * len(phases))
    figure.add_heatmap(
        z=risen,
        x=[html.escape(name) for name in names],
        y=[html.escape(phase) for phase in phases],
        text=[["" if loss is None else f"{loss:.3f}" for loss in row] for row in rows],
        texttemplate="%{text}",
        # Blue is better than when it was learned, red is forgotten.
        colorscale=[[0.0, "#0072b2"], [0.5, "#f4f4f4"], [1.0, "#d55e00"]],
        zmin=-most,
        zmax=most,
        xgap=3,
        ygap=3,
        colorbar={"title": {"text": "nats"}, "thickness": 12},
        hovertemplate="%{x} after %{y}: %{text} nats, %{z:+.3f} since it was learned<extra></extra>",
    )
    figure.update_xaxes(title=None, side="top", showgrid=False)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_layout(hovermode="closest", margin={"l": 56, "r": 12, "t": 40, "b": 12})
    return figure


def _expert_figures(entries: list[dict]) -> Iterator[tuple[str, str, go.Figure, bool]]:
    """The load of every expert over the steps, and the two most telling numbers of every layer."""
    steps = [e for e in entries if _is_number(e.get("step")) and _is_table(e.get("expert_load"))]
    shape = [len(layer) for layer in steps[-1]["expert_load"]] if steps else []
    steps = [e for e in steps if [len(layer) for layer in e["expert_load"]] == shape]  # stages may differ
    if not steps:
        return
    loads = [[share * len(layer) for layer in e["expert_load"] for share in layer] for e in steps]
    names = [f"{layer}.{expert}" for layer, count in enumerate(shape) for expert in range(count)]
    note = (
        "visits of every expert (layer.expert) over its fair share, over optimizer steps; blue starves, red is crowded"
    )
    figure = _heat(([e["step"] for e in steps], loads), names, 1.0, "x fair", "%{y} at step %{x}: %{z:.2f} x its share")
    for line in itertools.accumulate(shape[:-1]):
        figure.add_hline(line - 0.5, line={"color": "#fff", "width": 2})
    yield "Load of the experts", note, figure, True
    for key, title, note, middle in (
        ("max_violation", "Busiest expert", "by how much it exceeds its fair share, each layer over steps", None),
        ("drop_rate", "Dropped visits by layer", "share of the visits that found no room, each layer over steps", None),
    ):
        rows = [(e["step"], e["moe_layers"][key]) for e in steps if key in (e.get("moe_layers") or {})]
        if rows and any(value for _, values in rows for value in values):
            points = [step for step, _ in rows], [values for _, values in rows]
            layers = [f"layer {n}" for n in range(len(shape))]
            yield title, note, _heat(points, layers, middle, "", "%{y} at step %{x}: %{z:.3f}"), False


def _heat(
    points: tuple[list[float], list[list[float]]], names: list[str], middle: float | None, unit: str, hover: str
) -> go.Figure:
    """Values of several things over steps, a row each; of a long run means over equal stretches of steps.

    Args:
        middle: the value that is neither too little nor too much; None where 0 is best.
    """
    steps, values = points
    size = math.ceil(len(steps) / MAX_COLUMNS)
    cuts = [slice(at, at + size) for at in range(0, len(steps), size)]
    columns = [[sum(column) / len(column) for column in zip(*values[cut], strict=True)] for cut in cuts]
    figure = _figure(max(220, 90 + 13 * len(names)))
    scale = [[0.0, "#0072b2"], [0.5, "#f4f4f4"], [1.0, "#d55e00"]] if middle else [[0.0, "#f4f4f4"], [1.0, "#d55e00"]]
    figure.add_heatmap(
        x=[steps[cut][-1] for cut in cuts],
        y=names,
        z=[[round(value, 4) for value in row] for row in zip(*columns, strict=True)],
        colorscale=scale,
        zmin=0.0,
        zmax=2 * middle if middle else None,
        colorbar={"title": {"text": unit}, "thickness": 12},
        hovertemplate=f"{hover}<extra></extra>",
    )
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False, dtick=max(1, len(names) // 40))
    figure.update_layout(hovermode="closest")
    return figure


def _mix_figure(consumed: Mapping[str, int], mix: Mapping[str, float]) -> go.Figure:
    total, weights = sum(consumed.values()) or 1, sum(mix.values()) or 1.0
    names = sorted(consumed.keys() | mix.keys(), key=lambda name: (mix.get(name, 0.0), consumed.get(name, 0)))
    labels = [f"{html.escape(name)} · {_short(consumed.get(name, 0))}" for name in names]
    shares = [100 * consumed.get(name, 0) / total for name in names]
    figure = _figure(260)
    figure.add_bar(
        x=shares,
        y=labels,
        orientation="h",
        marker_color=MAIN,
        width=0.55,
        name="consumed",
        hovertemplate="%{y}: %{x:.2f} %<extra></extra>",
    )
    if mix:
        wanted = [100 * mix.get(name, 0.0) / weights for name in names]
        figure.add_scatter(
            x=wanted,
            y=labels,
            mode="markers",
            marker={"symbol": "line-ns-open", "size": 26, "color": "#d55e00", "line": {"width": 3}},
            name="data.mix",
            hovertemplate="%{y}: %{x:.2f} % in data.mix<extra></extra>",
        )
    figure.update_xaxes(title=None, ticksuffix=" %", rangemode="tozero")
    figure.update_layout(hovermode="closest")
    return figure


def _figure(height: int, *, logarithmic: bool = False) -> go.Figure:
    figure = go.Figure()
    figure.update_layout(
        template="plotly_white",
        height=height,
        margin={"l": 56, "r": 12, "t": 12, "b": 40},
        font={"family": "system-ui, Segoe UI, Roboto, DejaVu Sans, sans-serif", "size": 13, "color": INK},
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.0, "xanchor": "left", "x": 0},
        hovermode="x unified",
    )
    figure.update_xaxes(
        title={"text": "step", "font": {"size": 13, "color": MUTED}},
        title_standoff=6,
        gridcolor=GRID,
        zeroline=False,
        linecolor=GRID,
    )
    figure.update_yaxes(gridcolor=GRID, zeroline=False, automargin=True, exponentformat="SI")
    if logarithmic:
        figure.update_yaxes(type="log", dtick=1)
    return figure


def _add_line(
    figure: go.Figure,
    points: tuple[Sequence[float], Sequence[float]],
    name: str,
    color: str,
    *,
    width: float = 2,
    dash: str = "solid",
    marks: bool = False,
) -> None:
    steps, values = _thin(*points)
    figure.add_scatter(
        x=steps,
        y=values,
        name=html.escape(name),
        mode="lines+markers" if marks or len(steps) == 1 else "lines",
        line={"color": color, "width": width, "dash": dash},
        marker={"size": 5},
        hovertemplate="%{y:.4g}",
    )


def _series(entries: Iterable[Mapping[str, Any]], key: str) -> Points:
    found = [(e["step"], e[key]) for e in entries if _is_number(e.get(key)) and _is_number(e.get("step"))]
    return [step for step, _ in found], [value for _, value in found]


def _smooth(values: Sequence[float]) -> list[float]:
    """Exponential mean over about a hundredth of the line, free of the start's bias (Kingma and Ba 2014, section 3)."""
    decay = 1 - 1 / max(2.0, min(len(values) / 100, 100.0))
    mean, smooth = 0.0, []
    for count, value in enumerate(values, 1):
        mean = decay * mean + (1 - decay) * value
        smooth.append(mean / (1 - decay**count))
    return smooth


def _thin(steps: Sequence[float], values: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    if len(steps) <= MAX_POINTS:
        return steps, values
    size = math.ceil(len(steps) / MAX_POINTS)
    cuts = [slice(at, at + size) for at in range(0, len(steps), size)]
    return [steps[cut][-1] for cut in cuts], [sum(values[cut]) / len(values[cut]) for cut in cuts]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_table(value: object) -> bool:
    return (
        isinstance(value, list) and bool(value) and all(isinstance(r, list) and all(map(_is_number, r)) for r in value)
    )


def _short(number: float) -> str:
    """Three digits and a unit: 1.23M."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"
