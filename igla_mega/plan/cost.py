"""What a run takes beside its steps, and what it costs: evaluation, checkpoints, failures, energy, money."""

import math
from dataclasses import dataclass

from igla_mega.layout.hardware import Hardware

FAILURES_PER_DEVICE_HOUR = 419 / (54 * 24 * 16384)
"""Unexpected interruptions of Llama 3's run: 419 in 54 days on 16,384 H100 (arXiv:2407.21783, section 3.3.4)."""
FAILURES_SOURCE = "assumed: Llama 3's 419 interruptions in 54 days on 16,384 GPUs (arXiv:2407.21783)"
RESTART_SECONDS = 900.0
"""From a failure to the next step: noticed, replaced, started, loaded. Assumed."""
STORAGE_BANDWIDTH = 2e9
"""Bytes a second that a machine writes to shared storage. Assumed."""


@dataclass(frozen=True)
class Run:
    """A whole run of one layout."""

    step_seconds: float
    steps: int
    evaluation_seconds: float
    fisher_seconds: float
    checkpoint_stall_seconds: float
    """Of one checkpoint."""
    checkpoint_seconds: float
    """Of all."""
    checkpoint_every_steps: int
    best_checkpoint_steps: int
    """Steps between checkpoints that lose least to saving and to failures (Young 1974, Daly 2006)."""
    failures: float
    """Expected number."""
    failure_seconds: float
    """Work done twice, and restarts."""
    devices: int

    @property
    def seconds(self) -> float:
        return (
            self.steps * self.step_seconds
            + self.evaluation_seconds
            + self.fisher_seconds
            + self.checkpoint_seconds
            + self.failure_seconds
        )

    @property
    def days(self) -> float:
        return self.seconds / 86400

    @property
    def device_hours(self) -> float:
        return self.seconds / 3600 * self.devices

    def money(self, price: float) -> float:
        """Dollars, at a price for an hour of one device."""
        return self.device_hours * price

    def energy(self, hardware: Hardware) -> float:
        """kWh that the machines draw at full load; their cooling is not in it."""
        share = 1 / self.devices if hardware.is_cpu else 1.0
        return self.device_hours * hardware.watts * share / 1000


def run(
    *,
    step_seconds: float,
    steps: int,
    evaluation_seconds: float,
    evaluate_every: int,
    fisher_seconds: float,
    saved_bytes: float,
    rank_bytes: float,
    asynchronous: bool,
    every_steps: int,
    devices: int,
    hardware: Hardware,
) -> Run:
    """Count a run's parts.

    Args:
        evaluation_seconds: of one evaluation.
        evaluate_every, every_steps: steps; 0: only at the end.
        saved_bytes: of a checkpoint, all ranks together.
        rank_bytes: the largest part of one rank.
        asynchronous: the run waits only until the part is copied to the machine's memory.
    """
    machines = max(1, math.ceil(devices / hardware.node_size))
    written = saved_bytes / (machines * STORAGE_BANDWIDTH)
    stall = rank_bytes / hardware.host_link + 0.5 if asynchronous else written
    saves = max(1, math.ceil(steps / every_steps)) if every_steps else 1
    evaluations = max(1, math.ceil(steps / evaluate_every)) if evaluate_every else 1
    between = 0.0 if hardware.is_cpu else 3600 / (FAILURES_PER_DEVICE_HOUR * devices)
    working = steps * step_seconds
    best = best_interval(stall, between) if between else working
    # An asynchronous save that is not on disk yet is of no use, and one may not begin before the last has ended.
    best = max(best, written)
    interval = min(working, (every_steps or steps) * step_seconds)
    failures = working / between if between else 0.0
    return Run(
        step_seconds=step_seconds,
        steps=steps,
        evaluation_seconds=evaluation_seconds * evaluations,
        fisher_seconds=fisher_seconds,
        checkpoint_stall_seconds=stall,
        checkpoint_seconds=stall * saves,
        checkpoint_every_steps=every_steps,
        best_checkpoint_steps=min(steps, max(1, round(best / step_seconds))),
        failures=failures,
        failure_seconds=failures * (interval / 2 + RESTART_SECONDS),
        devices=devices,
    )


def best_interval(stall: float, between_failures: float) -> float:
    """Seconds of work between two checkpoints (Daly 2006, "A higher order estimate of the optimum checkpoint
    interval for restart dumps", eq. 37).

    Args:
        stall: seconds that one checkpoint stops the run.
        between_failures: mean seconds from one failure of the whole job to the next.
    """
    if stall >= 2 * between_failures:
        return between_failures
    ratio = math.sqrt(stall / (2 * between_failures))
    return math.sqrt(2 * stall * between_failures) * (1 + ratio / 3 + ratio**2 / 9) - stall
