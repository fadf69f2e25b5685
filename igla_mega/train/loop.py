"""The training loop of one stage: take a step, log, evaluate, save, stop."""

import math

from igla_mega.checkpoint.progress import Progress
from igla_mega.data.batches import on_device
from igla_mega.engine.optimizer import BadStep
from igla_mega.engine.schedule import learning_rate
from igla_mega.engine.step import StepReport, train_step
from igla_mega.train import bad_steps, evaluation
from igla_mega.train.state import NextStep, Run
from igla_mega.train.step_log import StepLog


def train(run: Run, progress: Progress) -> bool:
    """Train from `progress` on, updating it.

    Returns:
        True if the stage is complete; False if a stop was requested before (a checkpoint is saved).

    Raises:
        FloatingPointError: a step was bad, and the recipe asks to stop at it.
    """
    session, log, saved_step = run.session, StepLog(run), progress.step
    while progress.step < run.last_step:
        step = _next_step(run, progress)
        report = None if step.number in progress.skipped else _take_or_diagnose(run, step, progress, log)
        if progress.step != step.number - 1:  # went back to a checkpoint
            saved_step = progress.step
            log.restart_clock()
            continue
        progress.step += 1
        progress.samples += run.share.global_batch
        progress.tokens += run.tokens_per_step
        log.step(step, progress, report)

        with session.heartbeat.doing("evaluating", may_be_slow=True):
            if evaluation.at_intervals(run, step.data_step + 1, progress):
                log.restart_clock()
        session.log_saves(run.writer.poll())
        log.unsaved(progress.step)
        # A collective: every rank reaches it at the same step, so all stop together.
        with session.heartbeat.doing("training"):
            stopping = session.stop.requested()
        if _save_if_due(run, progress, stopping=stopping):
            saved_step = progress.step
        if stopping:
            if progress.step < run.stage.last_step:
                session.log_stopping(progress.step)
            break
    with session.heartbeat.doing("saving", may_be_slow=True):
        session.log_saves(run.writer.wait())
    assert saved_step == progress.step, "what was trained is saved"
    return progress.step >= run.stage.last_step


def _next_step(run: Run, progress: Progress) -> NextStep:
    """Return what is known of the step after `progress`. All of it follows from the step's number."""
    recipe, stage = run.recipe, run.stage
    rate = learning_rate(
        progress.step - stage.schedule_first,
        recipe.training,
        recipe.scheduler,
        total_steps=stage.schedule_steps,
        warmup_steps=recipe.num_warmup_steps(stage.schedule_steps),
    )
    data_step = stage.data_step + progress.step - stage.first_step
    return NextStep(progress.step + 1, rate, data_step, bad_steps.spike_bound(recipe.training, progress))


def _take(run: Run, step: NextStep) -> StepReport:
    """Take one step. From the same state it gives the same bits, which the diagnosis of a bad step relies on."""
    training = run.recipe.training
    return train_step(
        run.engine,
        on_device(run.corpus.micro_batches(step.data_step, run.share), run.session.device),
        step=step.number - 1,
        seed=training.seed,
        learning_rate=step.learning_rate,
        highest_loss=math.inf if training.on_spike == "warn" else step.spike_bound,
    )


def _take_or_diagnose(run: Run, step: NextStep, progress: Progress, log: StepLog) -> StepReport | None:
    """Take one step; take a bad one again to find its cause, then do what the recipe asks.

    Returns:
        The report of the step; None if its samples are left out, or if `progress` went back to a checkpoint.
    """
    heartbeat = run.engine.heartbeat
    slow = log.is_first and run.session.device.type == "cuda"
    try:
        with log.stragglers.step(step.number), heartbeat.doing("training", may_be_slow=slow):
            return _take(run, step)
    except BadStep as bad:
        with heartbeat.doing("running a bad step again", may_be_slow=True):
            # A checkpoint in flight was taken before this step, so it is sound: a rewind may use it.
            run.session.log_saves(run.writer.wait())
            diagnosis = bad_steps.diagnose(run.engine, bad, lambda: _take(run, step))
            return bad_steps.answer(run, diagnosis, step, progress)


def _save_if_due(run: Run, progress: Progress, *, stopping: bool) -> bool:
    """Save at the recipe's intervals, at the end, and before a stop; return True if the run folder got a checkpoint."""
    every, local_every = run.recipe.checkpoint.every_steps, run.recipe.checkpoint.local_every_steps
    if progress.step == run.last_step or stopping or _is_due(progress.step, every):
        run.save(progress)
        return True
    if _is_due(progress.step, local_every):
        run.save(progress, local=True)
    return False


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
