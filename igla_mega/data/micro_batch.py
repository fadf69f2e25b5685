"""One micro-batch, as data loaders produce it and a model chunk consumes it."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor


class Routing(NamedTuple):
    """Facts about a micro-batch that the routers of a mixture of experts need. One value per micro-batch."""

    weights: Tensor | None = None
    """[B] fp32, weight of each row in the balancing loss: its number of targets, 0.5 per row of a preference pair."""
    real: Tensor | None = None
    """[S, B] bool, True for this rank's tokens that are not padding; None: no token is padding."""


class MicroBatch(NamedTuple):
    """B rows of S tokens. With context parallelism, S is this rank's part once the engine has sharded the batch.

    A batch of preference optimization holds 2B rows, each chosen answer before its rejected one.
    """

    tokens: Tensor
    """[B, S] int64."""
    labels: Tensor
    """[B, S] int64, the next tokens; or keys of the draws if labels are sampled from the model (Fisher)."""
    loss_mask: Tensor
    """[B, S] fp32, target mask: 0 for tokens without a target, else 1."""
    position_ids: Tensor
    """[B, S] int64; with a document mask they restart at 0 in each document."""
    documents: Sequence[Sequence[int]] | None = None
    """For each packed row, positions at which documents begin in the whole sequence, and the end of the last one."""
    reference: Tensor | None = None
    """[2B] fp32, log-probability of each answer under the reference model, in nats."""
    dropout_seed: tuple[int, int] | None = None
    """Seed of the run, and global number of the first row: adapters draw their dropout masks from both."""
    routing: Routing | None = None

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> "MicroBatch":
        """Return the micro-batch with `function` applied to each tensor of its rows."""
        changed: dict[str, Any] = {
            name: function(getattr(self, name)) for name in ROWS if getattr(self, name) is not None
        }
        return self._replace(**changed)


SEQUENCES = ("tokens", "labels", "loss_mask", "position_ids")
"""Fields with a sequence dimension: [B, S]."""
ROWS = (*SEQUENCES, "reference")
"""Fields that hold tensors with one entry per row."""
