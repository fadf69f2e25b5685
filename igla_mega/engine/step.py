"""Take an optimizer step, or measure the loss on held-out data."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from igla_mega.data.micro_batch import SEQUENCES, MicroBatch, Routing
from igla_mega.distributed.mesh import Axis, Mesh
from igla_mega.engine.heartbeat import Heartbeat
from igla_mega.engine.optimizer import BadStep, Optimizer
from igla_mega.layout.layout import Layout
from igla_mega.model.lora import Switch
from igla_mega.model.router import Load, bias_states, collect, move_biases, router_context
from igla_mega.model.shards import ParameterState
from igla_mega.objective import language
from igla_mega.objective.ewc import Ewc, Pull
from igla_mega.ops.zigzag import zigzag_shard

ForwardStep = Callable[[Iterator[MicroBatch], nn.Module], Any]
"""megatron-core's `forward_step_func`: runs one micro-batch through a chunk, and returns output and loss function. The
loss function reports an fp64 vector: the summed loss, the number of targets, then sums of the objective's metrics."""


@dataclass(frozen=True)
class Objective:
    """Loss that a step minimizes, and the metrics that it reports."""

    forward_step: ForwardStep = language.forward_step
    metrics: tuple[str, ...] = ()
    """Names of the means that are reported in addition to the loss."""
    completed: Callable[["Engine", Iterator[MicroBatch]], Iterator[MicroBatch]] | None = None
    """Adds to micro-batches what must be known before the step (the reference of preference optimization)."""


@dataclass(frozen=True)
class Engine:
    """This rank's part of the model and of its optimizer, and what takes a step with them."""

    mesh: Mesh
    layout: Layout
    chunks: Sequence[nn.Module]
    """Wrapped for data parallelism; one, or several with interleaved pipeline stages."""
    optimizer: Optimizer
    ewc: Ewc | None = None
    """Pull to the weights of earlier tasks; None without EWC."""
    objective: Objective = Objective()
    adapters: Switch | None = None
    """Turns the low-rank adapters off; None if all weights train."""
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    """Progress of this rank, read by the watchdog."""

    def states(self) -> Iterator[ParameterState]:
        """Yield all state of this rank that a checkpoint contains."""
        states = self.optimizer.states()
        yield from self.ewc.with_state(states) if self.ewc else states
        # With adapters the routers are frozen, and their biases are those of the base model.
        if self.adapters is None:
            yield from bias_states(self.chunks, self.mesh)


@dataclass(frozen=True)
class StepReport:
    """Result of a training step, the same on every rank."""

    loss: float
    """Loss over the global batch without the EWC penalty, in nats per target token (per pair for DPO)."""
    grad_norm: float
    """L2 norm over all parameters, before clipping; includes the pull if that is added before clipping."""
    pull: Pull | None = None
    """Penalty and gradient norms of EWC; None while nothing is anchored."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Metrics of the objective, means over the global batch."""
    load: Load | None = None
    """Load of the experts; None for a dense model."""


def train_step(
    engine: Engine,
    batches: Iterator[MicroBatch],
    *,
    step: int,
    seed: int,
    learning_rate: float,
    highest_loss: float = math.inf,
) -> StepReport:
    """Take one optimizer step over `layout.num_microbatches` micro-batches drawn from `batches`.

    Args:
        step: number of the step, counted from 0.
        highest_loss: loss above which the step counts as a spike, in nats.

    Raises:
        BadStep: the loss or the gradient norm is not finite, or the loss is a spike. Raised on every rank; nothing has
            been updated.
    """
    heartbeat = engine.heartbeat
    heartbeat.step = step + 1
    # Seeded by the step, not once per process: a resumed run, in any layout, draws the same numbers.
    torch.manual_seed(seed + step)
    engine.optimizer.zero_grad()

    # On return the gradients are summed over data and context ranks and divided by the number of target tokens.
    if engine.objective.completed:
        batches = engine.objective.completed(engine, batches)
    if engine.adapters:
        batches = _with_dropout_seeds(batches, engine, step, seed)
    reports = scheduled(engine, engine.chunks, batches, engine.objective.forward_step, forward_only=False)
    heartbeat.at("loss")
    sums = _summed(engine, reports)
    loss, *metrics = means(sums)
    if not (math.isfinite(loss) and loss <= highest_loss):
        what = "spike" if math.isfinite(loss) else "loss"
        raise BadStep(what, loss, [report[0].item() for report in reports])
    # The optimizer adds the EWC pull to the reduced gradients: once per step, not once per rank and micro-batch.
    heartbeat.at("optimizer")
    grad_norm, pull = engine.optimizer.step(learning_rate, engine.ewc)
    # After the update: a step that is refused must move no bias.
    load = collect(engine.chunks, sums[1])
    if load is not None and engine.adapters is None:
        move_biases(engine.chunks, load)
    return StepReport(loss, grad_norm, pull, dict(zip(engine.objective.metrics, metrics, strict=True)), load)


def evaluate(engine: Engine, batches: Iterator[MicroBatch], num_batches: int) -> float:
    """Return the mean loss over `num_batches` global batches, in nats per target token."""
    return measure(engine, batches, num_batches)["loss"]


@torch.no_grad()
def measure(engine: Engine, batches: Iterator[MicroBatch], num_batches: int) -> dict[str, float]:
    """Return the mean loss (nats per target token, or per pair) and the metrics over `num_batches` global batches."""
    for chunk in engine.chunks:
        chunk.eval()
    total = [0.0] * (2 + len(engine.objective.metrics))
    with engine.heartbeat.doing("validation"):
        for _ in range(num_batches):
            own = engine.objective.completed(engine, batches) if engine.objective.completed else batches
            total = [a + b for a, b in zip(total, forward_backward(engine, own, forward_only=True), strict=True)]
    for chunk in engine.chunks:
        chunk.train()
    return dict(zip(("loss", *engine.objective.metrics), means(total), strict=True))


def means(sums: Sequence[float]) -> list[float]:
    """Return loss and metrics from the sums: loss, number of targets, metrics."""
    return [value / max(sums[1], 1.0) for value in (sums[0], *sums[2:])]


def forward_backward(engine: Engine, batches: Iterator[MicroBatch], *, forward_only: bool) -> list[float]:
    """Run megatron-core's schedule, and return sums over the global batch: loss, targets, metrics."""
    reports = scheduled(engine, engine.chunks, batches, engine.objective.forward_step, forward_only=forward_only)
    return _summed(engine, reports)


def _summed(engine: Engine, reports: list) -> list[float]:
    """Return the sum of the micro-batches' reports over all ranks; only the last pipeline stage has any."""
    # fp64: a global batch has millions of tokens, whose losses are summed before they are divided.
    sums = torch.zeros(2 + len(engine.objective.metrics), dtype=torch.float64)
    # Tensor-parallel ranks of the last stage all hold the same loss; one of them counts.
    if reports and engine.mesh.tensor.rank == 0:
        sums = torch.stack(reports).sum(0)
    sums = sums.to(next(engine.chunks[0].parameters()).device)
    dist.all_reduce(sums)
    return sums.tolist()


def scheduled(
    engine: Engine, chunks: Sequence[nn.Module], batches: Iterator[MicroBatch], step: ForwardStep, *, forward_only: bool
) -> list:
    """Run megatron-core's schedule over the micro-batches of a step.

    Returns:
        What `step` reports of each micro-batch on the last pipeline stage; nothing on the others.
    """
    layout, several = engine.layout, len(chunks) > 1
    # Each interleaved chunk iterates over the same micro-batches separately.
    iterators = _tee(batches, len(chunks), layout.num_microbatches) if several else [batches]
    routed = router_context(chunks[0]) is not None
    prepared = [_for_this_rank(iterator, engine, routed=routed) for iterator in iterators]
    own = [engine.heartbeat.drawn(iterator) for iterator in prepared]
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=own if several else own[0],
        model=chunks if several else chunks[0],
        num_microbatches=layout.num_microbatches,
        seq_length=layout.padded_length,
        micro_batch_size=layout.micro_batch_size * layout.rows_per_sample,
        forward_only=forward_only,
    )


def _with_dropout_seeds(batches: Iterator[MicroBatch], engine: Engine, step: int, seed: int) -> Iterator[MicroBatch]:
    """Add to each micro-batch the seed and the global number of its first row.

    Dropout masks of adapters are drawn per row from both, so they are the same in every layout.
    """
    layout = engine.layout
    for number, batch in enumerate(batches):
        place = (step * layout.num_microbatches + number) * layout.data + engine.mesh.data.rank
        yield batch._replace(dropout_seed=(seed, place * layout.micro_batch_size * layout.rows_per_sample))


def _for_this_rank(batches: Iterator[MicroBatch], engine: Engine, *, routed: bool) -> Iterator[MicroBatch]:
    """Add what routers need, computed from whole sequences, then keep this context-parallel rank's tokens."""
    for batch in batches:
        if routed:
            batch = batch._replace(routing=_routing(batch.loss_mask, engine))
        yield _shard_for_context_parallel(batch, engine.mesh.context)


def _shard_for_context_parallel(batch: MicroBatch, context: Axis) -> MicroBatch:
    """Return this context-parallel rank's tokens. Labels were shifted before, so no target crosses a cut."""
    if context.size == 1:
        return batch
    # Padding at the end of a row is no target (loss_mask 0), and causal attention hides it from every token before.
    shards: dict[str, Any] = {
        name: zigzag_shard(getattr(batch, name), context.group, 1, pad=True) for name in SEQUENCES
    }
    return batch._replace(**shards)


def _routing(loss_mask: Tensor, engine: Engine) -> Routing:
    """Compute what routers need to know of a micro-batch from its mask, fp32 [B, S] of the whole sequences."""
    length, mesh, layout = loss_mask.size(1), engine.mesh, engine.layout
    # The last target of a row predicts its last token; every token after that one is padding.
    places = torch.arange(1, length + 1, device=loss_mask.device)
    ends = (places * (loss_mask > 0)).amax(1, keepdim=True)  # [B, 1]
    real = ((places <= ends + 1) & (ends > 0)).to(torch.int8)  # [B, S]
    real = zigzag_shard(real, mesh.context.group, 1, pad=True).bool().t()  # [S / context ranks, B]
    if layout.sequence_parallel:
        real = real.chunk(mesh.tensor.size)[mesh.tensor.rank]
    pairs = layout.rows_per_sample == 2
    return Routing(torch.full_like(loss_mask[:, 0], 0.5) if pairs else loss_mask.sum(1), real)


def _tee(batches: Iterator[MicroBatch], num_chunks: int, num_microbatches: int) -> list[Iterator[MicroBatch]]:
    """Return one iterator per chunk over the same `num_microbatches` micro-batches."""
    drawn = [next(batches) for _ in range(num_microbatches)]
    return [iter(drawn) for _ in range(num_chunks)]
