"""One optimizer step, and one validation pass."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import nn

from igla_mega.model.lora import Switch, seed_dropout
from igla_mega.model.shards import Slot
from igla_mega.objective import language
from igla_mega.objective.ewc import Ewc, Pull
from igla_mega.objective.language import Batch
from igla_mega.ops.zigzag import zigzag_shard
from igla_mega.parallel import Axis, Mesh
from igla_mega.plan.layout import Layout
from igla_mega.train.optimizer import Optimizer

ForwardStep = Callable[[Iterator[Batch], nn.Module], Any]
"""megatron-core's: runs one micro-batch through a chunk; the report that its loss gives is fp64: the summed loss, the
number of targets, then sums of an objective's metrics."""


@dataclass(frozen=True)
class Objective:
    """What a step makes smaller, and what it reports of that."""

    forward_step: ForwardStep = language.forward_step
    metrics: tuple[str, ...] = ()
    """Names of the means that are reported beside the loss."""
    completed: Callable[["Engine", Iterator[Batch]], Iterator[Batch]] | None = None
    """Adds to micro-batches what must be known before the step (the reference of preference optimization)."""


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
    objective: Objective = Objective()
    adapters: Switch | None = None
    """Turns the low-rank adapters off; None where all weights train."""

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
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The objective's own, means over the global batch."""


def train_step(engine: Engine, batches: Iterator[Batch], *, step: int, seed: int, learning_rate: float) -> StepReport:
    """Take one optimizer step over `layout.num_microbatches` micro-batches drawn from `batches`.

    Raises:
        FloatingPointError: the loss is not finite; nothing has been updated.
    """
    # Randomness belongs to the step, not to the process: a resumed run, in any layout, draws the same.
    torch.manual_seed(seed + step)
    engine.optimizer.zero_grad()

    # On return the gradients are summed over data and context ranks and divided by the number of target tokens.
    if engine.objective.completed:
        batches = engine.objective.completed(engine, batches)
    if engine.adapters:
        batches = _keyed(batches, engine, step, seed)
    loss, *metrics = means(forward_backward(engine, batches, forward_only=False))
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"step {step + 1}: the loss is {loss}; stopped before the update, nothing is lost.\n"
            "  Lower training.learning_rate, or look at this step's samples in ledger.jsonl."
        )
    # The pull is added there, to reduced gradients: once a step, not once a rank.
    grad_norm, pull = engine.optimizer.step(learning_rate, engine.ewc)
    return StepReport(loss, grad_norm, pull, dict(zip(engine.objective.metrics, metrics, strict=True)))


def evaluate(engine: Engine, batches: Iterator[Batch], num_batches: int) -> float:
    """Mean loss over `num_batches` global batches, in nats per target token."""
    return measure(engine, batches, num_batches)["loss"]


@torch.no_grad()
def measure(engine: Engine, batches: Iterator[Batch], num_batches: int) -> dict[str, float]:
    """Mean loss (nats per target token; of preference optimization, per pair) and what else the objective reports."""
    for chunk in engine.chunks:
        chunk.eval()
    total = [0.0] * (2 + len(engine.objective.metrics))
    for _ in range(num_batches):
        own = engine.objective.completed(engine, batches) if engine.objective.completed else batches
        total = [a + b for a, b in zip(total, forward_backward(engine, own, forward_only=True), strict=True)]
    for chunk in engine.chunks:
        chunk.train()
    return dict(zip(("loss", *engine.objective.metrics), means(total), strict=True))


def means(sums: Sequence[float]) -> list[float]:
    """Loss and metrics, from their sums with the number of targets in the second place."""
    return [value / max(sums[1], 1.0) for value in (sums[0], *sums[2:])]


def forward_backward(engine: Engine, batches: Iterator[Batch], *, forward_only: bool) -> list[float]:
    """Run megatron-core's schedule; return the report's sums over the global batch: loss, targets, metrics."""
    reports = scheduled(engine, engine.chunks, batches, engine.objective.forward_step, forward_only=forward_only)
    sums = torch.zeros(2 + len(engine.objective.metrics), dtype=torch.float64)
    # Tensor-parallel ranks of the last stage all hold the same loss; one of them counts.
    if reports and engine.mesh.tensor.rank == 0:
        sums = torch.stack(reports).sum(0)
        if not forward_only and not torch.isfinite(sums[0]):
            print(f"rank {engine.mesh.rank}: the loss of its micro-batches is {sums[0].item()}", flush=True)
    sums = sums.to(next(engine.chunks[0].parameters()).device)
    dist.all_reduce(sums)
    return sums.tolist()


def scheduled(
    engine: Engine, chunks: Sequence[nn.Module], batches: Iterator[Batch], step: ForwardStep, *, forward_only: bool
) -> list:
    """What `step` reports of each micro-batch of a global one on the last pipeline stage; nothing on the others."""
    layout, several = engine.layout, len(chunks) > 1
    # Each interleaved chunk walks over the same micro-batches by itself.
    iterators = _tee(batches, len(chunks), layout.num_microbatches) if several else [batches]
    own = [_own_tokens(iterator, engine.mesh.context) for iterator in iterators]
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=own if several else own[0],
        model=chunks if several else chunks[0],
        num_microbatches=layout.num_microbatches,
        seq_length=layout.padded_length,
        micro_batch_size=layout.micro_batch_size * layout.rows_per_sample,
        forward_only=forward_only,
    )


def _keyed(batches: Iterator[Batch], engine: Engine, step: int, seed: int) -> Iterator[Batch]:
    """Number the rows of each micro-batch: the masks of dropout are drawn by row, the same in every layout."""
    layout = engine.layout
    for number, batch in enumerate(batches):
        place = (step * layout.num_microbatches + number) * layout.data + engine.mesh.data.rank
        yield {**batch, "dropout": (seed, place * layout.micro_batch_size * layout.rows_per_sample)}


def _own_tokens(batches: Iterator[Batch], context: Axis) -> Iterator[Batch]:
    """This context-parallel rank's tokens of micro-batches; labels were shifted before, so that none crosses a cut."""
    for batch in batches:
        if "dropout" in batch:
            seed_dropout(*batch["dropout"])  # here, where the forward pass asks for the micro-batch
        if context.size > 1:
            # What fills up a row at its end counts for nothing (loss_mask 0), and no token before it sees it.
            tokens = {name: zigzag_shard(batch[name], context.group, 1, pad=True) for name in language.TOKENS}
            batch = {**batch, **tokens}
        yield batch


def _tee(batches: Iterator[Batch], num_chunks: int, num_microbatches: int) -> list[Iterator[Batch]]:
    drawn = [next(batches) for _ in range(num_microbatches)]
    return [iter(drawn) for _ in range(num_chunks)]
