"""Test the machines of a run before it starts, and name those that are slower than expected.

Every rank measures its device, pairs of ranks measure their link, and one rank per node measures the disk and the
clock. The results are compared with the hardware table, with the other ranks and with limits.
"""

import datetime
import difflib
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.distributed as dist

from igla_mega.config.errors import ConfigError
from igla_mega.distributed.rendezvous import join
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
    """Limits that every node must meet; the table contains the manufacturers' peaks (`layout/hardware.py`)."""

    matmul: float = 0.5
    """Minimum rate of matrix products, as a fraction of the table's peak."""
    copy: float = 0.7
    """Minimum rate of copies in the device's memory, read and written, as a fraction of the table's bandwidth."""
    host: float = 0.3
    """Minimum rate of copies from the machine's memory to the GPU, as a fraction of the table's bandwidth."""
    link: float = 0.4
    """Minimum rate to another rank of the machine, as a fraction of the table's link."""
    network: float = 0.4
    """Minimum rate to a rank of another machine, as a fraction of the table's network."""
    peers: float = 0.8
    """Minimum of every rate above, as a fraction of the median over the ranks."""
    memory: float = 0.9
    """Minimum fraction of the memory that is free."""
    clock: float = 0.6
    """Minimum clock of a GPU under load, as a fraction of its maximum."""
    disk: float = 50e6
    """Minimum rate of flushed writes into the run folder, in bytes per second."""
    fsync: float = 0.5
    """Maximum time to flush a small file, in seconds."""
    skew: float = 0.5
    """Maximum difference between the clocks of two nodes, in seconds."""


# Loose, because the table describes one CPU, others differ widely, and other processes use the same cores.
ON_CPU = Limits(matmul=0.03, copy=0.03, link=0.01, network=0.01, peers=0.35, memory=0.02, disk=5e6, fsync=2.0)


@dataclass(frozen=True)
class Bad:
    """A limit that a rank does not meet."""

    node: str
    rank: int
    what: str
    """Message with the figure, its limit, and where the limit comes from."""


def parse_limits(given: Sequence[str], *, on_cpu: bool) -> Limits:
    """Return the limits for a kind of device, changed by the user's `name=value` options.

    Raises:
        ConfigError: names every unknown limit, and every value that is not a number above 0.
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
            number = -1.0  # rejected below, as NaN and infinity are
        if not 0 < number < float("inf"):
            breaches.append(f"--limit {text}: not a number above 0; write {name}={getattr(limits, name):g}.")
        else:
            limits = replace(limits, **{name: number})
    if breaches:
        raise ConfigError(*breaches)
    return limits


def start() -> torch.device:
    """Join the process group of this test, a group of one without a launcher, and return this rank's device.

    Not `mesh.init_process_groups`, because that module imports megatron-core, which this test does not need.
    """
    timeout = datetime.timedelta(seconds=60)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    backend = "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        join(backend, timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    return device


def test(device: torch.device, folder: Path, *, full: bool = False, clock: Clock = time.time) -> list[Report]:
    """Measure on all ranks of the default group at the same time, as in a run.

    Args:
        folder: where the run will write; the nearest existing parent is used, and no file remains.
        full: True to measure longer and with larger files, which shows the effects of heat and full caches.
        clock: this node's clock.

    Returns:
        The reports of all ranks, by rank; the same on every rank.
    """
    folder = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
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
    """Return every limit that a rank does not meet, in the order of the reports."""
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
    """Yield a message for every rate of a rank below the table's or its peers' bound."""
    for name, (words, unit) in _RATES.items():
        if name not in report.figures:
            continue
        value, bounds = report.figures[name], []
        if name in report.expected:
            share, peak = getattr(limits, name), report.expected[name]
            bounds.append((share * peak, f"{share:g} of the table's {_si(peak, unit)}"))
        peers = [other.figures[name] for other in reports if name in other.figures and other.device == report.device]
        # The higher of two medians: of two ranks, the slower one is then compared with the faster.
        median = statistics.median_high(peers)
        bounds.append((limits.peers * median, f"{limits.peers:g} of its peers' {_si(median, unit)}"))
        bound, reason = max(bounds)
        if value < bound:
            yield f"{words}: {_si(value, unit)}, below {_si(bound, unit)} ({reason}; --limit {name}, peers)"


def _out_of_bounds(report: Report, reports: Sequence[Report], limits: Limits) -> Iterator[str]:
    """Yield a message for every figure of a rank outside the limits of memory, clocks and disk."""
    figures = report.figures
    if figures["memory free"] < limits.memory * figures["memory"]:
        yield (
            f"memory: {_si(figures['memory free'], 'B')} of {_si(figures['memory'], 'B')} free, below "
            f"{limits.memory:g} of it: another process uses it (--limit memory)"
        )
    # Less than the table: another model of GPU, or a part of one.
    if "memory" in report.expected and figures["memory"] < 0.95 * report.expected["memory"]:
        yield f"memory: {_si(figures['memory'], 'B')}, the table has {_si(report.expected['memory'], 'B')}"
    if "clock" in figures and "highest clock" in figures and not report.on_cpu:
        bound = limits.clock * figures["highest clock"]
        if figures["clock"] < bound:
            yield (
                f"clock under load: {_si(figures['clock'], 'Hz')}, below {_si(bound, 'Hz')} ({limits.clock:g} of its "
                "maximum; --limit clock): limited by heat or power"
            )
    if "disk" in figures and figures["disk"] < limits.disk:
        yield f"disk: {_si(figures['disk'], 'B/s')} written, below {_si(limits.disk, 'B/s')} (--limit disk)"
    if figures.get("fsync", 0) > limits.fsync:
        yield f"disk: {figures['fsync']:.3f} s to flush a small file, above {limits.fsync:g} s (--limit fsync)"
    offset = figures["skew"] - _reference(reports)
    # The error of the measurement is subtracted: a slow network alone must not fail a node.
    if abs(offset) - figures["skew error"] > limits.skew:
        side = "ahead of" if offset > 0 else "behind"
        yield (
            f"clock: {abs(offset):.3f} s (+- {figures['skew error']:.3f}) {side} the others, above {limits.skew:g} s "
            "(--limit skew). Check its time service (NTP)."
        )


def _reference(reports: Sequence[Report]) -> float:
    """Return the median clock, in seconds ahead of rank 0's; of two that differ, rank 0's.

    Not simply rank 0's: if that one is wrong, every other node would be reported.
    """
    offsets = [report.figures["skew"] for report in reports]
    return min(offsets, key=lambda offset: sum(abs(offset - other) for other in offsets))


def text(reports: Sequence[Report], bad: Sequence[Bad]) -> str:
    """Return the results as text: a line per figure with median, worst value and its rank, then the failures."""
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
        median = statistics.median(values)
        line = f"  {words:32} {_si(median, unit):>14}"
        differs = abs(worst - median) > 0.01 * abs(median)
        line += f"  worst {_si(worst, unit)} ({whose.node}, rank {whose.rank})" if differs else ""
        line += f"  {worst / whose.expected[name]:.0%} of the table" if name in whose.expected else ""
        lines.append(line)
    if len(nodes) > 1:
        reference = _reference(reports)
        apart, name = max((abs(report.figures["skew"] - reference), report.node) for report in reports)
        lines.append(f"  {'largest clock difference':32} {_si(apart, 's'):>14}  ({name})")
    lines += [f"bad: {entry.node} (rank {entry.rank}): {entry.what}" for entry in bad]
    lines.append("" if bad else "  no fault was found")
    return "\n".join(lines).rstrip()


_SHOWN = {
    "memory": ("memory", "B", True),
    "memory free": ("memory, free", "B", True),
    "threads": ("threads of a rank", "", True),
    "clock": ("clock", "Hz", True),
    **{name: (words, unit, True) for name, (words, unit) in _RATES.items()},
    "all-reduce": ("all-reduce of all ranks, bus rate", "B/s", True),
    "disk": ("written to disk", "B/s", True),
    "disk free": ("disk, free", "B", True),
    "fsync": ("flush of a small file", "s", False),
}
"""Figures in the text: label, unit, and whether a lower value is worse."""


def as_json(reports: Sequence[Report], bad: Sequence[Bad], limits: Limits) -> dict:
    """Return the results for the option `--json`."""
    return {
        "ranks": [asdict(report) for report in reports],
        "bad": [asdict(entry) for entry in bad],
        "limits": asdict(limits),
    }


def _si(value: float, unit: str) -> str:
    """Return a number with three digits and its SI prefix, such as `1.98 GHz`."""
    prefixes = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"))
    factor, prefix = next((pair for pair in prefixes if abs(value) >= pair[0]), prefixes[-1])
    return f"{value / factor:.3g} {prefix}{unit}".rstrip()
