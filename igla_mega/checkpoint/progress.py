"""How far a run is, which checkpoints are kept, and how a save ended."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

from igla_mega.config.errors import ConfigError


@dataclass
class Progress:
    """How far a run is. Everything random is a function of the seed and the step, so this is all a resume needs."""

    step: int = 0
    """Optimizer steps taken."""
    samples: int = 0
    """Sequences consumed."""
    tokens: int = 0
    """Tokens consumed."""
    stage: int = 0
    """Stages finished: trained, evaluated and, where that is asked for, consolidated."""
    domain_losses: list[dict[str, float]] = field(default_factory=list)
    """After each of them that is a phase, the loss on each domain, nats per token."""
    before: dict[str, dict[str, float]] = field(default_factory=dict)
    """What was measured on each source before the first step of the stage at hand."""
    skipped: list[int] = field(default_factory=list)
    """Steps, counted from 1, whose samples are consumed without an update."""
    bad_steps: list[int] = field(default_factory=list)
    """Those of them that were bad themselves."""
    losses: list[float] = field(default_factory=list)
    """Of the last steps of the stage at hand, nats: what a spike is told by."""


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay."""

    keep_last: int
    """How many of the newest."""
    keep_every: int | None = None
    """Also every one whose step is a multiple of this."""
    always: frozenset[int] = frozenset()
    """Also those of these steps: what a later stage starts from."""

    def obsolete(self, steps: Iterable[int]) -> list[int]:
        """The steps, of those there are, whose checkpoints may go."""
        steps = sorted(steps)
        kept = {*steps[-self.keep_last :], *self.always}
        return [s for s in steps if s not in kept and not (self.keep_every and s % self.keep_every == 0)]


@dataclass(frozen=True)
class SaveOutcome:
    """How a save, or the copying of one to a remote folder, has ended."""

    step: int
    seconds: float
    """From the call, or the start of the copying, until it was whole."""
    bytes: int
    """Written by all ranks; 0 when it failed."""
    error: str | None
    """Why it failed, in words, with what still stands; None: it is whole."""
    where: Literal["shared", "local", "remote"]
    note: str | None = None
    """What else should be said of it."""


def read_progress(path: Path) -> Progress:
    """How far the run was that wrote this checkpoint."""
    file = path / "progress.json"
    try:
        return TypeAdapter(Progress).validate_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read ({error}).\n  Use another checkpoint.") from None
