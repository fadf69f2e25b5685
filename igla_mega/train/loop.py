"""The order of things: step, log, validate, save, until the last step or until somebody asks to stop."""

import signal
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from igla_mega.checkpoint.store import CheckpointWriter, Progress
from igla_mega.config.schema import Recipe
from igla_mega.data.batches import Corpus, Share
from igla_mega.train.metrics import Trackers, measured_peak_flops, peak_memory_bytes
from igla_mega.train.progress import Display, Silent
from igla_mega.train.schedule import learning_rate
from igla_mega.train.step import Engine, StepReport, evaluate, train_step

RATE_STEPS = 10
"""Steps over which the shown rate is averaged."""


@dataclass(frozen=True)
class Run:
    """One stage, built: everything the loop needs, and nothing that changes."""

    recipe: Recipe
    recipe_yaml: str
    engine: Engine
    corpus: Corpus
    share: Share
    writer: CheckpointWriter
    device: torch.device
    total_steps: int
    last_step: int
    """Where this call stops: `total_steps`, or earlier when asked to."""
    peak_flops: float | None
    """Dense peak of one device in the training's precision, FLOP/s; None where it is not known."""


def train(run: Run, progress: Progress, display: Display | Silent, trackers: Trackers | None) -> bool:
    """Train from `progress` on, updating it.

    Returns:
        Whether the run is complete (False: asked to stop before; a checkpoint is saved).

    Raises:
        RuntimeError: a checkpoint could not be written.
        FloatingPointError: the loss is not finite.
    """
    recipe, engine = run.recipe, run.engine
    tokens_per_step = run.share.global_batch * engine.layout.sequence_length
    stop = _StopRequest(engine)
    saved_step, recent = progress.step, [time.perf_counter()]
    warmup = recipe.num_warmup_steps(run.total_steps)

    while progress.step < run.last_step:
        rate = learning_rate(
            progress.step, recipe.training, recipe.scheduler, total_steps=run.total_steps, warmup_steps=warmup
        )
        batches = _on_device(run.corpus.micro_batches(progress.step, run.share), run.device)
        ledger = run.corpus.ledger_entry(progress.step, run.share.global_batch) if trackers else None
        try:
            report = train_step(engine, batches, step=progress.step, seed=recipe.training.seed, learning_rate=rate)
        except FloatingPointError:
            run.writer.wait()  # what is being saved is sound
            raise
        progress.step += 1
        progress.samples += run.share.global_batch
        progress.tokens += tokens_per_step

        recent = [*recent[-RATE_STEPS:], time.perf_counter()]
        step_seconds = recent[-1] - recent[-2]
        mean_seconds = (recent[-1] - recent[0]) / (len(recent) - 1)
        display.step(
            progress.step, report.loss, tokens_per_step / mean_seconds, (run.last_step - progress.step) * mean_seconds
        )
        if trackers:
            trackers.metrics(_metrics(run, progress, report, rate, tokens_per_step, step_seconds))
            trackers.ledger({"step": progress.step, "sources": ledger})

        last = progress.step == run.last_step
        if last or _due(progress.step, recipe.evaluation.every_steps):
            losses = validate(run)
            if trackers and losses:
                trackers.metrics({"step": progress.step, "stage": recipe.name, "validation_loss": losses})
            if losses:
                parts = "  ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
                display.say(f"step {progress.step}: validation loss (nats/token)  {parts}")
            recent = [time.perf_counter()]
        run.writer.poll()
        stopping = stop.requested()
        if last or stopping or _due(progress.step, recipe.checkpoint.every_steps):
            run.writer.save(engine.optimizer.slots(), progress, run.recipe_yaml)
            saved_step = progress.step
        if stopping:
            display.say(f"stopping after step {progress.step}, as asked; the same command goes on from here")
            break
    run.writer.wait()
    assert saved_step == progress.step, "what was trained is saved"
    return progress.step >= run.total_steps


def validate(run: Run) -> dict[str, float]:
    """Loss on the held-out part of each source, in nats per target token."""
    losses = {}
    for name in run.corpus.validation_names():
        num_samples = run.corpus.num_validation_samples(name)
        num_batches = min(run.recipe.evaluation.num_batches, -(-num_samples // run.share.global_batch))
        batches = _on_device(run.corpus.validation_batches(name, run.share, num_batches), run.device)
        losses[name] = evaluate(run.engine, batches, num_batches)
    return losses


def _metrics(
    run: Run, progress: Progress, report: StepReport, rate: float, tokens_per_step: int, step_seconds: float
) -> dict:
    tokens_per_second = tokens_per_step / step_seconds
    model = run.recipe.model
    assert model is not None, "a run has a model by now"
    # Recompute is not counted; half of the attention's square is masked.
    flops_per_token = (
        6 * model.matmul_parameters()
        + 6 * model.num_layers * model.num_heads * model.head_size * run.engine.layout.sequence_length
    )
    flops_per_device = flops_per_token * tokens_per_second / run.engine.mesh.world_size
    return {
        "step": progress.step,
        "stage": run.recipe.name,
        "loss": report.loss,
        "grad_norm": report.grad_norm,
        "learning_rate": rate,
        "tokens": progress.tokens,
        "tokens_per_second": round(tokens_per_second, 1),
        "step_seconds": round(step_seconds, 5),
        "tflops_per_device": round(flops_per_device / 1e12, 5),
        "mfu": round(flops_per_device / run.peak_flops, 4) if run.peak_flops else None,
        "memory_bytes": peak_memory_bytes(run.device),
    }


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _on_device(batches, device: torch.device):
    if device.type == "cpu":
        return batches
    return ({name: t.to(device, non_blocking=True) for name, t in batch.items()} for batch in batches)


class _StopRequest:
    """SIGTERM or SIGINT asks for a stop at the end of the step; a second SIGINT is as usual."""

    def __init__(self, engine: Engine):
        self._asked, self._alone = False, engine.mesh.world_size == 1
        self._device = next(engine.chunks[0].parameters()).device
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number: int, _) -> None:
        self._asked = True
        signal.signal(number, signal.SIG_DFL)

    def requested(self) -> bool:
        """Whether any rank has been asked: signals do not reach all ranks within the same step."""
        if self._alone:
            return self._asked
        asked = torch.tensor(float(self._asked), device=self._device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return bool(asked.item())


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Dense peak of one device, FLOP/s: from the data sheet for a known GPU, measured for a CPU."""
    if device.type == "cpu":
        return measured_peak_flops(dtype)
    from igla_mega.plan.hardware import dense_peak_flops

    return dense_peak_flops(torch.cuda.get_device_name(device), str(dtype).removeprefix("torch."))
