"""One stage of a run, built: everything that the training loop needs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from igla_mega.checkpoint.progress import Progress
from igla_mega.checkpoint.store import CheckpointWriter
from igla_mega.config.schema import Recipe
from igla_mega.data.batches import BatchShard, Dataset
from igla_mega.data.tokenizer import Tokenizer
from igla_mega.engine.step import Engine
from igla_mega.evaluate.needle import Haystack
from igla_mega.layout.stages import Stage
from igla_mega.train.consolidation import notes
from igla_mega.train.session import Session

if TYPE_CHECKING:
    from igla_mega.evaluate.harness import Harness


@dataclass(frozen=True)
class Prepared:
    """What a stage's evaluations need besides the model."""

    tokenizer: Tokenizer | None = None
    haystack: Haystack | None = None
    harness: "Harness | None" = None
    """Set on the main rank only."""


NOTHING = Prepared()


@dataclass(frozen=True)
class Run:
    """One stage with its engine and data. Frozen: what changes while it trains is in `Progress`."""

    session: Session
    recipe: Recipe
    recipe_yaml: str
    engine: Engine
    corpus: Dataset
    share: BatchShard
    writer: CheckpointWriter
    stage: Stage
    last_step: int
    """Step at which this call stops: the stage's last step, or an earlier one (`--stop-after`)."""
    peak_flops: float | None
    """Dense peak of one device in the training precision, FLOP/s; None if unknown."""
    rewind: Callable[[Progress], bool]
    """Restores engine and progress from the last checkpoint; returns False if the stage has none."""
    texts: Mapping[str, str] = field(default_factory=dict)
    """Additional files of a checkpoint: name -> text."""
    prepared: Prepared = NOTHING

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one global batch."""
        layout = self.engine.layout
        return self.share.global_batch * layout.sequence_length * layout.rows_per_sample

    def save(self, progress: Progress, *, local: bool = False) -> None:
        """Save all that a resume needs as the checkpoint of this step.

        Args:
            local: to this node's own disk instead of the run folder.
        """
        with self.session.heartbeat.doing("saving", may_be_slow=True):
            texts = {**self.texts, **notes(self.engine.ewc)}
            self.writer.save(self.engine.states(), progress, self.recipe_yaml, texts, local=local)


@dataclass(frozen=True)
class NextStep:
    """What is known of a step before it is taken."""

    number: int
    """Counted from 1 over the whole run."""
    learning_rate: float
    data_step: int
    """Step of the stage's data that it reads, counted from 0."""
    spike_bound: float
    """Loss above which the step counts as a spike, in nats; inf when spikes are ignored."""
