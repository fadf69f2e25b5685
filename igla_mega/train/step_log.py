"""What is shown and written after each training step: rate, ledger, metrics, and warnings."""

import time

from igla_mega.checkpoint.progress import Progress
from igla_mega.engine.step import StepReport
from igla_mega.train.metrics import ALARM_STEPS, Alarm, step_entry, throttled
from igla_mega.train.state import NextStep, Run
from igla_mega.train.stragglers import StragglerWatch

RATE_STEPS = 10
"""Number of steps over which the displayed rate is averaged."""


class StepLog:
    """Reports the steps of one stage. All ranks call the same methods in the same order."""

    def __init__(self, run: Run):
        self._run, self._session = run, run.session
        self.stragglers = StragglerWatch(
            run.engine.heartbeat, run.session.device, run.recipe.distributed.straggler_every
        )
        self._alarm = Alarm(run.recipe.moe) if run.recipe.moe is not None else None
        self._warned_of_clipping = False
        self._ends = [time.perf_counter()]

    @property
    def is_first(self) -> bool:
        """True until a step has been timed; on CUDA that step also compiles kernels and creates communicators."""
        return len(self._ends) == 1

    def restart_clock(self) -> None:
        """Leave the time since the last step out of the rate, after an evaluation or a rewind."""
        self._ends = [time.perf_counter()]

    def step(self, done: NextStep, progress: Progress, report: StepReport | None) -> None:
        """Report a step that `progress` already counts.

        Args:
            report: None for a step whose samples were left out.
        """
        run, session = self._run, self._session
        self._ends = [*self._ends[-RATE_STEPS:], time.perf_counter()]
        self._write_ledger(done, skipped=report is None)
        if report is None:
            session.log_event("skipped", progress.step, "its samples are left out: no update")
            return
        distributed, training = run.recipe.distributed, run.recipe.training
        for line in self.stragglers.slow_ranks(run.engine.mesh, distributed.straggler_factor):
            session.log_event("straggler", progress.step, line)
        self._show(progress, report)
        if report.loss > done.spike_bound:
            message = f"loss spike: {report.loss:.4g} exceeds the bound {done.spike_bound:.4g}"
            session.log_event("spike", progress.step, message)
        if training.on_spike != "ignore":
            progress.losses = [*progress.losses, report.loss][-training.spike_window :]
        if session.mesh.is_main:
            entry = step_entry(run, progress, report, done.learning_rate, self._ends[-1] - self._ends[-2])
            session.trackers.metrics(entry | self.stragglers.entry)
        self._warn(progress.step, report)

    def unsaved(self, step: int) -> None:
        """Repeat every `ALARM_STEPS` steps that no checkpoint could be written."""
        if (trouble := self._run.writer.trouble) and step % ALARM_STEPS == 0:
            self._session.say(f"step {step}: still not saved: {trouble}")

    def _show(self, progress: Progress, report: StepReport) -> None:
        seconds = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        rate, left = self._run.tokens_per_step / seconds, (self._run.last_step - progress.step) * seconds
        self._session.display.step(progress.step, report.loss, rate, left)

    def _write_ledger(self, done: NextStep, *, skipped: bool) -> None:
        run = self._run
        if not self._session.mesh.is_main:
            return
        entry = {"step": done.number, "sources": run.corpus.ledger_entry(done.data_step, run.share.global_batch)}
        if run.stage.domain:
            entry["sequence_length"] = run.engine.layout.sequence_length
        if skipped:
            entry["skipped"] = True
        self._session.trackers.ledger(entry)

    def _warn(self, step: int, report: StepReport) -> None:
        if self._alarm and report.load:
            for line in self._alarm.lines(step, report.load):
                self._session.say(f"step {step}: alarm: {line}")
        clip = self._run.recipe.training.gradient_clip
        if not self._warned_of_clipping and (warning := throttled(report, clip)):
            self._warned_of_clipping = True
            self._session.say(f"step {step}: {warning}")
