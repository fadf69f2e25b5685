"""Measure one machine of a run: its device, links, clock, disk and shared storage."""

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

# Property of nvidia-smi: name of the figure.
_DRIVER_FIGURES = {
    "clocks.sm": "clock",
    "clocks.max.sm": "highest clock",
    "temperature.gpu": "degrees",
    "pcie.link.width.current": "PCIe lanes",
    "pcie.link.width.max": "most PCIe lanes",
    "ecc.errors.uncorrected.volatile.total": "memory errors",
}
Clock = Callable[[], float]
"""Function that returns the current time in seconds."""

SHARED_SECONDS = 5
"""Maximum time until all nodes see a file that one has written: network file systems cache that it does not exist."""
DRIVER_SECONDS = 30
"""Maximum time for nvidia-smi to answer."""
MAX_ROUNDS = 15
"""Maximum number of other ranks with which a rank measures its link."""


@dataclass
class Report:
    """Measurements of one rank."""

    rank: int
    node: str
    device: str
    on_cpu: bool
    figures: dict[str, float] = field(default_factory=dict)
    """Measured values: rates in FLOP or bytes per second (links one way), sizes in bytes, clocks in Hz, times in s."""
    expected: dict[str, float] = field(default_factory=dict)
    """Peaks of the hardware table, for the figures that it contains."""
    faults: list[str] = field(default_factory=list)
    """Messages about faults that do not depend on the limits."""


def node_name() -> str:
    """Return the scheduler's name of this machine, else its host name."""
    return os.environ.get("SLURMD_NODENAME") or os.environ.get("NODE_NAME") or platform.node()


def gather(value: Any) -> list:
    """Return the values of all ranks, by rank, gathered over gloo; all ranks call it."""
    if dist.get_world_size() == 1:
        return [value]
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def meet() -> None:
    """Wait for all ranks, on the host: over NCCL the ranks would continue before the kernel has run."""
    dist.all_reduce(torch.zeros(1))


def device_name(device: torch.device) -> str:
    """Return the name of a device for reports."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def expected(device: torch.device, ranks_here: int) -> dict[str, float]:
    """Return the hardware table's peaks for a rank; empty for a GPU that the table does not contain.

    Args:
        ranks_here: number of ranks on this machine, which share a CPU's memory bandwidth.
    """
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
    """Measure matrix products, copies and memory of a device, and on CUDA its clocks under load.

    Args:
        seconds: duration of each measurement.
    """
    figures, on_cpu = report.figures, device.type == "cpu"
    size, dtype = (768, torch.float32) if on_cpu else (8192, torch.bfloat16)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    first, product = a @ b, torch.empty_like(a)
    figures["matmul"] = 2.0 * size**3 / _seconds_of(lambda: torch.matmul(a, b, out=product), device, seconds)
    # The same kernel on the same values must give the same bits: a difference is a fault of the hardware.
    if not torch.equal(first, product):
        report.faults.append("matrix products: the same product computed twice gave different results")
    source, target = (torch.empty(2**25 if on_cpu else 2**30, dtype=torch.uint8, device=device) for _ in range(2))
    # A copy reads and writes every byte, hence the factor of 2.
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
    # The memory that torch has reserved is used by this test alone, and free for a run.
    figures["memory"], figures["memory free"] = float(total), float(free + torch.cuda.memory_reserved(device))
    # About a second of queued work, because an idle GPU lowers its clock before the driver reports it.
    for _ in range(400):
        torch.matmul(a, b, out=product)
    ask_driver(report, str(torch.cuda.get_device_properties(device).uuid))
    torch.cuda.synchronize(device)


def _seconds_of(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Return the median duration of a call, in seconds.

    Args:
        seconds: duration of the measurement, after a first call as warm-up.
    """
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
    """Return the current clock of the fastest core in Hz, as reported by the kernel, or None."""
    try:
        found = re.findall(r"^cpu MHz\s*:\s*([\d.]+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return max(map(float, found)) * 1e6 if found else None


def ask_driver(report: Report, uuid: str) -> None:
    """Read clocks, PCIe lanes and memory errors of a GPU from nvidia-smi; values that it does not report are omitted.

    Args:
        uuid: the GPU's, because the index of nvidia-smi differs from torch's under CUDA_VISIBLE_DEVICES.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return
    command = [program, f"--id=GPU-{uuid.removeprefix('GPU-')}", f"--query-gpu={','.join(_DRIVER_FIGURES)}"]
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
    for name, text in zip(_DRIVER_FIGURES.values(), done.stdout.strip().split(","), strict=False):
        if re.fullmatch(r"[\d.]+", text.strip()):
            figures[name] = float(text) * (1e6 if "clock" in name else 1)
    if figures.get("memory errors", 0) > 0:
        report.faults.append(f"memory: {figures['memory errors']:.0f} uncorrectable errors since the driver started")
    if figures.get("PCIe lanes", 0) < figures.get("most PCIe lanes", 0):
        lanes = f"{figures['PCIe lanes']:.0f} of {figures['most PCIe lanes']:.0f}"
        report.faults.append(f"PCIe: {lanes} lanes in use: a riser or slot is loose")


def measure_links(report: Report, device: torch.device, names: Sequence[str], repeats: int) -> None:
    """Measure the links to the other ranks of the machine, to the corresponding ranks of others, and the all-reduce.

    Args:
        names: the node of every rank.
        repeats: number of exchanges per pair.
    """
    if len(names) == 1:
        return
    of_node = {name: [rank for rank, node in enumerate(names) if node == name] for name in dict.fromkeys(names)}
    # Ranks of the same local index use the same network card on every machine (one rail), as NCCL's rings do.
    index = of_node[report.node].index(report.rank)
    across = [ranks[index] for ranks in of_node.values() if len(ranks) > index]
    buffer = torch.zeros(2**22 if device.type == "cpu" else 2**26, dtype=torch.uint8, device=device)
    received = torch.empty_like(buffer)
    # NCCL creates its communicator in the first call of a group, which all ranks must make; pairs alone would hang.
    dist.all_reduce(buffer.view(torch.float32))
    groups = {"link": (of_node[report.node], max(map(len, of_node.values()))), "network": (across, len(of_node))}
    for kind, (ranks, largest) in groups.items():
        rates = []
        for partner in _partners(ranks.index(report.rank), len(ranks), largest):
            # All pairs of a round exchange at the same time, so that the links are measured under load. A rank without
            # a partner waits here too.
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
    # A ring all-reduce of S bytes sends 2 (N - 1) / N * S bytes over each link (bus bandwidth of nccl-tests).
    moved = 2.0 * (len(names) - 1) / len(names) * buffer.numel()
    report.figures["all-reduce"] = moved / (time.perf_counter() - started)


def _partners(index: int, count: int, largest: int) -> list[int | None]:
    """Return the partner of a member in each round of a round-robin tournament (circle method); None: no partner.

    Args:
        index: of the member in its group.
        count: size of its group.
        largest: size of the largest group, which determines the number of rounds: all groups meet in each round.
    """
    # An odd group gets a member that does not exist; whose partner it would be has none in that round.
    players, rounds = count + count % 2, largest + largest % 2 - 1
    found: list[int | None] = []
    for number in range(min(rounds, MAX_ROUNDS)):
        if number >= players - 1:
            found.append(None)
        elif index == players - 1:
            found.append(number)
        elif index == number:
            found.append(players - 1 if players == count else None)
        else:
            partner = (2 * number - index) % (players - 1)
            found.append(partner)
    return found


def _exchange(partner: int, buffer: torch.Tensor, received: torch.Tensor, repeats: int, names: Sequence[str]) -> float:
    """Send and receive at the same time; return the median rate, in bytes per second one way.

    Raises:
        RuntimeError: the partner cannot be reached; the message names both ranks and their nodes.
    """

    def both() -> None:
        """Exchange the buffers once."""
        for work in dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, buffer, partner), dist.P2POp(dist.irecv, received, partner)]
        ):
            work.wait()
        if buffer.is_cuda:
            torch.cuda.synchronize()

    try:
        both()  # the first exchange opens the connection, and is not timed
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
    """Return how far this rank's clock is ahead of rank 0's, and the maximum error of that, in seconds.

    Of several exchanges with rank 0, the one with the shortest round trip is used, as in NTP (RFC 5905, section 8).
    """
    rank, offset, error = dist.get_rank(), 0.0, 0.0
    for other in range(1, dist.get_world_size()):
        if rank == 0:
            for _ in range(exchanges):
                dist.recv(torch.zeros(1), other)
                received = clock()
                dist.send(torch.tensor([received, clock()], dtype=torch.float64), other)
        elif rank == other:
            best = float("inf")
            for _ in range(exchanges):
                answer = torch.zeros(2, dtype=torch.float64)
                sent = clock()
                dist.send(torch.zeros(1), 0)
                dist.recv(answer, 0)
                returned = clock()
                received, answered = answer.tolist()
                round_trip = (returned - sent) - (answered - received)
                if round_trip < best:
                    offset, error = ((sent - received) + (returned - answered)) / 2, abs(round_trip) / 2
                    best = round_trip
    return offset, error


def measure_disk(report: Report, folder: Path, size: int) -> None:
    """Measure the rate of writing a large file, and the time of flushing a small one, in the run's file system.

    Args:
        size: of the large file, in bytes.
    """
    # Random bytes: some file systems compress, and would write zeros faster than any checkpoint.
    block = os.urandom(2**23)
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
    """Write a block several times and flush the file; return the seconds taken."""
    started = time.perf_counter()
    with open(path, "wb", buffering=0) as file:
        for _ in range(times):
            file.write(block)
        os.fsync(file.fileno())
    return time.perf_counter() - started


def look_for_shared(report: Report, folder: Path, *, leads: bool) -> None:
    """Check that all nodes see a file that rank 0 writes: the ranks of all nodes write one checkpoint folder.

    Args:
        leads: True for the one rank per node that checks.
    """
    name = gather(f".igla-doctor-shared-{os.getpid()}-{time.time_ns()}")[0]
    marker = folder / name
    if report.rank == 0:
        try:
            marker.write_text("")
        except OSError:
            marker = folder  # `measure_disk` reports that the folder cannot be written
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
