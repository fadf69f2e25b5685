"""One optimizer step, and one validation pass."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import nn

from igla_mega.model.shards import Slot
from igla_mega.objective.ewc import Ewc, Pull
from igla_mega.objective.language import Batch, forward_step
from igla_mega.ops.zigzag import zigzag_shard
from igla_mega.parallel import Axis, Mesh
from igla_mega.plan.layout import Layout
from igla_mega.train.optimizer import Optimizer


@dataclass(frozen=True)
class Engine:
    """What takes a step: this rank's part of the model and of its optimizer."""

    mesh: Mesh
    layout: Layout
    chunks: Sequence[nn.Module]
    """Wrapped for data parallelism; one, or several with interleaved pipeline stages."""
    optimizer: Optimizer
    ewc: Ewc | None = None
    """What holds the weights back, when something is asked to."""

    def slots(self) -> Iterator[Slot]:
        """Walk over all that a checkpoint keeps of this rank."""
        slots = self.optimizer.slots()
        return self.ewc.with_state(slots) if self.ewc else slots


@dataclass(frozen=True)
class StepReport:
    loss: float
    """Nats per target token over the global batch, without the penalty."""
    grad_norm: float
    """L2 over all parameters, before clipping; with the pull where that is added before."""
    pull: Pull | None = None
    """Of Elastic Weight Consolidation, while there is something to hold."""


def train_step(engine: Engine, batches: Iterator[Batch], *, step: int, seed: int, learning_rate: float) -> StepReport:
    """Take one optimizer step over `layout.num_microbatches` micro-batches drawn from `batches`.

    Raises:
        FloatingPointError: the loss is not finite; nothing has been updated.
    """
    # Randomness belongs to the step, not to the process: a resumed run, in any layout, draws the same.
    torch.manual_seed(seed + step)
    engine.optimizer.zero_grad()

    # On return the gradients are summed over data and context ranks and divided by the number of target tokens.
    sums = forward_backward(engine, batches, forward_only=False)
    loss = sums[0] / max(sums[1], 1.0)
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"step {step + 1}: the loss is {loss}; stopped before the update, nothing is lost.\n"
            "  Lower training.learning_rate, or look at this step's samples in ledger.jsonl."
        )
    # The pull is added there, to reduced gradients: once a step, not once a rank.
    grad_norm, pull = engine.optimizer.step(learning_rate, engine.ewc)
    return StepReport(loss, grad_norm, pull)


@torch.no_grad()
def evaluate(engine: Engine, batches: Iterator[Batch], num_batches: int) -> float:
    """Mean loss over `num_batches` global batches, in nats per target token."""
    for chunk in engine.chunks:
        chunk.eval()
    sums = [forward_backward(engine, batches, forward_only=True) for _ in range(num_batches)]
    for chunk in engine.chunks:
        chunk.train()
    return sum(loss for loss, _ in sums) / max(sum(targets for _, targets in sums), 1.0)


def forward_backward(engine: Engine, batches: Iterator[Batch], *, forward_only: bool) -> tuple[float, float]:
    """Run megatron-core's schedule; return the summed loss and the number of targets over the global batch."""
    layout, chunks = engine.layout, engine.chunks
    batches = (_own_tokens(batch, engine.mesh.context) for batch in batches)
    several = len(chunks) > 1
    # Each interleaved chunk walks over the same micro-batches by itself.
    iterators = _tee(batches, len(chunks), layout.num_microbatches) if several else batches
    reports = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators,
        model=chunks if several else chunks[0],
        num_microbatches=layout.num_microbatches,
        seq_length=layout.padded_length,
        micro_batch_size=layout.micro_batch_size,
        forward_only=forward_only,
    )
    sums = torch.zeros(2, dtype=torch.float64)
    # Tensor-parallel ranks of the last stage all hold the same loss; one of them counts.
    if reports and engine.mesh.tensor.rank == 0:
        sums = torch.stack(reports).sum(0)
        if not forward_only and not torch.isfinite(sums[0]):
            print(f"rank {engine.mesh.rank}: the loss of its micro-batches is {sums[0].item()}", flush=True)
    sums = sums.to(next(chunks[0].parameters()).device)
    dist.all_reduce(sums)
    loss_sum, num_targets = sums.tolist()
    return loss_sum, num_targets


def _own_tokens(batch: Batch, context: Axis) -> Batch:
    """This context-parallel rank's tokens of a micro-batch; labels were shifted before, so that none crosses a cut."""
    if context.size == 1:
        return batch
    # What fills up a row at its end counts for nothing (loss_mask 0), and no token before it sees it.
    return {
        name: value if name == "documents" else zigzag_shard(value, context.group, 1, pad=True)
        for name, value in batch.items()
    }


def _tee(batches: Iterator[Batch], num_chunks: int, num_microbatches: int) -> list[Iterator[Batch]]:
    drawn = [next(batches) for _ in range(num_microbatches)]
    return [iter(drawn) for _ in range(num_chunks)]
