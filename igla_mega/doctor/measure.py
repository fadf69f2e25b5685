"""Measure one machine of a run: device, links, clock, disk, shared storage."""

import os
import platform
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from igla_mega.layout import hardware

_ASKED = {
    "clocks.sm": "clock",
    "clocks.max.sm": "highest clock",
    "temperature.gpu": "degrees",
    "pcie.link.width.current": "PCIe lanes",
    "pcie.link.width.max": "most PCIe lanes",
    "ecc.errors.uncorrected.volatile.total": "memory errors",
}
Clock = Callable[[], float]


SHARED_SECONDS = 5
"""Until when the others must see a file that one node wrote: network file systems remember what was not there."""
DRIVER_SECONDS = 30
"""Until when nvidia-smi must have answered."""
MOST_ROUNDS = 15
"""Of pairs: a rank meets so many others at most."""


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


def node_name() -> str:
    """As the scheduler calls this machine."""
    return os.environ.get("SLURMD_NODENAME") or os.environ.get("NODE_NAME") or platform.node()


def gather(value: Any) -> list:
    """The value of every rank, by rank; over the host's network."""
    if dist.get_world_size() == 1:
        return [value]
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def meet() -> None:
    dist.all_reduce(torch.zeros(1))  # on the host: no kernel of the device is waited for


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def expected(device: torch.device, ranks_here: int) -> dict[str, float]:
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


def measure_device(report: Report, device: torch.device, seconds: float) -> None:
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
    ask_driver(report, str(torch.cuda.get_device_properties(device).uuid))
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


def ask_driver(report: Report, uuid: str) -> None:
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


def measure_links(report: Report, device: torch.device, names: Sequence[str], repeats: int) -> None:
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
            meet()
            if partner is not None:
                rates.append(_exchange(ranks[partner], buffer, received, repeats, names))
        if rates:
            report.figures[kind] = statistics.median(rates)
    meet()
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


def measure_disk(report: Report, folder: Path, size: int) -> None:
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


def look_for_shared(report: Report, folder: Path, *, leads: bool) -> None:
    """Checkpoints of several nodes are one folder: all must see what one wrote."""
    name = gather(f".igla-doctor-shared-{os.getpid()}-{time.time_ns()}")[0]
    marker = folder / name
    if report.rank == 0:
        try:
            marker.write_text("")
        except OSError:
            marker = folder  # said by the test of the disk
    meet()
    until = time.monotonic() + SHARED_SECONDS
    while leads and not marker.exists():
        if time.monotonic() > until:
            report.faults.append(f"disk: {folder} does not show what rank 0 wrote there: it is not shared")
            break
        time.sleep(0.1)
    meet()
    if report.rank == 0 and marker != folder:
        marker.unlink(missing_ok=True)
