"""One stage of a run, built: everything that the training loop needs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from igla_mega.checkpoint.progress import Progress
from igla_mega.checkpoint.store import CheckpointWriter
from igla_mega.config.schema import Recipe
from igla_mega.data.batches import BatchShard, Dataset
from igla_mega.data.tokenizer import Tokenizer
from igla_mega.engine.step import Engine
from igla_mega.evaluate import needle
from igla_mega.layout.stages import Stage
from igla_mega.train.consolidation import notes
from igla_mega.train.stop_signal import StopRequest

if TYPE_CHECKING:
    from igla_mega.evaluate.harness import Harness


@dataclass(frozen=True)
class Prepared:
    """What a stage's evaluations need beside the model."""

    tokenizer: Tokenizer | None = None
    haystack: needle.Haystack | None = None
    harness: "Harness | None" = None
    """On the main rank alone."""


NOTHING = Prepared()


@dataclass(frozen=True)
class Run:
    """One stage, built: everything the loop needs, and nothing that changes."""

    recipe: Recipe
    recipe_yaml: str
    engine: Engine
    corpus: Dataset
    share: BatchShard
    writer: CheckpointWriter
    device: torch.device
    stage: Stage
    last_step: int
    """Where this call stops: the stage's last step, or earlier when asked to."""
    peak_flops: float | None
    """Dense peak of one device in the training's precision, FLOP/s; None where it is not known."""
    stop: StopRequest
    rewind: Callable[[Progress], bool]
    """Makes engine and progress what they were at the last checkpoint; False where the stage has none."""
    texts: Mapping[str, str] = field(default_factory=dict)
    """More files of a checkpoint, name -> text."""
    prepared: Prepared = NOTHING
    """What the stage's evaluations need beside the model."""

    def save(self, progress: Progress, *, local: bool = False) -> None:
        """Save all that a resume needs, as the checkpoint of this step; `local`: on this node's own disk."""
        texts = {**self.texts, **notes(self.engine.ewc)}
        self.writer.save(self.engine.states(), progress, self.recipe_yaml, texts, local=local)
