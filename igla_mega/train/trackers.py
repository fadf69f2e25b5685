"""Write the reports of a run: metrics.jsonl, ledger.jsonl, events.jsonl, heartbeat.json, and those of `logging`."""

import contextlib
import secrets
import sys
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from igla_mega.config.errors import ConfigError
from igla_mega.config.files import read_text, sync_folder, write_text
from igla_mega.config.schema import Logging
from igla_mega.data.json_lines import Lines, missing_steps, rewind
from igla_mega.monitor.heartbeat import HeartbeatFile, unrecorded_end
from igla_mega.monitor.on_event import Commands
from igla_mega.monitor.prometheus import TextFile

OF_STEPS = ("metrics", "ledger", "samples")
"""Files that contain each step once: a run that goes back to a checkpoint removes the entries of later steps."""
OF_EVENTS = ("events", "bad_steps")
"""Files from which only lines that cannot be read are removed."""


class Trackers:
    """Appends to the files of the run folder, on the main rank only; the other ranks have `Untracked`.

    Nothing that an earlier call of `train` has written is changed before `open`.
    """

    def __init__(self, run_dir: Path, logging: Logging, recipe: dict[str, Any]):
        self._run_dir, self._logging, self._recipe = run_dir, logging, recipe
        self._files: dict[str, Lines] = {}
        self._scalars: list[Callable[[dict[str, float], int], None]] = []
        self._listeners: list[Callable[[dict[str, Any]], None]] = []
        self._rewinders: list[Callable[[int], None]] = []
        self._closers: list[Callable[[], None]] = []

    def open(self, resume_step: int, skipped: Collection[int] = ()) -> list[str]:
        """Remove the entries after the checkpoint and what a power cut has damaged, and start what `logging` names.

        Args:
            skipped: steps that were taken without an update, which have no line in metrics.jsonl.

        Returns:
            Messages about lines that were removed because they cannot be read, and about steps without a line.

        Raises:
            ConfigError: a package that the recipe asks for is not installed.
            OSError: a file cannot be written.
        """
        unrecorded = unrecorded_end(self._run_dir)
        self._add_services()
        found = [*self.rewind(resume_step)]
        for name in OF_EVENTS:
            found += rewind(self._run_dir / f"{name}.jsonl", None)
        self._observe(HeartbeatFile(self._run_dir, step=resume_step))
        if unrecorded is not None:
            step, lost, message = unrecorded
            self.event("died", step, message, lost_steps=lost)
        for message in found:
            self.event("repaired", resume_step, message)
        if missing := "; ".join(missing_steps(self._run_dir, resume_step, skipped)):
            message = f"{missing}: lost, most likely in a power cut. The checkpoint is whole; training is not affected."
            self.event("lines_missing", resume_step, message)
            found.append(message)
        return found

    def _add_services(self) -> None:
        """Start what `logging` names; raise ConfigError if a package is not installed."""
        logging = self._logging
        if logging.wandb != "off":
            self._add_wandb(self._run_dir, logging, self._recipe)
        if logging.mlflow is not None:
            from igla_mega.monitor.mlflow import MlflowRun

            mlflow = MlflowRun(logging.mlflow, logging.project, self._run_dir, self._recipe)
            self._scalars.append(mlflow.metrics)
            self._closers.append(mlflow.close)
        if logging.tensorboard:
            self._add_tensorboard(self._run_dir / "tensorboard")
        if logging.prometheus is not None:
            self._observe(TextFile(Path(logging.prometheus), self._run_dir.resolve().name))
        if logging.on_event:
            commands = Commands(logging.on_event, self._run_dir)
            self._listeners.append(commands.event)
            self._closers.append(commands.close)

    def metrics(self, entry: dict[str, Any]) -> None:
        """Write one line; its numbers, also those one level down, are sent to the services as scalars of its step."""
        self._line("metrics", entry)
        scalars = {k: v for k, v in entry.items() if isinstance(v, int | float) and k != "step"}
        for group, values in entry.items():
            if isinstance(values, dict):
                scalars |= {f"{group}/{k}": v for k, v in values.items() if isinstance(v, int | float)}
        for write in [*self._scalars]:
            with _disabled_by_an_error(self._scalars, write):
                write(scalars, entry["step"])
        if losses := entry.get("validation_loss"):
            self.event("evaluated", entry["step"], f"validation loss of {', '.join(losses)}", losses=losses)

    def event(self, kind: str, step: int, message: str, **more: Any) -> None:
        """Write what happened to the run as a line of events.jsonl, which is never removed."""
        entry = event(kind, step, message, **more)
        self._line("events", entry)
        for listen in [*self._listeners]:
            with _disabled_by_an_error(self._listeners, listen):
                listen(entry)

    def bad_step(self, entry: dict[str, Any]) -> None:
        """Write a bad step as a line of bad_steps.jsonl, which is never removed."""
        self._line("bad_steps", entry)

    def ledger(self, entry: dict[str, Any]) -> None:
        """Write which samples of which sources a step consumed, as a line of ledger.jsonl."""
        self._line("ledger", entry)

    def sample(self, entry: dict[str, Any]) -> None:
        """Write a prompt and the model's continuation, as a line of samples.jsonl."""
        self._line("samples", entry)

    def rewind(self, step: int) -> list[str]:
        """Remove the entries of steps after `step` from the files `OF_STEPS`, and from TensorBoard's charts.

        Returns:
            Messages about lines that were removed because they cannot be read.
        """
        for invalidate in self._rewinders:
            with contextlib.suppress(OSError):
                invalidate(step)
        for name in OF_STEPS:
            if name in self._files:
                self._files.pop(name).close()
        return [message for name in OF_STEPS for message in rewind(self._run_dir / f"{name}.jsonl", step)]

    def sync(self) -> None:
        """Flush all lines to the disk; a checkpoint is sealed only after the lines of its steps. From any thread.

        Raises:
            OSError: a file cannot be written.
        """
        for file in [*self._files.values()]:
            file.sync()
        sync_folder(self._run_dir)

    def close(self) -> None:
        """Flush and close everything."""
        for close in [*self._closers, *(file.close for file in self._files.values())]:
            with contextlib.suppress(OSError):
                close()

    def _observe(self, one: HeartbeatFile | TextFile) -> None:
        """Send steps and events to a part that keeps a file of the run's state."""
        self._scalars.append(one.metrics)
        self._listeners.append(one.event)
        self._closers.append(one.close)

    def _line(self, name: str, entry: dict[str, Any]) -> None:
        """Append a line to a file, which is opened at its first line."""
        if name not in self._files:
            self._files[name] = Lines(self._run_dir / f"{name}.jsonl")
        self._files[name].add(entry)

    def _add_tensorboard(self, folder: Path) -> None:
        """Send scalars to TensorBoard's event files; `rewind` makes those of later steps invalid."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        writer = EventFileWriter(str(folder))

        def write(scalars: dict[str, float], step: int) -> None:
            # Not by `tensorboard.summary.Writer`, which stores numbers as tensors: `EventAccumulator.Scalars`, and
            # whatever reads the files with it, lists numbers alone.
            values = [Summary.Value(tag=name, simple_value=float(value)) for name, value in scalars.items()]
            writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

        def invalidate(step: int) -> None:
            # Readers drop the events of this step and later ones that come before it in the files.
            start = SessionLog(status=SessionLog.START)
            writer.add_event(Event(wall_time=time.time(), step=step + 1, session_log=start))

        self._scalars.append(write)
        self._rewinders.append(invalidate)
        self._closers.append(writer.close)

    def _add_wandb(self, run_dir: Path, logging: Logging, recipe: dict[str, Any]) -> None:
        """Send scalars to Weights & Biases.

        Raises:
            ConfigError: the package is not installed.
        """
        try:
            import wandb
        except ImportError:
            raise ConfigError(
                f"logging.wandb: {logging.wandb} needs the package wandb, which is not installed.\n"
                "  Run `pip install wandb` (or install the extra `track`), or set logging.wandb=off."
            ) from None
        run = wandb.init(
            project=logging.project,
            mode="online" if logging.wandb == "online" else "offline",
            dir=str(run_dir),
            name=run_dir.name,
            id=_wandb_id(run_dir),
            resume="allow",
            config=recipe,
        )
        self._scalars.append(lambda scalars, step: run.log(scalars, step=step))
        self._closers.append(run.finish)


@contextlib.contextmanager
def _disabled_by_an_error(parts: list, part: Callable) -> Iterator[None]:
    """Remove a part that cannot write: a full disk or a lost mount must not end a training for the sake of a chart."""
    try:
        yield
    except OSError as error:
        parts.remove(part)
        print(f"a tracker cannot write ({error}); it is disabled until the next start", file=sys.stderr)


def _wandb_id(run_dir: Path) -> str:
    """Return the id under which a resume continues the charts of a run; it is stored in the run folder.

    The name of the folder does not do: `a/run` and `b/run` of one project would be drawn as one run.
    """
    path = run_dir / "wandb_id"
    if not path.is_file():
        # Version 0.1 used the folder's name: a run that it began keeps its charts.
        write_text(path, run_dir.resolve().name if (run_dir / "wandb").is_dir() else secrets.token_hex(8))
    return read_text(path).strip()


class Untracked:
    """Trackers of every rank but the main one: they write nothing."""

    def metrics(self, entry: dict[str, Any]) -> None: ...

    def event(self, kind: str, step: int, message: str, **more: Any) -> None: ...

    def bad_step(self, entry: dict[str, Any]) -> None: ...

    def ledger(self, entry: dict[str, Any]) -> None: ...

    def sample(self, entry: dict[str, Any]) -> None: ...

    def open(self, resume_step: int, skipped: Collection[int] = ()) -> list[str]:
        return []

    def rewind(self, step: int) -> list[str]:
        return []

    def sync(self) -> None: ...

    def close(self) -> None: ...


def event(kind: str, step: int, message: str, **more: Any) -> dict[str, Any]:
    """Return a line of events.jsonl."""
    return {"time": round(time.time(), 3), "step": step, "event": kind, "message": message, **more}


def write_event(run_dir: Path, kind: str, step: int, message: str, **more: Any) -> dict[str, Any]:
    """Append a line to a run's events.jsonl without trackers, on any rank, and return it."""
    file, entry = Lines(run_dir / "events.jsonl"), event(kind, step, message, **more)
    file.add(entry)
    file.close()
    return entry
