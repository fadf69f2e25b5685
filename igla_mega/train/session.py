"""What every part of a run shares on this rank: its place among the ranks, its signals, and where it reports to."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from igla_mega.checkpoint.progress import SaveOutcome
from igla_mega.distributed.mesh import Mesh
from igla_mega.engine.heartbeat import Heartbeat
from igla_mega.train.console import Display, Silent
from igla_mega.train.stop_signal import StopRequest
from igla_mega.train.trackers import Trackers, Untracked


@dataclass(frozen=True)
class Session:
    """Handed down from `run.train`; nothing in it changes from one stage to the next."""

    run_dir: Path
    mesh: Mesh
    device: torch.device
    stop: StopRequest
    heartbeat: Heartbeat
    display: Display | Silent = field(default_factory=Silent)
    """Shows lines and a progress bar on the main rank."""
    trackers: Trackers | Untracked = field(default_factory=Untracked)
    """Writes files and sends metrics on the main rank."""

    def say(self, text: str) -> None:
        """Show a line on the main rank."""
        self.display.say(text)

    def log_event(self, kind: str, step: int, message: str, **more: Any) -> None:
        """Show what happened and append it to events.jsonl."""
        self.say(message if kind == "stopping" else f"step {step}: {message}")
        self.trackers.event(kind, step, message, **more)

    def log_stopping(self, step: int) -> None:
        """Report that the run ends here because of a signal."""
        message = f"stopping after step {step}, as {self.stop.name} requested; the same command resumes from here"
        self.log_event("stopping", step, message)

    def log_saves(self, outcomes: Sequence[SaveOutcome]) -> None:
        """Record checkpoints that are complete, and report those that failed."""
        for one in outcomes:
            if one.error is not None:
                self.log_event("save_failed", one.step, one.error, where=one.where)
                continue
            if one.note:
                self.say(f"step {one.step}: {one.note}")
            message = f"saved in {one.seconds:.1f} s, {one.bytes / 2**20:,.1f} MiB ({one.where})"
            more = {"seconds": round(one.seconds, 3), "bytes": one.bytes, "where": one.where}
            self.trackers.event("saved", one.step, message, **more)

    def close(self) -> None:
        """Stop the progress bar, and flush and close the trackers."""
        self.display.close()
        self.trackers.close()
