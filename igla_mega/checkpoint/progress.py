"""Progress of a run, retention of its checkpoints, and the outcome of a save."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

from igla_mega.config.errors import ConfigError
from igla_mega.config.files import read_bytes


@dataclass
class Progress:
    """Progress of a run, stored in each checkpoint.

    All randomness is a function of the seed and the step, so no generator state is needed to resume.
    """

    step: int = 0
    """Optimizer steps taken."""
    samples: int = 0
    """Sequences consumed."""
    tokens: int = 0
    """Tokens consumed."""
    stage: int = 0
    """Stages finished: trained, evaluated and, if configured, consolidated."""
    domain_losses: list[dict[str, float]] = field(default_factory=list)
    """Loss on each domain after each finished stage that is a phase, in nats per token."""
    before: dict[str, dict[str, float]] = field(default_factory=dict)
    """Metrics of each source measured before the first step of the current stage."""
    skipped: list[int] = field(default_factory=list)
    """Steps, counted from 1, whose samples are consumed without an update."""
    bad_steps: list[int] = field(default_factory=list)
    """Those of `skipped` that were bad themselves; the others were skipped with them."""
    losses: list[float] = field(default_factory=list)
    """Losses of the last steps of the current stage, in nats per token; a spike is detected against them."""


@dataclass(frozen=True)
class Retention:
    """Rule for which checkpoints are kept."""

    keep_last: int
    """Number of newest checkpoints to keep."""
    keep_every: int | None = None
    """Keep also every checkpoint whose step is a multiple of this."""
    always: frozenset[int] = frozenset()
    """Keep also the checkpoints of these steps, from which a later stage starts."""

    def obsolete(self, steps: Iterable[int]) -> list[int]:
        """Return those of `steps` whose checkpoints may be deleted, ascending."""
        steps = sorted(steps)
        kept = {*steps[-self.keep_last :], *self.always}
        return [s for s in steps if s not in kept and not (self.keep_every and s % self.keep_every == 0)]


@dataclass(frozen=True)
class SaveOutcome:
    """Outcome of a save, or of the copy of a checkpoint to a remote folder."""

    step: int
    """Optimizer step of the checkpoint."""
    seconds: float
    """Duration from the call of `save`, or from the start of the copy, until the checkpoint was complete."""
    bytes: int
    """Bytes written by all ranks; 0 if it failed."""
    error: str | None
    """Message for the user with the cause and the remedy if it failed; None if the checkpoint is complete."""
    where: Literal["shared", "local", "remote"]
    """Destination: the folder that all nodes share, the nodes' own disks, or an object store."""
    note: str | None = None
    """Additional message for the user, one sentence a line."""


def read_progress(path: Path) -> Progress:
    """Return the progress of the run that wrote a checkpoint.

    Raises:
        ConfigError: `progress.json` is missing or invalid.
    """
    file = path / "progress.json"
    try:
        return TypeAdapter(Progress).validate_json(read_bytes(file))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read ({error}).\n  Use another checkpoint.") from None
