"""Write the reports of a run: metrics.jsonl, ledger.jsonl, events.jsonl, heartbeat.json, and those of `logging`."""

import contextlib
import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from igla_mega.config import json_text
from igla_mega.config.errors import ConfigError
from igla_mega.config.files import no_follow, write_text
from igla_mega.config.schema import Logging
from igla_mega.monitor.heartbeat import HeartbeatFile, unrecorded_end
from igla_mega.monitor.on_event import Commands
from igla_mega.monitor.prometheus import TextFile

OF_STEPS = ("metrics", "ledger", "samples")
"""Files that contain each step once: a run that goes back to a checkpoint removes the entries of later steps."""


class Trackers:
    """Appends to the files of the run folder, on the main rank only; the other ranks have `Untracked`."""

    def __init__(self, run_dir: Path, logging: Logging, *, resume_step: int, recipe: dict[str, Any]):
        self._run_dir = run_dir
        self._files: dict[str, Lines] = {}
        unrecorded = unrecorded_end(run_dir)
        self._scalars: list[Callable[[dict[str, float], int], None]] = []
        self._listeners: list[Callable[[dict[str, Any]], None]] = []
        self._rewinders: list[Callable[[int], None]] = []
        self._closers: list[Callable[[], None]] = []
        self.rewind(resume_step)
        self._observe(HeartbeatFile(run_dir, step=resume_step))
        if logging.prometheus is not None:
            self._observe(TextFile(Path(logging.prometheus), run_dir.resolve().name))
        if logging.on_event:
            commands = Commands(logging.on_event, run_dir)
            self._listeners.append(commands.event)
            self._closers.append(commands.close)
        if logging.tensorboard:
            self._add_tensorboard(run_dir / "tensorboard", resume_step)
        if logging.wandb != "off":
            self._add_wandb(run_dir, logging, recipe)
        if logging.mlflow is not None:
            from igla_mega.monitor.mlflow import MlflowRun

            mlflow = MlflowRun(logging.mlflow, logging.project, run_dir, recipe)
            self._scalars.append(mlflow.metrics)
            self._closers.append(mlflow.close)
        if unrecorded is not None:
            step, lost, message = unrecorded
            self.event("died", step, message, lost_steps=lost)

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

    def rewind(self, step: int) -> None:
        """Remove the entries of steps after `step` from the files `OF_STEPS`, and from TensorBoard's charts."""
        for invalidate in self._rewinders:
            with contextlib.suppress(OSError):
                invalidate(step)
        for name in OF_STEPS:
            if name in self._files:
                self._files.pop(name).close()
            rewind(self._run_dir / f"{name}.jsonl", step)

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

    def _add_tensorboard(self, folder: Path, resume_step: int) -> None:
        """Send scalars to TensorBoard's event files; those of steps after `resume_step` become invalid."""
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

        invalidate(resume_step)
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
    return path.read_text(encoding="utf-8").strip()


class Untracked:
    """Trackers of every rank but the main one: they write nothing."""

    def metrics(self, entry: dict[str, Any]) -> None: ...

    def event(self, kind: str, step: int, message: str, **more: Any) -> None: ...

    def bad_step(self, entry: dict[str, Any]) -> None: ...

    def ledger(self, entry: dict[str, Any]) -> None: ...

    def sample(self, entry: dict[str, Any]) -> None: ...

    def rewind(self, step: int) -> None: ...

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


def rewind(path: Path, step: int) -> None:
    """Remove the entries that a killed run wrote after its last checkpoint, at `step`, and an incomplete last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            entry = json_text.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step", 0), int) and entry.get("step", 0) <= step:
            kept.append(line + "\n")
    # Renamed over the file, so that a kill in between loses nothing.
    temporary = path.with_name(f".{path.name}")
    write_text(temporary, "".join(kept))
    os.replace(temporary, path)


class Lines:
    """Appends lines of JSON to a file; lines that cannot be written are kept in memory and written before the next."""

    def __init__(self, path: Path):
        self._path, self._waiting = path, b""
        self._descriptor: int | None = None

    def add(self, entry: dict[str, Any]) -> None:
        """Write a line, or keep it for the next call if it cannot be written."""
        self._waiting += (json.dumps(entry) + "\n").encode()
        # A full disk may accept part of a line: the rest follows at the next call.
        with contextlib.suppress(OSError):
            descriptor = self._opened()
            while self._waiting:
                self._waiting = self._waiting[os.write(descriptor, self._waiting) :]

    def close(self) -> None:
        """Close the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _opened(self) -> int:
        """Return the descriptor of the file, opening it first; terminate an incomplete last line."""
        if self._descriptor is None:
            self._descriptor = no_follow(str(self._path), os.O_RDWR | os.O_CREAT | os.O_APPEND)
            size = os.fstat(self._descriptor).st_size
            if size and os.pread(self._descriptor, 1, size - 1) != b"\n":  # a killed run's half-written line
                self._waiting = b"\n" + self._waiting
        return self._descriptor
