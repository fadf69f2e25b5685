"""Which rank is slower than the rest: its own time in a step, without the time it spends with or waiting for others."""

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
"""At the end of each stretch, over whose median ranks are compared: one slow step is no slow rank."""
LEAST_SECONDS = 0.01
"""By which a rank must exceed the median: below, it is noise."""
LISTED_RANKS = 64
"""Up to so many, each rank's time is written down."""


class StragglerWatch:
    """Times the last steps of each stretch of `every`, and compares the ranks at its end."""

    def __init__(self, heartbeat: Heartbeat, device: torch.device, every: int):
        self._heartbeat, self._device, self._every = heartbeat, device, every
        self._seconds: list[float] = []
        self._slow: set[int] = set()
        self._due = False
        self.entry: dict[str, Any] = {}
        """Of metrics.jsonl, about the last comparison."""

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Time the step of this number, where it is one to be timed."""
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
            torch.cuda.synchronize(self._device)
            spent = sum(begin.elapsed_time(end) for begin, end in events or ()) / 1e3
        else:
            spent = heartbeat.waited - waited
        self._seconds.append(max(time.perf_counter() - start - spent, 0.0))
        self._due = left == 0

    def slow_ranks(self, mesh: Mesh, factor: float) -> list[str]:
        """What to say of ranks that are slower than `factor` times the median. Every rank calls it, after each step."""
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
    """The ranks' times as they are written down."""
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
    """Ranks beyond `factor` times the median; of an even number, the lower one, so that of two the faster is it."""
    middle = median_low(seconds)
    return [rank for rank, value in enumerate(seconds) if value > max(factor * middle, middle + LEAST_SECONDS)]


def _words(rank: int, seconds: list[float], stages: list[int], slow: list[int]) -> str:
    middle = median_low(seconds)
    line = (
        f"rank {rank} is slow: {seconds[rank]:.3f} s of its own in a step, {seconds[rank] / middle:.1f} times the "
        f"median ({middle:.3f} s)"
    )
    peers = [one for one, stage in enumerate(stages) if stage == stages[rank]]
    if len(set(stages)) > 1 and set(peers) <= set(slow):
        return f"{line}. So are all of its pipeline stage ({stages[rank] + 1}): it may simply have more to do."
    return f"{line}. Others wait for it: look at its machine (igla-mega doctor)."
