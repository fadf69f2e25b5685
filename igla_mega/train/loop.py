"""The order of things: step, log, validate, save, until the last step or until somebody asks to stop."""

import math
import time
from collections.abc import Sequence
from functools import partial

from igla_mega.checkpoint.progress import Progress
from igla_mega.config.schema import Training
from igla_mega.data.batches import on_device
from igla_mega.engine.optimizer import BadStep
from igla_mega.engine.schedule import learning_rate
from igla_mega.engine.step import StepReport, train_step
from igla_mega.train import evaluation
from igla_mega.train.bad_steps import Diagnosis, diagnose, highest_loss
from igla_mega.train.console import Display, Silent
from igla_mega.train.metrics import (
    ALARM_STEPS,
    Alarm,
    Trackers,
    log_event,
    log_saves,
    log_stopping,
    step_entry,
    throttled,
)
from igla_mega.train.state import Run
from igla_mega.train.stragglers import StragglerWatch

RATE_STEPS = 10
"""Steps over which the shown rate is averaged."""


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
    stragglers = StragglerWatch(engine.heartbeat, run.device, recipe.distributed.straggler_every)
    tell = partial(log_event, display, trackers)

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
                with stragglers.step(progress.step + 1), engine.heartbeat.doing("training", may_be_slow=first):
                    report = take()
            except BadStep as bad:
                here = progress.step
                with engine.heartbeat.doing("running a bad step again", may_be_slow=True):
                    # What is being saved is sound.
                    log_saves(run.writer.wait(), display, trackers)
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
            for line in stragglers.stragglers(engine.mesh, recipe.distributed.straggler_factor):
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
                entry = step_entry(run, progress, report, rate, tokens_per_step, step_seconds)
                trackers.metrics(entry | stragglers.entry)
            for line in alarm.lines(progress.step, report.load) if alarm and report.load else ():
                display.say(f"step {progress.step}: alarm: {line}")
            if not warned and (warning := throttled(report, recipe.training.gradient_clip)):
                warned = True
                display.say(f"step {progress.step}: {warning}")

        last = progress.step == run.last_step
        with engine.heartbeat.doing("evaluating", may_be_slow=True):
            if evaluation.at_intervals(run, data_step + 1, progress, display, trackers):
                recent = [time.perf_counter()]
        log_saves(run.writer.poll(), display, trackers)
        if run.writer.trouble and progress.step % ALARM_STEPS == 0:
            display.say(f"step {progress.step}: still not saved: {run.writer.trouble}")
        with engine.heartbeat.doing("training"):
            stopping = run.stop.requested()
        if last or stopping or _due(progress.step, recipe.checkpoint.every_steps):
            with engine.heartbeat.doing("saving", may_be_slow=True):
                run.save(progress)
            saved_step = progress.step
        elif _due(progress.step, recipe.checkpoint.local_every_steps):
            with engine.heartbeat.doing("saving", may_be_slow=True):
                run.save(progress, local=True)
        if stopping:
            if progress.step < stage.last_step:
                log_stopping(run, progress, display, trackers)
            break
    with engine.heartbeat.doing("saving", may_be_slow=True):
        log_saves(run.writer.wait(), display, trackers)
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
    training, step, tell = run.recipe.training, progress.step + 1, partial(log_event, display, trackers)
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


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
