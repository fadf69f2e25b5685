"""Find stragglers: ranks whose own time in a step, without collectives and waiting for others, is above the median."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median, median_low
from typing import Any

import torch
import torch.distributed as dist

from igla_mega.distributed.mesh import Mesh
from igla_mega.engine.heartbeat import Heartbeat

SAMPLED_STEPS = 5
"""Number of steps timed before each comparison; their median is compared, so one slow step makes no straggler."""
LEAST_SECONDS = 0.01
"""Minimum excess over the median step time to count as a straggler, in seconds; less is noise."""
LISTED_RANKS = 64
"""Maximum number of ranks up to which metrics.jsonl lists the time of each one."""


class StragglerWatch:
    """Times the last `SAMPLED_STEPS` of every `every` steps, and compares the ranks after them."""

    def __init__(self, heartbeat: Heartbeat, device: torch.device, every: int):
        self._heartbeat, self._device, self._every = heartbeat, device, every
        self._seconds: list[float] = []
        self._slow: set[int] = set()
        self._due = False
        self.entry: dict[str, Any] = {}
        """Entry for metrics.jsonl of the comparison in this step; empty without one."""

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Time a step if it is one of those before a comparison. The context is open during the step."""
        self.entry = {}
        left = -number % self._every if self._every else SAMPLED_STEPS
        if left >= SAMPLED_STEPS:
            yield
            return
        heartbeat, cuda = self._heartbeat, self._device.type == "cuda"
        waited, start = heartbeat.waited, time.perf_counter()
        if cuda:
            heartbeat.events = []
        try:
            yield
        finally:
            events, heartbeat.events = heartbeat.events, None
        if cuda:
            # Kernels run after the host has queued them: only events give the time of collectives, and they may be
            # read only after the device has finished. That is why few steps are timed.
            torch.cuda.synchronize(self._device)
            spent = sum(begin.elapsed_time(end) for begin, end in events or ()) / 1e3
        else:
            spent = heartbeat.waited - waited
        self._seconds.append(max(time.perf_counter() - start - spent, 0.0))
        self._due = left == 0

    def slow_ranks(self, mesh: Mesh, factor: float) -> list[str]:
        """Return a line for each new straggler, above `factor` times the median. Every rank calls it each step."""
        if not self._due:
            return []
        own, self._seconds, self._due = median(self._seconds), [], False
        everyones = torch.zeros(mesh.world_size, 2, dtype=torch.float64, device=self._device)
        everyones[mesh.rank] = torch.tensor([own, mesh.pipeline.rank], dtype=torch.float64)
        dist.all_reduce(everyones)
        seconds = [round(value, 5) for value in everyones[:, 0].tolist()]
        stages = [int(stage) for stage in everyones[:, 1].tolist()]
        self.entry = {"rank_step_seconds": summary(seconds)}
        slow = slower(seconds, factor)
        new, self._slow = [rank for rank in slow if rank not in self._slow], set(slow)
        return [_words(rank, seconds, stages, slow) for rank in new]


def summary(seconds: list[float]) -> list[float] | dict[str, float]:
    """Return the ranks' times for metrics.jsonl: all of them, or a summary of many."""
    if len(seconds) <= LISTED_RANKS:
        return seconds
    slowest = max(seconds)
    return {
        "min": min(seconds),
        "median": median(seconds),
        "max": slowest,
        "slowest_rank": seconds.index(slowest),
    }


def slower(seconds: list[float], factor: float) -> list[int]:
    """Return the ranks above `factor` times the median.

    The lower of two middle values is taken for the median, so that of two ranks the faster one is the reference.
    """
    middle = median_low(seconds)
    return [rank for rank, value in enumerate(seconds) if value > max(factor * middle, middle + LEAST_SECONDS)]


def _words(rank: int, seconds: list[float], stages: list[int], slow: list[int]) -> str:
    """Return the message about a straggler; if its whole pipeline stage is slow, the layout may be the cause."""
    middle = median_low(seconds)
    line = (
        f"rank {rank} is slow: {seconds[rank]:.3f} s per step without waiting, {seconds[rank] / middle:.1f} times the "
        f"median ({middle:.3f} s)"
    )
    peers = [one for one, stage in enumerate(stages) if stage == stages[rank]]
    if len(set(stages)) > 1 and set(peers) <= set(slow):
        return f"{line}. All ranks of its pipeline stage ({stages[rank] + 1}) are: the stage may have more work."
    return f"{line}. The others wait for it: test its machine (igla-mega doctor)."
