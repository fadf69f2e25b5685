"""Write a page that shows how a recipe scales: tokens per second, days and cost by number of devices."""

import html
import math
from collections.abc import Sequence
from pathlib import Path

from igla_mega.config.errors import ConfigError
from igla_mega.plan.forecast import Forecast
from igla_mega.plan.search import name_of

Row = tuple[int, Forecast | ConfigError, str]

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 900, 380, 76, 14, 24, 44
STYLE = """
:root { color-scheme: light dark; --ink: light-dark(#1d2230, #e7eaf0); --muted: light-dark(#5d6675, #9aa4b4);
  --grid: light-dark(#e9ebef, #333b48); --line: light-dark(#0072b2, #5bb8f0); --pale: light-dark(#b97f00, #f0cf50); }
body { margin: 0 auto; max-width: 1100px; padding: 24px 28px 48px; color: var(--ink);
  background: light-dark(#fff, #12151b); font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
h1 { font-size: 25px; margin: 0; } p { color: var(--muted); margin: 0 0 16px; }
svg { width: 100%; height: auto; font-size: 13px; } svg text { fill: var(--muted); } svg line { stroke: var(--grid); }
polyline { fill: none; stroke-width: 2; } .plan { stroke: var(--line); } circle { fill: var(--line); }
.perfect { stroke: var(--pale); stroke-dasharray: 6 5; }
div { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin-top: 16px; }
td, th { padding: 3px 16px 3px 0; text-align: left; border-bottom: 1px solid var(--grid); }
"""


def write_scaling(table: Sequence[Row], path: Path) -> Path:
    """Write one HTML file with the plot and the table of a plan for several numbers of devices.

    Raises:
        ConfigError: there is no plan for any number of devices.
    """
    plans = [(gpus, found) for gpus, found, _ in table if isinstance(found, Forecast)]
    if not plans:
        raise ConfigError("--out: none of these numbers of GPUs has a layout, so there is nothing to draw.")
    name, title = html.escape(plans[0][1].name), html.escape(plans[0][1].hardware.title)
    heads = ("GPUs", "tokens/s", "MFU", "days", "cost", "GiB a GPU", "layout")
    cells = "".join(_row(row) for row in table)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}: scaling</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>\n'
        f"<body><h1>{name}</h1><p>planned on {title}; nothing here was measured</p>{_plot(plans)}"
        f"<div><table><tr>{''.join(f'<th>{head}</th>' for head in heads)}</tr>{cells}</table></div></body></html>\n",
        encoding="utf-8",
    )
    return path


def _plot(plans: Sequence[tuple[int, Forecast]]) -> str:
    """Return an SVG of tokens per second over the number of devices, both axes logarithmic."""
    gpus = [count for count, _ in plans]
    rates = [found.parts[0].tokens_per_second for _, found in plans]
    perfect = [rates[0] * count / gpus[0] for count in gpus]
    low, high = min(rates) / 1.3, max(*rates, *perfect) * 1.3
    spread = math.log(gpus[-1] / gpus[0]) or 1.0

    def x(count: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * math.log(count / gpus[0]) / spread

    def y(rate: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * math.log(rate / low) / math.log(high / low)

    def line(kind: str, values: Sequence[float]) -> str:
        points = " ".join(f"{x(count):.1f},{y(value):.1f}" for count, value in zip(gpus, values, strict=True))
        return f'<polyline class="{kind}" points="{points}"/>'

    parts = []
    for power in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1):
        at = y(10.0**power)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{10**power:,}</text>')
    for count in gpus:
        parts.append(f'<text x="{x(count):.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{count:,}</text>')
    parts += [line("perfect", perfect), line("plan", rates)]
    for count, rate in zip(gpus, rates, strict=True):
        label = f"{count:,} GPUs: {rate:,.0f} tokens/s"
        parts.append(f'<circle cx="{x(count):.1f}" cy="{y(rate):.1f}" r="4"><title>{label}</title></circle>')
    for number, (kind, words) in enumerate((("plan", "the plan"), ("perfect", "perfect scaling"))):
        at = TOP + 14 + 20 * number
        parts.append(f'<polyline class="{kind}" points="{LEFT + 14},{at} {LEFT + 50},{at}"/>')
        parts.append(f'<text x="{LEFT + 58}" y="{at + 4}">{words}</text>')
    parts.append(
        f'<text x="{WIDTH / 2:.0f}" y="{HEIGHT - 4}" text-anchor="middle">GPUs; tokens per second upwards</text>'
    )
    described = 'role="img" aria-label="tokens per second over GPUs"'
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" {described}>{"".join(parts)}</svg>'


def _row(row: Row) -> str:
    """Return a row of the table, with the first breach in place of numbers where there is no plan."""
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
