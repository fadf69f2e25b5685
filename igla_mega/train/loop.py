"""The order of things: step, log, validate, save, until the last step or until somebody asks to stop."""

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist

from igla_mega.checkpoint.store import CheckpointWriter, Progress, SaveOutcome
from igla_mega.config.features import Moe
from igla_mega.config.schema import Recipe, Training
from igla_mega.data.batches import Dataset, Share, on_device
from igla_mega.model.router import Load
from igla_mega.objective.ewc import Pull
from igla_mega.plan.stages import Stage
from igla_mega.train import evaluation
from igla_mega.train.faults import Diagnosis, diagnose, highest_loss
from igla_mega.train.memory import notes
from igla_mega.train.metrics import Trackers, measured_peak_flops, peak_memory_bytes
from igla_mega.train.optimizer import BadStep
from igla_mega.train.pace import Pace
from igla_mega.train.progress import Display, Silent
from igla_mega.train.schedule import learning_rate
from igla_mega.train.step import Engine, StepReport, train_step

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
    rewind: Callable[[Progress], bool]
    """Makes engine and progress what they were at the last checkpoint; False where the stage has none."""
    texts: Mapping[str, str] = field(default_factory=dict)
    """More files of a checkpoint, name -> text."""
    prepared: evaluation.Prepared = evaluation.NOTHING
    """What the stage's evaluations need beside the model."""

    def save(self, progress: Progress, *, local: bool = False) -> None:
        """Save all that a resume needs, as the checkpoint of this step; `local`: on this node's own disk."""
        texts = {**self.texts, **notes(self.engine.ewc)}
        self.writer.save(self.engine.slots(), progress, self.recipe_yaml, texts, local=local)


def train(run: Run, progress: Progress, display: Display | Silent, trackers: Trackers | None) -> bool:
    """Train from `progress` on, updating it.

    Returns:
        Whether the stage is complete (False: asked to stop before; a checkpoint is saved).

    Raises:
        FloatingPointError: a step was bad, and the recipe says to stop at it.
    """
    recipe, engine, stage = run.recipe, run.engine, run.stage
    tokens_per_step = run.share.global_batch * engine.layout.sequence_length * engine.layout.rows_per_sample
    saved_step, recent = progress.step, [time.perf_counter()]
    warmup, warned = recipe.num_warmup_steps(stage.schedule_steps), False
    alarm = Alarm(recipe.moe) if recipe.moe is not None else None
    pace = Pace(engine.pulse, run.device, recipe.distributed.straggler_every)
    tell = partial(_tell, display, trackers)

    while progress.step < run.last_step:
        rate = learning_rate(
            progress.step - stage.schedule_first,
            recipe.training,
            recipe.scheduler,
            total_steps=stage.schedule_steps,
            warmup_steps=warmup,
        )
        data_step = stage.data_step + progress.step - stage.first_step
        spike_above = _spike_above(recipe.training, progress)
        take = partial(_take, run, progress, data_step, rate, spike_above)
        ledger = run.corpus.ledger_entry(data_step, run.share.global_batch) if trackers else None
        report: StepReport | None = None
        if progress.step + 1 not in progress.skipped:
            try:
                first = len(recent) == 1 and run.device.type == "cuda"  # kernels are compiled, communicators made
                with pace.step(progress.step + 1), engine.pulse.doing("training", patient=first):
                    report = take()
            except BadStep as bad:
                here = progress.step
                with engine.pulse.doing("running a bad step again", patient=True):
                    # What is being saved is sound.
                    report_saves(run.writer.wait(), display, trackers)
                    found = diagnose(engine, bad, take)
                    report = _answer(run, found, progress, ledger, display, trackers)
                if progress.step != here:  # gone back
                    saved_step, recent = progress.step, [time.perf_counter()]
                    continue
        progress.step += 1
        progress.samples += run.share.global_batch
        progress.tokens += tokens_per_step

        recent = [*recent[-RATE_STEPS:], time.perf_counter()]
        step_seconds = recent[-1] - recent[-2]
        mean_seconds = (recent[-1] - recent[0]) / (len(recent) - 1)
        if trackers:
            length = {"sequence_length": engine.layout.sequence_length} if stage.domain else {}
            left_out = {"skipped": True} if report is None else {}
            trackers.ledger({"step": progress.step, "sources": ledger, **length, **left_out})
        if report is None:
            tell("skipped", progress.step, "its samples are left out: no update")
        else:
            for line in pace.stragglers(engine.mesh, recipe.distributed.straggler_factor):
                tell("straggler", progress.step, line)
            display.step(
                progress.step,
                report.loss,
                tokens_per_step / mean_seconds,
                (run.last_step - progress.step) * mean_seconds,
            )
            if report.loss > spike_above:
                tell("spike", progress.step, f"the loss leaps to {report.loss:.4g}, beyond {spike_above:.4g}")
            if recipe.training.on_spike != "ignore":
                progress.losses = [*progress.losses, report.loss][-recipe.training.spike_window :]
            if trackers:
                entry = _metrics(run, progress, report, rate, tokens_per_step, step_seconds)
                trackers.metrics(entry | pace.entry)
            for line in alarm.lines(progress.step, report.load) if alarm and report.load else ():
                display.say(f"step {progress.step}: alarm: {line}")
            if not warned and (warning := _throttled(report, recipe.training.gradient_clip)):
                warned = True
                display.say(f"step {progress.step}: {warning}")

        last = progress.step == run.last_step
        with engine.pulse.doing("evaluating", patient=True):
            if evaluation.at_intervals(run, data_step + 1, progress, display, trackers):
                recent = [time.perf_counter()]
        report_saves(run.writer.poll(), display, trackers)
        if run.writer.trouble and progress.step % ALARM_STEPS == 0:
            display.say(f"step {progress.step}: still not saved: {run.writer.trouble}")
        with engine.pulse.doing("training"):
            stopping = run.stop.requested()
        if last or stopping or _due(progress.step, recipe.checkpoint.every_steps):
            with engine.pulse.doing("saving", patient=True):
                run.save(progress)
            saved_step = progress.step
        elif _due(progress.step, recipe.checkpoint.local_every_steps):
            with engine.pulse.doing("saving", patient=True):
                run.save(progress, local=True)
        if stopping:
            if progress.step < stage.last_step:
                tell_stopping(run, progress, display, trackers)
            break
    with engine.pulse.doing("saving", patient=True):
        report_saves(run.writer.wait(), display, trackers)
    assert saved_step == progress.step, "what was trained is saved"
    return progress.step >= stage.last_step


def _take(run: Run, progress: Progress, data_step: int, rate: float, spike_above: float) -> StepReport:
    """Take one step; again from the same state, it is the same step."""
    training = run.recipe.training
    return train_step(
        run.engine,
        on_device(run.corpus.micro_batches(data_step, run.share), run.device),
        step=progress.step,
        seed=training.seed,
        learning_rate=rate,
        highest_loss=math.inf if training.on_spike == "warn" else spike_above,
    )


def _spike_above(training: Training, progress: Progress) -> float:
    if training.on_spike == "ignore":
        return math.inf
    return highest_loss(progress.losses, training.spike_window, training.spike_deviations)


def _answer(
    run: Run,
    found: Diagnosis,
    progress: Progress,
    ledger: dict | None,
    display: Display | Silent,
    trackers: Trackers | None,
) -> StepReport | None:
    """Do what the recipe says about a bad step: stop; or have it left out, at once or after going back.

    Returns:
        The second run's report where that was sound and the step is taken; None otherwise.
    """
    training, step, tell = run.recipe.training, progress.step + 1, partial(_tell, display, trackers)
    key = "on_spike" if found.what == "spike" else "on_nonfinite"
    action = "taken" if found.report else getattr(training, key)
    row = 0
    while step - 1 - row in progress.bad_steps:
        row += 1
    too_many = action in ("skip", "rewind") and row >= training.bad_steps_in_a_row
    if trackers:
        entry = {"time": round(time.time(), 3), "step": step, "stage": run.recipe.name, "samples": ledger}
        trackers.bad_step({**entry, **found.entry, "action": "stop" if too_many else action})
    tell("spike" if found.what == "spike" else "nonfinite", step, found.words, verdict=found.verdict, ranks=found.ranks)
    if found.report is not None:
        return found.report
    if action == "stop" or too_many:
        why = f"; so were the {row} before it, training.bad_steps_in_a_row {row}" if too_many else ""
        way_out = (
            "It is not the samples: delete the newest checkpoints to go further back, and lower training.learning_rate."
            if too_many
            else f"Go on without them: training.{key}=skip (or rewind); or lower training.learning_rate."
        )
        if trackers:
            trackers.event("stopping", step - 1, f"stopped before the update of step {step}")
        raise FloatingPointError(
            f"step {step} is bad{why}: stopped before its update. What was said above names the place, bad_steps.jsonl "
            f"its samples.\n  {way_out}"
        )
    bad, skipped = [*progress.bad_steps, step], {*progress.skipped, step}
    if action == "rewind":
        if run.rewind(progress):
            if training.rewind_skips == "since_checkpoint":
                skipped |= set(range(progress.step + 1, step + 1))
            if trackers:
                trackers.rewind(progress.step)
            left_out = sorted(one for one in skipped if one > progress.step)
            words = f"back to the checkpoint of step {progress.step}; left out from there: {_ranges(left_out)}"
            tell("rewound", step, words, to_step=progress.step)
        else:
            tell("rewound", step, "there is no checkpoint of this stage to go back to; the step alone is left out")
    progress.bad_steps, progress.skipped = bad, sorted(skipped)
    return None


def _ranges(steps: Sequence[int]) -> str:
    """`step 5`, or `steps 5 to 8`; they are one after another but for rare ones."""
    if len(steps) == 1:
        return f"step {steps[0]}"
    whole = steps[-1] - steps[0] + 1 == len(steps)
    return f"steps {steps[0]} to {steps[-1]}" if whole else f"steps {', '.join(map(str, steps))}"


def _tell(display: Display | Silent, trackers: Trackers | None, kind: str, step: int, words: str, **more: Any) -> None:
    """Say what happened, and write it down."""
    display.say(words if kind == "stopping" else f"step {step}: {words}")
    if trackers:
        trackers.event(kind, step, words, **more)


def tell_stopping(run: Run, progress: Progress, display: Display | Silent, trackers: Trackers | None) -> None:
    """Say that the run ends here, and who has asked for it."""
    step = progress.step
    words = f"stopping after step {step}, as {run.stop.name} asked; the same command goes on from here"
    _tell(display, trackers, "stopping", step, words)


def report_saves(outcomes: Sequence[SaveOutcome], display: Display | Silent, trackers: Trackers | None) -> None:
    """Write down which saves are whole; say which are not."""
    for one in outcomes:
        if one.error is not None:
            _tell(display, trackers, "save_failed", one.step, one.error, where=one.where)
            continue
        if one.note:
            display.say(f"step {one.step}: {one.note}")
        if trackers:
            words = f"saved in {one.seconds:.1f} s, {one.bytes / 2**20:,.1f} MiB ({one.where})"
            trackers.event("saved", one.step, words, seconds=round(one.seconds, 3), bytes=one.bytes, where=one.where)


def _throttled(report: StepReport, gradient_clip: float) -> str | None:
    """What to say when clipping bites and leaves most of its norm to the pull."""
    pull = report.pull
    if pull is None or not 0 < gradient_clip < report.grad_norm or pull.grad_norm <= pull.task_grad_norm:
        return None
    return (
        f"the pull's gradient {pull.grad_norm:.3g} is above the task's {pull.task_grad_norm:.3g}, and clipping shrinks "
        "both: learning is throttled. Lower ewc_lambda, or set coupling to decoupled or proximal."
    )


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


REQUEUE = 75
"""Exit code of a run that a scheduler asked to stop: EX_TEMPFAIL of sysexits.h, the same command goes on."""
_BY_HAND = (signal.SIGINT, signal.SIGHUP)
_ASKED_ONCE_SECONDS = 2.0
"""A launcher hands on what its ranks were sent too: signals this close together are one."""


class StopRequest:
    """A signal asks for a stop at the end of the step, whoever gets it; a second one ends the process at once."""

    def __init__(self, alone: bool, device: torch.device):
        self._number, self._since, self._alone, self._device = 0, 0.0, alone, device
        self._agreed = 0
        # A thread hears them: the training thread may be inside a collective that does not return.
        heard, told = os.pipe()
        os.set_blocking(told, False)
        signal.set_wakeup_fd(told, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                signal.signal(number, lambda *_: None)
        threading.Thread(target=self._listen, args=(heard,), name="signals", daemon=True).start()

    def _listen(self, heard: int) -> None:
        while numbers := os.read(heard, 64):
            for number in numbers:
                if not self._number:
                    self._number, self._since = number, time.monotonic()
                elif time.monotonic() - self._since > _ASKED_ONCE_SECONDS:
                    os.write(2, b"ended at once, as asked a second time; the last checkpoint is whole\n")
                    os._exit(128 + number)

    def requested(self) -> bool:
        """Whether any rank has been asked: signals do not reach all ranks within the same step."""
        # A scheduler's notice counts for more than an interrupt from the keyboard.
        own = self._number + 256 * (self._number not in _BY_HAND) if self._number else 0
        if not self._alone:
            asked = torch.tensor(float(own), device=self._device)
            dist.all_reduce(asked, op=dist.ReduceOp.MAX)
            own = int(asked.item())
        self._agreed = own % 256
        return self.agreed

    @property
    def agreed(self) -> bool:
        """Whether the ranks have agreed to stop."""
        return self._agreed > 0

    @property
    def name(self) -> str:
        """Of the signal that was agreed on."""
        return signal.Signals(self._agreed).name

    @property
    def exit_code(self) -> int:
        """Of a run that stopped: 75 where a scheduler asked, 128 and the signal where a person did, 0 unasked."""
        if not self._agreed:
            return 0
        return 128 + self._agreed if self._agreed in _BY_HAND else REQUEUE


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Dense peak of one device, FLOP/s: from the data sheet for a known GPU, measured for a CPU."""
    if device.type == "cpu":
        return measured_peak_flops(dtype)
    from igla_mega.plan.hardware import dense_peak_flops

    return dense_peak_flops(torch.cuda.get_device_name(device), str(dtype).removeprefix("torch."))
