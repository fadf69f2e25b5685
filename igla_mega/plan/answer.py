"""Forecasts as text for a terminal and as values for JSON."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from igla_mega.config.errors import ConfigError
from igla_mega.layout.hardware import GIB
from igla_mega.plan import card
from igla_mega.plan.calibration import NAMES
from igla_mega.plan.cost import FAILURES_SOURCE
from igla_mega.plan.forecast import Forecast, Part
from igla_mega.plan.memory import CUDA_SLACK, available
from igla_mega.plan.search import fixed_sizes, name_of

SHOWN_OTHERS = 5
"""Number of slower layouts listed per part."""


def text(found: Forecast) -> Iterator[str]:
    """Yield the lines of a plan."""
    hardware, gpus = found.hardware, found.gpus
    devices = f"{gpus} rank{'s' * (gpus > 1)} on {hardware.title}" if hardware.is_cpu else f"{gpus} x {hardware.title}"
    yield f"{found.name}: on {devices}"
    for part in found.parts:
        yield ""
        yield from _part(found, part)
    yield ""
    yield from _whole(found)
    if found.claim is not None:
        yield ""
        yield from _card(found)
    for title, lines in (
        ("Suggestions:", found.advice),
        ("Assumptions: values given by neither the recipe nor the card.", found.assumed),
        ("Warnings:", found.warnings),
    ):
        if lines:
            yield ""
            yield title
            yield from (f"  {line}" for line in lines)
    yield ""
    yield from _rates(found)


def _part(found: Forecast, part: Part) -> Iterator[str]:
    """Yield the lines of one part: layout, memory, step, messages and other layouts."""
    layout, memory, step, hardware = part.layout, part.memory, part.step, found.hardware
    if len(found.parts) > 1:
        yield f"[{part.name}]"
    yield f"layout    {name_of(layout)}, {layout.num_microbatches} micro-batches per step"
    yield f"          {layout.global_batch:,} x {_row(part)} tokens = {part.tokens_per_step:,} per step"
    space = available(hardware, layout)
    yield f"memory    {memory.total / GIB:.2f} GiB of {space / GIB:.1f} per rank at the peak ({memory.moment})"
    yield "          " + _list(memory.parts(), 1 / GIB, " GiB", least=0.005)
    if layout.pipeline > 1:
        totals = ", ".join(f"{one.total / GIB:.1f}" for one in stage_memories(part, found))
        yield f"          by pipeline stage: {totals} GiB"
    each = "" if hardware.is_cpu else f", {part.tokens_per_second / layout.world_size:,.0f} per device"
    yield (
        f"step      {_duration(step.seconds)}: {part.tokens_per_second:,.0f} tokens/s{each}, "
        f"{part.utilization(hardware):.1%} of the peak rate (recomputation not counted)"
    )
    yield "          " + _list(step.parts(), 1 / step.seconds, "", percent=True, least=0.001)
    for message in step.traffic:
        where = "within a machine" if message.link == "link" else "between machines"
        yield (
            f"          {message.collective} {where}: {message.bytes / 1e9:,.3g} GB, {_duration(message.seconds)}, "
            f"{_duration(message.exposed)} of it not overlapped"
        )
    others = part.found.others
    for one in others[:SHOWN_OTHERS]:
        yield f"other     {name_of(one.layout)}: {one.reason}"
    if len(others) > SHOWN_OTHERS:
        yield f"          and {len(others) - SHOWN_OTHERS} more"
    for sizes, reason in part.found.refused[:2]:
        yield f"refused   {sizes}: {reason}"
    if len(part.found.refused) > 2:
        yield f"          and {len(part.found.refused) - 2} more"


def _row(part: Part) -> str:
    """Return the shape of a sample as text: `8,192`, or `2 x 2,048` for a pair."""
    return (
        f"{part.layout.rows_per_sample} x {part.layout.sequence_length:,}"
        if part.layout.rows_per_sample > 1
        else (f"{part.layout.sequence_length:,}")
    )


def stage_memories(part: Part, found: Forecast):
    """Return the memory of every pipeline rank of a part."""
    from igla_mega.plan.memory import of_stages

    return of_stages(part.recipe, part.layout, found.hardware)


def _whole(found: Forecast) -> Iterator[str]:
    """Yield the lines on the whole run: time, failures, cost and energy."""
    for part in found.parts:
        run = part.run
        name = f"{part.name}: " if len(found.parts) > 1 else ""
        yield (
            f"run       {name}{part.steps:,} steps, {part.tokens / 1e9:,.4g}B tokens: {_duration(run.seconds)} "
            f"(training {_duration(run.steps * run.step_seconds)}, evaluation {_duration(run.evaluation_seconds)}, "
            f"Fisher {_duration(run.fisher_seconds)}, checkpoints {_duration(run.checkpoint_seconds)}, "
            f"failures {_duration(run.failure_seconds)})"
        )
        if not found.hardware.is_cpu:
            yield (
                f"          {run.failures:.2g} failures expected; a checkpoint stops training for "
                f"{_duration(run.checkpoint_stall_seconds)}; optimum interval {run.best_checkpoint_steps:,} steps "
                f"(Young, Daly), interval in the recipe {run.checkpoint_every_steps:,}"
            )
    hours = "CPU-hours" if found.hardware.is_cpu else "GPU-hours"
    devices = found.device_hours / (found.gpus if found.hardware.is_cpu else 1)
    yield (
        f"cost      {found.days:,.3g} days, {devices:,.4g} {hours}, ${found.dollars:,.4g} at ${found.price:g} an hour "
        f"({found.price_source}), {found.energy:,.4g} kWh without cooling"
    )


def _card(found: Forecast) -> Iterator[str]:
    """Yield the claims of the card next to the plan, and their contradictions."""
    claim = found.claim
    assert claim is not None
    phases = f" x {claim.phases} phases" if claim.phases > 1 else ""
    cheap, dear = claim.implied_price
    yield f"the card  {claim.gpus} x {claim.gpu}, {claim.time}, ${claim.dollars:,.0f}{phases}"
    yield (
        f"          plan: {found.gpus} x {found.hardware.name}, {_duration(found.days * 86400)}, "
        f"${found.dollars:,.4g}{' for all phases' if claim.phases > 1 else ''}"
    )
    low, high = utilization_of_card(found)
    data = ", for the assumed data," if found.data_is_assumed else ""
    yield (
        f"          its time implies {_percent(low)} to {_percent(high)} of the peak of the GPUs{data} and its cost "
        f"${cheap:.2f} to ${dear:.2f} per GPU-hour"
    )
    for line in found.contradictions:
        yield f"          {line}"


def utilization_of_card(found: Forecast) -> tuple[float, float]:
    """Return the model FLOP utilization implied by the time and the GPUs of the card: longest, shortest time."""
    from igla_mega.layout.hardware import find

    assert found.claim is not None
    peak = find(found.claim.gpu).peak(found.parts[0].recipe.distributed.precision)
    return card.implied_utilization(found.claim, found.flops, peak)


def _rates(found: Forecast) -> Iterator[str]:
    """Yield the rates of the plan, each with its source."""
    rates, path = found.calibration.rates, found.calibration.path
    yield f"rates     {'from ' + str(path) if path else 'all assumed: none measured on this hardware'}"
    fp8 = any(part.recipe.distributed.precision == "FP8" for part in found.parts)
    for name in (name for name in NAMES if fp8 or name != "gemm_fp8"):
        yield f"          {name}: {getattr(rates, name)}"
    yield f"          peaks, memory, links: {found.hardware.source}"
    if not found.hardware.is_cpu:
        yield f"          failures: {FAILURES_SOURCE}; allocator slack {CUDA_SLACK:.0%}: assumed"


def scaling(table: Sequence[tuple[int, Forecast | ConfigError, str]]) -> Iterator[str]:
    """Yield a table over numbers of devices, and a plot of tokens per second.

    Args:
        table: number of devices, forecast or error, and the change to the recipe, if any.
    """
    yield f"{'GPUs':>6} {'tokens/s':>13} {'MFU':>6} {'scaling':>8} {'days':>9} {'cost':>12} {'GiB':>6}  layout"
    first: tuple[int, float] | None = None
    for gpus, found, note in table:
        if not isinstance(found, Forecast):
            yield f"{gpus:6}  {found.breaches[0].splitlines()[0]}"
            continue
        part = found.parts[0]
        rate = part.tokens_per_second
        first = first or (gpus, rate)
        share = rate / gpus / (first[1] / first[0])
        yield (
            f"{gpus:6} {rate:13,.0f} {part.utilization(found.hardware):6.1%} {share:8.1%} {found.days:9,.3g} "
            f"{'$' + format(found.dollars, ',.0f'):>12} {part.memory.total / GIB:6.1f}  {name_of(part.layout)}"
        )
        if note:
            yield f"{'':6} {note}"
    points = [(gpus, found.parts[0].tokens_per_second) for gpus, found, _ in table if isinstance(found, Forecast)]
    if len(points) > 1:
        yield ""
        yield from plot(points)


PLOT_ROWS, PLOT_COLUMNS = 12, 56
"""Size of the plot in characters; with its margin it fits a terminal of 80 columns."""


def plot(points: Sequence[tuple[int, float]]) -> Iterator[str]:
    """Draw tokens per second over devices on logarithmic axes; dots mark perfect scaling from the first point."""
    (fewest, first_rate), (largest, _) = points[0], points[-1]
    ideal = first_rate * largest / fewest
    low, high = math.log(min(rate for _, rate in points)), math.log(max(ideal, *(rate for _, rate in points)))
    grid = [[" "] * (PLOT_COLUMNS + 1) for _ in range(PLOT_ROWS + 1)]

    def place(gpus: float, rate: float) -> tuple[int, int]:
        across = (math.log(gpus) - math.log(fewest)) / max(math.log(largest) - math.log(fewest), 1e-9)
        up = (math.log(rate) - low) / max(high - low, 1e-9)
        return round((1 - up) * PLOT_ROWS), round(across * PLOT_COLUMNS)

    for column in range(PLOT_COLUMNS + 1):
        gpus = fewest * (largest / fewest) ** (column / PLOT_COLUMNS)
        row, _ = place(gpus, first_rate * gpus / fewest)
        grid[row][column] = "."
    for gpus, rate in points:
        row, column = place(gpus, rate)
        grid[row][column] = "o"
    yield f"tokens/s, up to {math.exp(high):,.0f}; o plan, . perfect scaling"
    yield from ("  |" + "".join(row).rstrip() for row in grid)
    yield "  +" + "-" * PLOT_COLUMNS
    yield f"   {fewest:<{PLOT_COLUMNS - 6}}{largest:>6} GPUs"


def values(found: Forecast) -> dict[str, Any]:
    """Return the forecast as values for JSON."""
    hardware = found.hardware
    return {
        "recipe": found.name,
        "hardware": {
            "name": hardware.name,
            "title": hardware.title,
            "memory_bytes": round(hardware.memory_bytes),
            "peak_flops": hardware.peak(found.parts[0].recipe.distributed.precision),
            "source": hardware.source,
        },
        "gpus": found.gpus,
        "days": found.days,
        "hours": found.days * 24,
        "gpu_hours": found.device_hours / (found.gpus if hardware.is_cpu else 1),
        "price_per_gpu_hour": found.price,
        "price_source": found.price_source,
        "dollars": found.dollars,
        "energy_kwh": found.energy,
        "tokens": found.tokens,
        "tokens_per_second": found.parts[0].tokens_per_second,
        "mfu": found.parts[0].utilization(hardware),
        "memory_bytes_per_rank": max(part.memory.total for part in found.parts),
        "parts": [_part_values(found, part) for part in found.parts],
        "card": _card_values(found),
        "advice": list(found.advice),
        "assumed": list(found.assumed),
        "warnings": list(found.warnings),
        "calibration": str(found.calibration.path) if found.calibration.path else None,
        "rates": {
            name: {"value": rate.value, "measured": rate.measured, "source": rate.source}
            for name in NAMES
            for rate in [getattr(found.calibration.rates, name)]
        },
    }


def _part_values(found: Forecast, part: Part) -> dict[str, Any]:
    """Return one part as values for JSON."""
    layout, run = part.layout, part.run
    return {
        "name": part.name,
        "parameters": part.recipe.model.num_parameters(part.recipe.moe) if part.recipe.model else None,
        "layout": {
            "strategy": layout.strategy,
            "data_parallel": layout.data,
            **fixed_sizes(layout),
            "num_microbatches": layout.num_microbatches,
            "global_batch": layout.global_batch,
            "sequence_length": layout.sequence_length,
        },
        "memory": {
            **part.memory.parts(),
            "total": part.memory.total,
            "available": round(available(found.hardware, layout)),
            "moment": part.memory.moment,
            "stages": [one.total for one in stage_memories(part, found)],
        },
        "step_seconds": part.step.seconds,
        "step_parts_seconds": part.step.parts(),
        "traffic": [message.__dict__ for message in part.step.traffic],
        "tokens_per_step": part.tokens_per_step,
        "tokens_per_second": part.tokens_per_second,
        "tokens_per_second_per_gpu": part.tokens_per_second / layout.world_size,
        "mfu": part.utilization(found.hardware),
        "steps": part.steps,
        "tokens": part.tokens,
        "days": run.days,
        "evaluation_seconds": run.evaluation_seconds,
        "fisher_seconds": run.fisher_seconds,
        "checkpoint_stall_seconds": run.checkpoint_stall_seconds,
        "checkpoint_seconds": run.checkpoint_seconds,
        "best_checkpoint_steps": run.best_checkpoint_steps,
        "failures": run.failures,
        "failure_seconds": run.failure_seconds,
        "others": [{"layout": name_of(one.layout), "reason": one.reason} for one in part.found.others],
        "refused": [{"sizes": sizes, "reason": reason} for sizes, reason in part.found.refused],
    }


def _card_values(found: Forecast) -> dict[str, Any] | None:
    """Return the claims of the card as values for JSON, or None without a card."""
    claim = found.claim
    if claim is None:
        return None
    return {
        "number": claim.number,
        "gpus": claim.gpus,
        "gpu": claim.gpu,
        "time": claim.time,
        "phases": claim.phases,
        "days": [seconds * claim.phases / 86400 for seconds in claim.seconds],
        "dollars": claim.dollars * claim.phases,
        "implied_price": list(claim.implied_price),
        "implied_mfu": list(utilization_of_card(found)),
        "contradictions": list(found.contradictions),
    }


def _list(parts: Mapping[str, float], factor: float, unit: str, *, percent: bool = False, least: float = 0.0) -> str:
    """Return values of at least `least` after scaling as text, largest first: `gemm 61.0%, attention 20.1%`."""
    shown = sorted(((value * factor, name) for name, value in parts.items()), reverse=True)
    written = "{:.1%}" if percent else "{:.2f}"
    return ", ".join(f"{name} {written.format(value)}" for value, name in shown if value >= least) + unit


def _percent(share: float) -> str:
    return f"{share:.1%}" if share < 0.1 else f"{share:.0%}"


def _duration(seconds: float) -> str:
    """Return a time in the largest unit of which it has at least one and a half."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:,.3g} {unit}"
    return f"{seconds:.3g} s" if seconds >= 0.1 or seconds == 0 else f"{seconds * 1e3:.3g} ms"
