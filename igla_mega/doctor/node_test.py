"""Test the machines of a run before it: every rank measures itself, pairs of ranks their link, a rank of each node its
disk and clock; who falls behind the hardware table or the others is named.
"""

import datetime
import difflib
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.distributed as dist

from igla_mega.config.errors import ConfigError
from igla_mega.doctor.measure import (
    Clock,
    Report,
    clock_offset,
    device_name,
    expected,
    gather,
    look_for_shared,
    measure_device,
    measure_disk,
    measure_links,
    meet,
    node_name,
)


@dataclass(frozen=True)
class Limits:
    """What a node must reach. Shares of a table are of its makers' peaks (plan/hardware.py)."""

    matmul: float = 0.5
    """Least share of the table's matrix peak."""
    copy: float = 0.7
    """Least share of the table's memory bandwidth, read and written."""
    host: float = 0.3
    """Least share of the table's bandwidth from the machine's memory to the GPU."""
    link: float = 0.4
    """Least share of the table's link to another rank of the machine."""
    network: float = 0.4
    """Least share of the table's network to a rank of another machine."""
    peers: float = 0.8
    """Least share of what the ranks reach in the middle, of all the above."""
    memory: float = 0.9
    """Least share of its memory that is free."""
    clock: float = 0.6
    """Least share of its highest clock that a GPU runs at under load."""
    disk: float = 50e6
    """Least bytes a second that are written, flushed, into the run folder."""
    fsync: float = 0.5
    """Most seconds that flushing a small file takes."""
    skew: float = 0.5
    """Most seconds between the clocks of two nodes."""


# A table of one CPU says little of another, and cores are shared with whatever else runs.
ON_CPU = Limits(matmul=0.03, copy=0.03, link=0.01, network=0.01, peers=0.35, memory=0.02, disk=5e6, fsync=2.0)


@dataclass(frozen=True)
class Bad:
    node: str
    rank: int
    what: str
    """The figure, what it should be, and why, in words."""


def parse_limits(given: Sequence[str], *, on_cpu: bool) -> Limits:
    """Return the limits of this kind of device, with `name=value` of the user's.

    Raises:
        ConfigError: a name that is not one of them, or a value that is no number above 0; all of them at once.
    """
    limits, breaches = ON_CPU if on_cpu else Limits(), []
    known = [entry.name for entry in fields(Limits)]
    for text in given:
        name, _, value = text.partition("=")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"known are {', '.join(known)}."
            breaches.append(f"--limit {text}: no such limit; {hint}")
            continue
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        if not 0 < number < float("inf"):
            breaches.append(f"--limit {text}: not a number above 0; write {name}={getattr(limits, name):g}.")
        else:
            limits = replace(limits, **{name: number})
    if breaches:
        raise ConfigError(*breaches)
    return limits


def start() -> torch.device:
    """Join the ranks of this test, alone where no launcher has started several, and take this rank's device."""
    timeout = datetime.timedelta(seconds=60)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    backend = "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        store = dist.FileStore(os.path.join(tempfile.mkdtemp(prefix="igla-"), "store"), 1)
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    return device


def test(device: torch.device, folder: Path, *, full: bool = False, clock: Clock = time.time) -> list[Report]:
    """Measure on every rank of the default group, all at once as in a run.

    Args:
        folder: where the run will write, or below which; nothing stays there.
        full: longer, with larger files: what comes with heat and full caches shows.
        clock: of this node.

    Returns:
        The reports of all ranks, on all of them, by rank.
    """
    folder = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())
    names = gather(node_name())
    seconds = 5.0 if full else 0.4
    report = Report(dist.get_rank(), names[dist.get_rank()], device_name(device), device.type == "cpu")
    local = [rank for rank, name in enumerate(names) if name == report.node]
    report.expected = expected(device, len(local))
    meet()
    measure_device(report, device, seconds)
    meet()
    measure_links(report, device, names, 16 if full else 4)
    report.figures["skew"], report.figures["skew error"] = clock_offset(clock)
    if report.rank == local[0]:
        measure_disk(report, folder, 2**30 if full else 2**26)
    if len(set(names)) > 1:
        look_for_shared(report, folder, leads=report.rank == local[0])
    return gather(report)


def verdicts(reports: Sequence[Report], limits: Limits) -> list[Bad]:
    """Hold every rank to the table, to the others and to the limits; by node and rank."""
    bad = []
    for report in reports:
        found = [*report.faults, *_too_slow(report, reports, limits), *_out_of_bounds(report, reports, limits)]
        bad += [Bad(report.node, report.rank, what) for what in found]
    return bad


_RATES = {
    "matmul": ("matrix products", "FLOP/s"),
    "copy": ("copies in its memory", "B/s"),
    "host": ("copies from the machine's memory", "B/s"),
    "link": ("link within the machine", "B/s"),
    "network": ("link to other machines", "B/s"),
}


def _too_slow(report: Report, reports: Sequence[Report], limits: Limits) -> Iterator[str]:
    for name, (words, unit) in _RATES.items():
        if name not in report.figures:
            continue
        value, bounds = report.figures[name], []
        if name in report.expected:
            share, peak = getattr(limits, name), report.expected[name]
            bounds.append((share * peak, f"{share:g} of the table's {_si(peak, unit)}"))
        like = [other.figures[name] for other in reports if name in other.figures and other.device == report.device]
        middle = statistics.median_high(like)
        bounds.append((limits.peers * middle, f"{limits.peers:g} of its peers' {_si(middle, unit)}"))
        least, why = max(bounds)
        if value < least:
            yield f"{words}: {_si(value, unit)}, below {_si(least, unit)} ({why}; --limit {name}, peers)"


def _out_of_bounds(report: Report, reports: Sequence[Report], limits: Limits) -> Iterator[str]:
    figures = report.figures
    if figures["memory free"] < limits.memory * figures["memory"]:
        yield (
            f"memory: {_si(figures['memory free'], 'B')} of {_si(figures['memory'], 'B')} free, below "
            f"{limits.memory:g} of it: something else runs there (--limit memory)"
        )
    if "memory" in report.expected and figures["memory"] < 0.95 * report.expected["memory"]:
        yield f"memory: {_si(figures['memory'], 'B')}, the table has {_si(report.expected['memory'], 'B')}"
    if "clock" in figures and "highest clock" in figures and not report.on_cpu:
        least = limits.clock * figures["highest clock"]
        if figures["clock"] < least:
            yield (
                f"clock under load: {_si(figures['clock'], 'Hz')}, below {_si(least, 'Hz')} ({limits.clock:g} of its "
                "highest; --limit clock): heat or power holds it back"
            )
    if "disk" in figures and figures["disk"] < limits.disk:
        yield f"disk: {_si(figures['disk'], 'B/s')} written, below {_si(limits.disk, 'B/s')} (--limit disk)"
    if figures.get("fsync", 0) > limits.fsync:
        yield f"disk: {figures['fsync']:.3f} s to flush a small file, above {limits.fsync:g} s (--limit fsync)"
    offset = figures["skew"] - _reference(reports)
    if abs(offset) - figures["skew error"] > limits.skew:
        side = "ahead of" if offset > 0 else "behind"
        yield (
            f"clock: {abs(offset):.3f} s (+- {figures['skew error']:.3f}) {side} the others, above {limits.skew:g} s "
            "(--limit skew): is its time service running?"
        )


def _reference(reports: Sequence[Report]) -> float:
    """The clock that most agree with, seconds from rank 0's; of two that differ, rank 0's."""
    offsets = [report.figures["skew"] for report in reports]
    return min(offsets, key=lambda mine: sum(abs(mine - other) for other in offsets))


def text(reports: Sequence[Report], bad: Sequence[Bad]) -> str:
    """What was found, a line a figure: in the middle, the worst, and whose it is; then the bad nodes."""
    nodes = list(dict.fromkeys(report.node for report in reports))
    devices = ", ".join(dict.fromkeys(report.device for report in reports))
    ranks = f"{len(reports)} rank{'s' if len(reports) > 1 else ''}"
    lines = [f"{len(nodes)} node{'s' if len(nodes) > 1 else ''}, {ranks}, {devices}"]
    for name, (words, unit, lower_is_worse) in _SHOWN.items():
        found = [(report.figures[name], report) for report in reports if name in report.figures]
        if not found:
            continue
        values = [value for value, _ in found]
        worst, whose = (min if lower_is_worse else max)(found, key=lambda pair: pair[0])
        middle = statistics.median(values)
        line = f"  {words:32} {_si(middle, unit):>14}"
        differs = abs(worst - middle) > 0.01 * abs(middle)
        line += f"  worst {_si(worst, unit)} ({whose.node}, rank {whose.rank})" if differs else ""
        line += f"  {worst / whose.expected[name]:.0%} of the table" if name in whose.expected else ""
        lines.append(line)
    if len(nodes) > 1:
        reference = _reference(reports)
        apart, name = max((abs(report.figures["skew"] - reference), report.node) for report in reports)
        lines.append(f"  {'clocks apart, most':32} {_si(apart, 's'):>14}  ({name})")
    lines += [f"bad: {entry.node} (rank {entry.rank}): {entry.what}" for entry in bad]
    lines.append("" if bad else "  nothing bad was found")
    return "\n".join(lines).rstrip()


_SHOWN = {
    "memory": ("memory", "B", True),
    "memory free": ("memory, free", "B", True),
    "threads": ("threads of a rank", "", True),
    "clock": ("clock", "Hz", True),
    **{name: (words, unit, True) for name, (words, unit) in _RATES.items()},
    "all-reduce": ("all-reduce of all ranks, of bus", "B/s", True),
    "disk": ("written to disk", "B/s", True),
    "disk free": ("disk, free", "B", True),
    "fsync": ("a small file, flushed", "s", False),
}


def as_json(reports: Sequence[Report], bad: Sequence[Bad], limits: Limits) -> dict:
    return {
        "ranks": [asdict(report) for report in reports],
        "bad": [asdict(entry) for entry in bad],
        "limits": asdict(limits),
    }


def _si(value: float, unit: str) -> str:
    """A number with three digits and the prefix that fits."""
    prefixes = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"))
    factor, prefix = next((pair for pair in prefixes if abs(value) >= pair[0]), prefixes[-1])
    return f"{value / factor:.3g} {prefix}{unit}".rstrip()
