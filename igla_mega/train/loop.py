"""The order of things: step, log, validate, save, until the last step or until somebody asks to stop."""

import math
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from statistics import fmean

import torch
import torch.distributed as dist

from igla_mega.checkpoint.store import CheckpointWriter, Progress
from igla_mega.config.features import Moe
from igla_mega.config.schema import Recipe
from igla_mega.data.batches import Corpus, Dataset, Share
from igla_mega.model.router import Load
from igla_mega.objective.ewc import Pull
from igla_mega.plan.stages import Stage
from igla_mega.train.memory import notes
from igla_mega.train.metrics import Trackers, measured_peak_flops, peak_memory_bytes
from igla_mega.train.progress import Display, Silent
from igla_mega.train.schedule import learning_rate
from igla_mega.train.step import Engine, StepReport, measure, train_step

RATE_STEPS = 10
"""Steps over which the shown rate is averaged."""
ALARM_STEPS = 50
"""Steps for which something must have been in order to be reported again."""


@dataclass(frozen=True)
class Run:
    """One stage, built: everything the loop needs, and nothing that changes."""

    recipe: Recipe
    recipe_yaml: str
    engine: Engine
    corpus: Dataset
    share: Share
    writer: CheckpointWriter
    device: torch.device
    stage: Stage
    last_step: int
    """Where this call stops: the stage's last step, or earlier when asked to."""
    peak_flops: float | None
    """Dense peak of one device in the training's precision, FLOP/s; None where it is not known."""
    stop: "StopRequest"
    texts: Mapping[str, str] = field(default_factory=dict)
    """More files of a checkpoint, name -> text."""

    def save(self, progress: Progress) -> None:
        """Save all that a resume needs, as the checkpoint of this step."""
        texts = {**self.texts, **notes(self.engine.ewc)}
        self.writer.save(self.engine.slots(), progress, self.recipe_yaml, texts)


def train(run: Run, progress: Progress, display: Display | Silent, trackers: Trackers | None) -> bool:
    """Train from `progress` on, updating it.

    Returns:
        Whether the stage is complete (False: asked to stop before; a checkpoint is saved).

    Raises:
        RuntimeError: a checkpoint could not be written.
        FloatingPointError: the loss is not finite.
    """
    recipe, engine, stage = run.recipe, run.engine, run.stage
    tokens_per_step = run.share.global_batch * engine.layout.sequence_length * engine.layout.rows_per_sample
    saved_step, recent = progress.step, [time.perf_counter()]
    warmup, warned = recipe.num_warmup_steps(stage.schedule_steps), False
    alarm = Alarm(recipe.moe) if recipe.moe is not None else None

    while progress.step < run.last_step:
        rate = learning_rate(
            progress.step - stage.schedule_first,
            recipe.training,
            recipe.scheduler,
            total_steps=stage.schedule_steps,
            warmup_steps=warmup,
        )
        data_step = stage.data_step + progress.step - stage.first_step
        batches = on_device(run.corpus.micro_batches(data_step, run.share), run.device)
        ledger = run.corpus.ledger_entry(data_step, run.share.global_batch) if trackers else None
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
            length = {"sequence_length": engine.layout.sequence_length} if stage.domain else {}
            trackers.ledger({"step": progress.step, "sources": ledger, **length})
        for line in alarm.lines(progress.step, report.load) if alarm and report.load else ():
            display.say(f"step {progress.step}: alarm: {line}")
        if not warned and (warning := _throttled(report, recipe.training.gradient_clip)):
            warned = True
            display.say(f"step {progress.step}: {warning}")

        last = progress.step == run.last_step
        # The end of a phase has an evaluation of its own, of every domain so far.
        phase_ends = bool(stage.domain) and progress.step == stage.last_step
        if not phase_ends and (last or _due(progress.step, recipe.evaluation.every_steps)):
            measured = validate(run)
            log_validation(measured, run, progress, display, trackers)
            log_reading(run, data_step + 1, progress, display, trackers)
            if progress.before and progress.step == stage.last_step:
                display.say(comparison(progress.before, measured, recipe.form))
            recent = [time.perf_counter()]
        run.writer.poll()
        stopping = run.stop.requested()
        if last or stopping or _due(progress.step, recipe.checkpoint.every_steps):
            run.save(progress)
            saved_step = progress.step
        if stopping:
            display.say(f"stopping after step {progress.step}, as asked; the same command goes on from here")
            break
    run.writer.wait()
    assert saved_step == progress.step, "what was trained is saved"
    return progress.step >= stage.last_step


def _throttled(report: StepReport, gradient_clip: float) -> str | None:
    """What to say when clipping bites and leaves most of its norm to the pull."""
    pull = report.pull
    if pull is None or not 0 < gradient_clip < report.grad_norm or pull.grad_norm <= pull.task_grad_norm:
        return None
    return (
        f"the pull's gradient {pull.grad_norm:.3g} is above the task's {pull.task_grad_norm:.3g}, and clipping shrinks "
        "both: learning is throttled. Lower ewc_lambda, or set coupling to decoupled or proximal."
    )


def log_validation(
    measured: dict[str, dict[str, float]],
    run: Run,
    progress: Progress,
    display: Display | Silent,
    trackers: Trackers | None,
) -> None:
    """Write down and show what was measured on held-out data."""
    if not measured:
        return
    losses = {name: values["loss"] for name, values in measured.items()}
    more = {f"{name}/{key}": one for name, values in measured.items() for key, one in values.items() if key != "loss"}
    if trackers:
        entry = {"step": progress.step, "stage": run.recipe.name, "validation_loss": losses}
        trackers.metrics({**entry, "validation": more} if more else entry)
    unit = "nats/pair" if run.recipe.form == "preference_pairs" else "nats/token"
    parts = "  ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
    display.say(f"step {progress.step}: validation loss ({unit})  {parts}")


def log_reading(
    run: Run, data_step: int, progress: Progress, display: Display | Silent, trackers: Trackers | None
) -> None:
    """Write down and show how far each source of text has been read."""
    if not isinstance(run.corpus, Corpus):
        return
    read = run.corpus.read_until(data_step, run.share.global_batch)
    if trackers:
        tokens = {name: count for name, (count, _) in read.items()}
        epochs = {name: round(passes, 4) for name, (_, passes) in read.items() if passes is not None}
        entry = {"step": progress.step, "stage": run.recipe.name}
        trackers.metrics({**entry, "read_tokens": tokens, "read_epochs": epochs})
    parts = [
        f"{name} {count / 1e6:,.4g}M" + (f" ({passes:.3g})" if passes is not None else "")
        for name, (count, passes) in read.items()
    ]
    display.say(f"step {progress.step}: read, tokens (epochs)  {'  '.join(parts)}")


def comparison(before: dict[str, dict[str, float]], after: dict[str, dict[str, float]], form: str) -> str:
    """What the stage has changed on held-out data, in a line for each source."""
    lines = []
    for name, values in after.items():
        if (old := before.get(name)) is None:
            continue
        if form == "preference_pairs":
            lines.append(
                f"{name}: the chosen answer is the likelier one in {old['dpo_preferred']:.1%} of held-out pairs "
                f"before, in {values['dpo_preferred']:.1%} after; margin of the rewards {values['dpo_margin']:+.3f}"
            )
        else:
            what = "held-out answers" if form == "instructions" else "held-out text"
            lines.append(
                f"{name}: {what} cost {old['loss']:.3f} nats/token before, {values['loss']:.3f} after "
                f"(perplexity {math.exp(old['loss']):.1f} before, {math.exp(values['loss']):.1f} after)"
            )
    return "\n".join(lines)


def validate(run: Run) -> dict[str, dict[str, float]]:
    """Loss (nats per target token, or per pair) and the objective's metrics on the held-out part of each source."""
    measured = {}
    for name in run.corpus.validation_names():
        num_samples = run.corpus.num_validation_samples(name)
        num_batches = min(run.recipe.evaluation.num_batches, -(-num_samples // run.share.global_batch))
        batches = on_device(run.corpus.validation_batches(name, run.share, num_batches), run.device)
        measured[name] = measure(run.engine, batches, num_batches)
    return measured


def _metrics(
    run: Run, progress: Progress, report: StepReport, rate: float, tokens_per_step: int, step_seconds: float
) -> dict:
    tokens_per_second = tokens_per_step / step_seconds
    model = run.recipe.model
    assert model is not None, "a run has a model by now"
    # Recompute is not counted; half of the attention's square is masked.
    flops_per_token = (
        6 * model.matmul_parameters(run.recipe.moe)
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
        **report.metrics,
        **(_pull_metrics(report.pull) if report.pull else {}),
        **(_load_metrics(report.load, run.recipe.moe) if report.load and run.recipe.moe else {}),
    }


def _pull_metrics(pull: Pull) -> dict[str, float]:
    return {"ewc_nats": pull.nats, "ewc_grad_norm": pull.grad_norm, "task_grad_norm": pull.task_grad_norm}


def _load_metrics(load: Load, moe: Moe) -> dict:
    """What is written of the experts: means over layers (the most, of the violation), and each layer's."""
    alarms = {
        "starving": [f"{layer}.{expert}" for layer, expert in load.starving(moe.alarm_load)],
        "dropping": load.dropping(moe.alarm_drop_rate),
    }
    return {
        "moe_aux_loss": fmean(load.balance),
        "moe_drop_rate": fmean(load.drop_rate),
        "moe_router_entropy": fmean(load.entropy),
        "moe_max_violation": max(load.max_violation),
        "expert_load": load.visits,
        "moe_layers": {
            "aux_loss": load.balance,
            "drop_rate": load.drop_rate,
            "router_entropy": load.entropy,
            "max_violation": load.max_violation,
        },
        **({"moe_alarms": alarms} if any(alarms.values()) else {}),
    }


@dataclass
class Alarm:
    """Says when experts starve or drop too much; of what goes on, or comes back soon, it says nothing again."""

    moe: Moe
    _last: dict[object, int] = field(default_factory=dict)

    def lines(self, step: int, load: Load) -> Iterator[str]:
        """What is new in this step."""
        moe, fair = self.moe, 1 / self.moe.num_experts
        if starving := self._new(step, load.starving(moe.alarm_load)):
            who = ", ".join(f"{e} of layer {n} ({load.visits[n][e]:.2%})" for n, e in starving[:4])
            more = f" and {len(starving) - 4} more" if len(starving) > 4 else ""
            yield (
                f"{'experts starve' if len(starving) > 1 else 'an expert starves'}: {who}{more}; fair is {fair:.1%} of "
                f"the visits, moe.alarm_load {moe.alarm_load:g}. If it lasts, raise moe.router_aux_loss_coef or set "
                "moe.bias_update_rate=1e-3."
            )
        if dropping := self._new(step, load.dropping(moe.alarm_drop_rate)):
            who = ", ".join(f"layer {layer} {load.drop_rate[layer]:.1%}" for layer in dropping[:8])
            yield (
                f"visits are dropped: {who}; moe.alarm_drop_rate {moe.alarm_drop_rate:g}. If it lasts, raise "
                "training.expert_capacity_factor or moe.router_aux_loss_coef."
            )

    def _new(self, step: int, found: list) -> list:
        new = [one for one in found if step - self._last.get(one, -ALARM_STEPS) >= ALARM_STEPS]
        self._last.update(dict.fromkeys(found, step))
        return new


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def on_device(batches, device: torch.device):
    """The batches' tensors where the model is."""
    if device.type == "cpu":
        return batches
    return (
        {name: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for name, v in batch.items()}
        for batch in batches
    )


class StopRequest:
    """SIGTERM or SIGINT asks for a stop at the end of the step; a second SIGINT is as usual."""

    def __init__(self, alone: bool, device: torch.device):
        self._asked, self._alone, self._device = False, alone, device
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
