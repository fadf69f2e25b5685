"""Test the machines of a run before it: every rank measures itself, pairs of ranks their link, a rank of each node its
disk and clock; who falls behind the hardware table or the others is named.
"""

import datetime
import difflib
import os
import platform
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from igla_mega.config.errors import ConfigError
from igla_mega.plan import hardware

Clock = Callable[[], float]
SHARED_SECONDS = 5
"""Until when the others must see a file that one node wrote: network file systems remember what was not there."""
DRIVER_SECONDS = 30
"""Until when nvidia-smi must have answered."""
MOST_ROUNDS = 15
"""Of pairs: a rank meets so many others at most."""


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


@dataclass
class Report:
    """What one rank found. Rates are FLOP or bytes a second, one way."""

    rank: int
    node: str
    device: str
    on_cpu: bool
    figures: dict[str, float] = field(default_factory=dict)
    expected: dict[str, float] = field(default_factory=dict)
    """Peaks of the table, for those figures that it has one for."""
    faults: list[str] = field(default_factory=list)
    """What is wrong whatever the limits."""


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


def node_name() -> str:
    """As the scheduler calls this machine."""
    return os.environ.get("SLURMD_NODENAME") or os.environ.get("NODE_NAME") or platform.node()


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
    names = _gather(node_name())
    seconds = 5.0 if full else 0.4
    report = Report(dist.get_rank(), names[dist.get_rank()], _device_name(device), device.type == "cpu")
    local = [rank for rank, name in enumerate(names) if name == report.node]
    report.expected = _expected(device, len(local))
    _meet()
    _measure_device(report, device, seconds)
    _meet()
    _measure_links(report, device, names, 16 if full else 4)
    report.figures["skew"], report.figures["skew error"] = clock_offset(clock)
    if report.rank == local[0]:
        _measure_disk(report, folder, 2**30 if full else 2**26)
    if len(set(names)) > 1:
        _look_for_shared(report, folder, leads=report.rank == local[0])
    return _gather(report)


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


def _gather(value: Any) -> list:
    """The value of every rank, by rank; over the host's network."""
    if dist.get_world_size() == 1:
        return [value]
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _meet() -> None:
    dist.all_reduce(torch.zeros(1))  # on the host: no kernel of the device is waited for


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _expected(device: torch.device, ranks_here: int) -> dict[str, float]:
    if device.type == "cuda":
        known = hardware.of_cuda_name(torch.cuda.get_device_name(device))
        if known is None:
            return {}
        peaks = {"matmul": known.bf16_flops, "copy": known.bandwidth, "host": known.host_link, "link": known.link}
        return {**peaks, "network": known.network, "memory": known.memory_bytes}
    machine = hardware.cpu()
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "matmul": machine.fp32_flops * min(1.0, torch.get_num_threads() / threads),
        "copy": machine.bandwidth / ranks_here,
        "link": machine.link,
        "network": machine.network,
    }


def _measure_device(report: Report, device: torch.device, seconds: float) -> None:
    figures, on_cpu = report.figures, device.type == "cpu"
    size, dtype = (768, torch.float32) if on_cpu else (8192, torch.bfloat16)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    first, product = a @ b, torch.empty_like(a)
    figures["matmul"] = 2.0 * size**3 / _seconds_of(lambda: torch.matmul(a, b, out=product), device, seconds)
    if not torch.equal(first, product):
        report.faults.append("matrix products: the same one twice gave two results")
    source, target = (torch.empty(2**25 if on_cpu else 2**30, dtype=torch.uint8, device=device) for _ in range(2))
    figures["copy"] = 2.0 * source.numel() / _seconds_of(lambda: target.copy_(source), device, seconds)
    if on_cpu:
        memory = psutil.virtual_memory()
        figures["memory"], figures["memory free"] = float(memory.total), float(memory.available)
        figures["threads"] = float(torch.get_num_threads())
        if clock := _cpu_clock():
            figures["clock"] = clock
        return
    page_locked = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
    on_device = torch.empty_like(page_locked, device=device)
    figures["host"] = page_locked.numel() / _seconds_of(
        lambda: on_device.copy_(page_locked, non_blocking=True), device, seconds
    )
    free, total = torch.cuda.mem_get_info(device)
    figures["memory"], figures["memory free"] = float(total), float(free + torch.cuda.memory_reserved(device))
    for _ in range(400):  # about a second of work, while the driver is asked
        torch.matmul(a, b, out=product)
    _ask_driver(report, str(torch.cuda.get_device_properties(device).uuid))
    torch.cuda.synchronize(device)


def _seconds_of(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Median duration of a call, over so many seconds of calls after one that does not count."""
    call()
    found: list[float] = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or not found:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def _cpu_clock() -> float | None:
    """Hertz of the fastest core, as the kernel sees it now."""
    try:
        found = re.findall(r"^cpu MHz\s*:\s*([\d.]+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return max(map(float, found)) * 1e6 if found else None


_ASKED = {
    "clocks.sm": "clock",
    "clocks.max.sm": "highest clock",
    "temperature.gpu": "degrees",
    "pcie.link.width.current": "PCIe lanes",
    "pcie.link.width.max": "most PCIe lanes",
    "ecc.errors.uncorrected.volatile.total": "memory errors",
}


def _ask_driver(report: Report, uuid: str) -> None:
    """What nvidia-smi says of a GPU: clocks under load, lanes, errors of its memory; unknown to it, left out."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return
    command = [program, f"--id=GPU-{uuid.removeprefix('GPU-')}", f"--query-gpu={','.join(_ASKED)}"]
    command.append("--format=csv,noheader,nounits")
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=DRIVER_SECONDS)
    except subprocess.TimeoutExpired:
        report.faults.append(f"nvidia-smi: no answer in {DRIVER_SECONDS} s: the driver hangs")
        return
    if done.returncode:
        report.faults.append(f"nvidia-smi ended with {done.returncode}: {(done.stdout + done.stderr).strip()[:200]}")
        return
    figures = report.figures
    for name, text in zip(_ASKED.values(), done.stdout.strip().split(","), strict=False):
        if re.fullmatch(r"[\d.]+", text.strip()):
            figures[name] = float(text) * (1e6 if "clock" in name else 1)
    if figures.get("memory errors", 0) > 0:
        report.faults.append(f"memory: {figures['memory errors']:.0f} uncorrectable errors since the driver started")
    if figures.get("PCIe lanes", 0) < figures.get("most PCIe lanes", 0):
        lanes = f"{figures['PCIe lanes']:.0f} of {figures['most PCIe lanes']:.0f}"
        report.faults.append(f"PCIe: {lanes} lanes in use: a riser or slot is loose")


def _measure_links(report: Report, device: torch.device, names: Sequence[str], repeats: int) -> None:
    """With each other rank of its machine in turn, then with the rank of its place on each other machine."""
    if len(names) == 1:
        return
    of_node = {name: [rank for rank, its in enumerate(names) if its == name] for name in dict.fromkeys(names)}
    place = of_node[report.node].index(report.rank)
    across = [ranks[place] for ranks in of_node.values() if len(ranks) > place]
    buffer = torch.zeros(2**22 if device.type == "cpu" else 2**26, dtype=torch.uint8, device=device)
    received = torch.empty_like(buffer)
    dist.all_reduce(buffer.view(torch.float32))  # NCCL wants all ranks in the first call of a group
    groups = {"link": (of_node[report.node], max(map(len, of_node.values()))), "network": (across, len(of_node))}
    for kind, (ranks, most) in groups.items():
        rates = []
        for partner in _partners(ranks.index(report.rank), len(ranks), most):
            _meet()
            if partner is not None:
                rates.append(_exchange(ranks[partner], buffer, received, repeats, names))
        if rates:
            report.figures[kind] = statistics.median(rates)
    _meet()
    started = time.perf_counter()
    dist.all_reduce(buffer.view(torch.float32))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    moved = 2.0 * (len(names) - 1) / len(names) * buffer.numel()
    report.figures["all-reduce"] = moved / (time.perf_counter() - started)


def _partners(place: int, count: int, most: int) -> list[int | None]:
    """Whom the player of a place meets, round by round, in a tournament of `count`; as many rounds as `most` play."""
    players, rounds = count + count % 2, most + most % 2 - 1
    found: list[int | None] = []
    for number in range(min(rounds, MOST_ROUNDS)):
        if number >= players - 1:
            found.append(None)
        elif place == players - 1:
            found.append(number)
        elif place == number:
            found.append(players - 1 if players == count else None)
        else:
            partner = (2 * number - place) % (players - 1)
            found.append(partner)
    return found


def _exchange(partner: int, buffer: torch.Tensor, received: torch.Tensor, repeats: int, names: Sequence[str]) -> float:
    """Send and receive at once; bytes a second, one way."""

    def both() -> None:
        for work in dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, buffer, partner), dist.P2POp(dist.irecv, received, partner)]
        ):
            work.wait()
        if buffer.is_cuda:
            torch.cuda.synchronize()

    try:
        both()  # makes the connection
        found = []
        for _ in range(repeats):
            started = time.perf_counter()
            both()
            found.append(time.perf_counter() - started)
    except RuntimeError as error:
        here = dist.get_rank()
        reason = str(error).splitlines()[0]
        raise RuntimeError(
            f"no link from rank {here} on {names[here]} to rank {partner} on {names[partner]}: {reason}"
        ) from None
    return buffer.numel() / statistics.median(found)


def clock_offset(clock: Clock = time.time, exchanges: int = 10) -> tuple[float, float]:
    """How far this rank's clock is ahead of rank 0's, and by how much that may be wrong; seconds.

    Of several exchanges with rank 0 that with the shortest round trip counts, as in NTP (RFC 5905, section 8).
    """
    rank, offset, error = dist.get_rank(), 0.0, 0.0
    for other in range(1, dist.get_world_size()):
        if rank == 0:
            for _ in range(exchanges):
                dist.recv(torch.zeros(1), other)
                came = clock()
                dist.send(torch.tensor([came, clock()], dtype=torch.float64), other)
        elif rank == other:
            best = float("inf")
            for _ in range(exchanges):
                theirs = torch.zeros(2, dtype=torch.float64)
                sent = clock()
                dist.send(torch.zeros(1), 0)
                dist.recv(theirs, 0)
                back = clock()
                came, left = theirs.tolist()
                round_trip = (back - sent) - (left - came)
                if round_trip < best:
                    best, offset, error = round_trip, ((sent - came) + (back - left)) / 2, abs(round_trip) / 2
    return offset, error


def _measure_disk(report: Report, folder: Path, size: int) -> None:
    """Write a large file and some small ones where the run will, each flushed to the disk."""
    block = os.urandom(2**23)  # what can be compressed would flatter some file systems
    path = folder / f".igla-doctor-{report.node}-{os.getpid()}"
    try:
        report.figures["disk free"] = float(shutil.disk_usage(folder).free)
        report.figures["disk"] = size / _write(path, block, size // len(block))
        report.figures["fsync"] = statistics.median(_write(path, block[:4096], 1) for _ in range(5))
        path.unlink()
    except OSError as error:
        path.unlink(missing_ok=True)
        report.faults.append(f"disk: {folder} cannot be written: {error.strerror or error}")


def _write(path: Path, block: bytes, times: int) -> float:
    started = time.perf_counter()
    with open(path, "wb", buffering=0) as file:
        for _ in range(times):
            file.write(block)
        os.fsync(file.fileno())
    return time.perf_counter() - started


def _look_for_shared(report: Report, folder: Path, *, leads: bool) -> None:
    """Checkpoints of several nodes are one folder: all must see what one wrote."""
    name = _gather(f".igla-doctor-shared-{os.getpid()}-{time.time_ns()}")[0]
    marker = folder / name
    if report.rank == 0:
        try:
            marker.write_text("")
        except OSError:
            marker = folder  # said by the test of the disk
    _meet()
    until = time.monotonic() + SHARED_SECONDS
    while leads and not marker.exists():
        if time.monotonic() > until:
            report.faults.append(f"disk: {folder} does not show what rank 0 wrote there: it is not shared")
            break
        time.sleep(0.1)
    _meet()
    if report.rank == 0 and marker != folder:
        marker.unlink(missing_ok=True)


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
