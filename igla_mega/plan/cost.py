"""Time of a run outside its steps (evaluation, checkpoints, failures), and its energy."""

import math
from dataclasses import dataclass

from igla_mega.layout.hardware import Hardware

FAILURES_PER_DEVICE_HOUR = 419 / (54 * 24 * 16384)
"""Rate of unexpected interruptions: 419 in 54 days on 16,384 H100 for Llama 3 (arXiv:2407.21783, section 3.3.4)."""
FAILURES_SOURCE = "assumed: Llama 3's 419 interruptions in 54 days on 16,384 GPUs (arXiv:2407.21783)"
RESTART_SECONDS = 900.0
"""Time from a failure to the next step: detection, node replacement, start-up, loading. Assumed."""
STORAGE_BANDWIDTH = 2e9
"""Write bandwidth of one machine to shared storage, in bytes per second. Assumed."""


@dataclass(frozen=True)
class Run:
    """Times of a whole run in one layout."""

    step_seconds: float
    steps: int
    evaluation_seconds: float
    fisher_seconds: float
    checkpoint_stall_seconds: float
    """Time that one checkpoint stops training."""
    checkpoint_seconds: float
    """Time that all checkpoints stop training."""
    checkpoint_every_steps: int
    best_checkpoint_steps: int
    """Steps between checkpoints that minimize the time lost to saving and failures (Young 1974, Daly 2006)."""
    failures: float
    """Expected number of failures."""
    failure_seconds: float
    """Time of repeated work and restarts."""
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

    def energy(self, hardware: Hardware) -> float:
        """Return the energy of the machines at full load in kWh, without cooling."""
        share = 1 / self.devices if hardware.is_cpu else 1.0
        return self.device_hours * hardware.watts * share / 1000


@dataclass(frozen=True)
class Work:
    """What a run does, as numbers."""

    step_seconds: float
    steps: int
    evaluation_seconds: float
    """Time of one evaluation."""
    evaluate_every: int
    """Steps between evaluations; 0: only at the end."""
    fisher_seconds: float
    saved_bytes: float
    """Size of a checkpoint, all ranks together."""
    rank_bytes: float
    """Largest shard of one rank."""
    asynchronous: bool
    """True if training waits only for the copy to host memory."""
    every_steps: int
    """Steps between checkpoints; 0: only at the end."""
    devices: int


def run(work: Work, hardware: Hardware) -> Run:
    """Return the times of a run."""
    machines = max(1, math.ceil(work.devices / hardware.node_size))
    written = work.saved_bytes / (machines * STORAGE_BANDWIDTH)
    # Half a second for the collectives and file handling of a save. Assumed.
    stall = work.rank_bytes / hardware.host_link + 0.5 if work.asynchronous else written
    saves = max(1, math.ceil(work.steps / work.every_steps)) if work.every_steps else 1
    evaluations = max(1, math.ceil(work.steps / work.evaluate_every)) if work.evaluate_every else 1
    between = 0.0 if hardware.is_cpu else 3600 / (FAILURES_PER_DEVICE_HOUR * work.devices)
    working = work.steps * work.step_seconds
    best = best_interval(stall, between) if between else working
    # A save cannot start before the previous one is on disk.
    best = max(best, written)
    interval = min(working, (work.every_steps or work.steps) * work.step_seconds)
    failures = working / between if between else 0.0
    return Run(
        step_seconds=work.step_seconds,
        steps=work.steps,
        evaluation_seconds=work.evaluation_seconds * evaluations,
        fisher_seconds=work.fisher_seconds,
        checkpoint_stall_seconds=stall,
        checkpoint_seconds=stall * saves,
        checkpoint_every_steps=work.every_steps,
        best_checkpoint_steps=min(work.steps, max(1, round(best / work.step_seconds))),
        failures=failures,
        # A failure loses half an interval on average.
        failure_seconds=failures * (interval / 2 + RESTART_SECONDS),
        devices=work.devices,
    )


def best_interval(stall: float, between_failures: float) -> float:
    """Return the optimum time between two checkpoints in seconds.

    Daly 2006, "A higher order estimate of the optimum checkpoint interval for restart dumps", eq. 37.

    Args:
        stall: time that one checkpoint stops the run, in seconds.
        between_failures: mean time between failures of the whole job, in seconds.
    """
    if stall >= 2 * between_failures:
        return between_failures
    ratio = math.sqrt(stall / (2 * between_failures))
    return math.sqrt(2 * stall * between_failures) * (1 + ratio / 3 + ratio**2 / 9) - stall
