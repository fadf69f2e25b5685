"""How a recipe scales, on one page: tokens a second, days and cost over numbers of devices."""

import html
from collections.abc import Sequence
from pathlib import Path

import plotly.graph_objects as go

from igla_mega.config.errors import ConfigError
from igla_mega.plan.forecast import Forecast
from igla_mega.plan.search import name_of
from igla_mega.report.page import GRID, INK, MAIN, MUTED, PALE, STYLE

Row = tuple[int, Forecast | ConfigError, str]


def write_scaling(table: Sequence[Row], path: Path) -> Path:
    """Write a page with the plot and the table of a plan over several numbers of devices, all inside one file.

    Raises:
        ConfigError: no number of devices has a plan.
    """
    plans = [(gpus, found) for gpus, found, _ in table if isinstance(found, Forecast)]
    if not plans:
        raise ConfigError("--out: none of these numbers of GPUs has a layout; there is nothing to draw.")
    name, title = plans[0][1].name, plans[0][1].hardware.title
    body = _figure(plans).to_html(
        full_html=False, include_plotlyjs=True, config={"displaylogo": False, "displayModeBar": False}
    )
    cells = "".join(_row(row) for row in table)
    heads = ("GPUs", "tokens/s", "MFU", "days", "cost", "GiB a GPU", "layout")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(name)}: scaling</title>'
        f"<style>{STYLE} table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }} "
        "td, th { padding: 3px 12px 3px 0; text-align: left; }</style></head>\n"
        f"<body><header><h1>{html.escape(name)}</h1><p>planned on {html.escape(title)}; nothing here was run</p>"
        f"</header><main><section class='wide'>{body}</section></main>"
        f"<table><tr>{''.join(f'<th>{head}</th>' for head in heads)}</tr>{cells}</table></body></html>\n",
        encoding="utf-8",
    )
    return path


def _figure(plans: Sequence[tuple[int, Forecast]]) -> go.Figure:
    gpus = [count for count, _ in plans]
    rates = [found.parts[0].tokens_per_second for _, found in plans]
    ideal = [rates[0] * count / gpus[0] for count in gpus]
    figure = go.Figure()
    figure.add_scatter(x=gpus, y=ideal, mode="lines", line={"color": PALE, "dash": "dot"}, name="perfect scaling")
    figure.add_scatter(x=gpus, y=rates, mode="lines+markers", line={"color": MAIN}, name="the plan")
    figure.update_layout(
        height=420,
        margin={"l": 70, "r": 20, "t": 10, "b": 50},
        plot_bgcolor="#fff",
        font={"color": INK},
        legend={"x": 0.02, "y": 0.98},
    )
    for axis, title in ((figure.update_xaxes, "GPUs"), (figure.update_yaxes, "tokens per second")):
        axis(title={"text": title, "font": {"color": MUTED}}, type="log", gridcolor=GRID)
    return figure


def _row(row: Row) -> str:
    gpus, found, note = row
    if not isinstance(found, Forecast):
        return f"<tr><td>{gpus:,}</td><td colspan='6'>{html.escape(found.breaches[0].splitlines()[0])}</td></tr>"
    part = found.parts[0]
    cells = (
        f"{gpus:,}",
        f"{part.tokens_per_second:,.0f}",
        f"{part.utilization(found.hardware):.1%}",
        f"{found.days:,.3g}",
        f"${found.dollars:,.0f}",
        f"{part.memory.total / 2**30:.1f}",
        name_of(part.layout) + (f"; {note}" if note else ""),
    )
    return "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"
