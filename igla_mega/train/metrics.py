"""What a run writes about itself: metrics.jsonl, the ledger, TensorBoard, Weights & Biases."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from igla_mega.checkpoint.progress import Progress, SaveOutcome
from igla_mega.config import json_text
from igla_mega.config.errors import ConfigError
from igla_mega.config.features import Moe
from igla_mega.config.schema import Logging
from igla_mega.engine.step import StepReport
from igla_mega.model.router import Load
from igla_mega.objective.ewc import Pull
from igla_mega.train.console import Display, Silent
from igla_mega.train.state import Run

ALARM_STEPS = 50
"""Steps for which something must have been in order to be reported again."""

OF_STEPS = ("metrics", "ledger", "samples")
"""Files that hold each step once: a run that goes back takes back what it wrote of later ones."""


class Trackers:
    """Appends to the run folder's files; the main rank has one, the others none."""

    def __init__(self, run_dir: Path, logging: Logging, *, resume_step: int, recipe: dict[str, Any]):
        self._run_dir = run_dir
        self._files: dict[str, Lines] = {}
        self.rewind(resume_step)
        self._scalars: list[Callable[[dict[str, float], int], None]] = []
        self._closers: list[Callable[[], None]] = []
        if logging.tensorboard:
            self._add_tensorboard(run_dir / "tensorboard")
        if logging.wandb != "off":
            self._add_wandb(run_dir, logging, recipe)

    def metrics(self, entry: dict[str, Any]) -> None:
        """Write one object; numbers in it, also one level down, go to the trackers as scalars at `entry["step"]`."""
        self._line("metrics", entry)
        scalars = {k: v for k, v in entry.items() if isinstance(v, int | float) and k != "step"}
        for group, values in entry.items():
            if isinstance(values, dict):
                scalars |= {f"{group}/{k}": v for k, v in values.items() if isinstance(v, int | float)}
        for write in [*self._scalars]:
            try:
                write(scalars, entry["step"])
            except OSError as error:
                self._scalars.remove(write)
                print(f"a tracker cannot write ({error}); it is left out until the next start", file=sys.stderr)
        if losses := entry.get("validation_loss"):
            self.event("evaluated", entry["step"], f"validation loss of {', '.join(losses)}", losses=losses)

    def event(self, kind: str, step: int, message: str, **more: Any) -> None:
        """Write what happened to the run: a line of events.jsonl, which is never taken back."""
        self._line("events", event(kind, step, message, **more))

    def bad_step(self, entry: dict[str, Any]) -> None:
        """Write down a step that went wrong: a line of bad_steps.jsonl, which is never taken back."""
        self._line("bad_steps", entry)

    def ledger(self, entry: dict[str, Any]) -> None:
        """Write which samples of which source a step consumed."""
        self._line("ledger", entry)

    def sample(self, entry: dict[str, Any]) -> None:
        """Write a text that the model has continued."""
        self._line("samples", entry)

    def rewind(self, step: int) -> None:
        """Take back what was written of the steps beyond `step`."""
        for name in OF_STEPS:
            if name in self._files:
                self._files.pop(name).close()
            rewind(self._run_dir / f"{name}.jsonl", step)

    def close(self) -> None:
        """Flush and close everything."""
        for close in [*self._closers, *(file.close for file in self._files.values())]:
            with contextlib.suppress(OSError):
                close()

    def _line(self, name: str, entry: dict[str, Any]) -> None:
        if name not in self._files:
            self._files[name] = Lines(self._run_dir / f"{name}.jsonl")
        self._files[name].add(entry)

    def _add_tensorboard(self, folder: Path) -> None:
        from tensorboard.summary import Writer

        writer = Writer(str(folder))

        def write(scalars: dict[str, float], step: int) -> None:
            for name, value in scalars.items():
                writer.add_scalar(name, value, step)

        self._scalars.append(write)
        self._closers.append(writer.close)

    def _add_wandb(self, run_dir: Path, logging: Logging, recipe: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise ConfigError(
                f"logging.wandb: {logging.wandb} needs the package wandb, and it is not installed.\n"
                "  Run `pip install wandb` (or install the extra `track`), or set logging.wandb=off."
            ) from None
        run = wandb.init(
            project=logging.project,
            mode="online" if logging.wandb == "online" else "offline",
            dir=str(run_dir),
            name=run_dir.name,
            # The same folder is the same run, also after a resume.
            id=run_dir.resolve().name,
            resume="allow",
            config=recipe,
        )
        self._scalars.append(lambda scalars, step: run.log(scalars, step=step))
        self._closers.append(run.finish)


def event(kind: str, step: int, message: str, **more: Any) -> dict[str, Any]:
    """A line of a run's events.jsonl."""
    return {"time": round(time.time(), 3), "step": step, "event": kind, "message": message, **more}


def write_event(run_dir: Path, kind: str, step: int, message: str, **more: Any) -> None:
    """Add a line to a run's events.jsonl, where there are no trackers."""
    file = Lines(run_dir / "events.jsonl")
    file.add(event(kind, step, message, **more))
    file.close()


def rewind(path: Path, step: int) -> None:
    """Drop what a killed run wrote after its last checkpoint: entries beyond `step`, and a half-written last line."""
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
    temporary = path.with_name(f".{path.name}")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)


class Lines:
    """Adds lines of JSON to a file; what a full disk does not take waits in memory, and goes before the next line."""

    def __init__(self, path: Path):
        self._path, self._waiting = path, b""
        self._descriptor: int | None = None

    def add(self, entry: dict[str, Any]) -> None:
        """Write a line, or keep it."""
        self._waiting += (json.dumps(entry) + "\n").encode()
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
        if self._descriptor is None:
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            size = os.fstat(self._descriptor).st_size
            if size and os.pread(self._descriptor, 1, size - 1) != b"\n":  # a killed run's half-written line
                self._waiting = b"\n" + self._waiting
        return self._descriptor


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this rank has held: of the device's allocator on CUDA, resident on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measured_peak_flops(dtype: torch.dtype) -> float:
    """Matrix-product rate of this process on this CPU, FLOP/s: the best of a few products of 768 x 768."""
    size = 768
    a = torch.ones(size, size, dtype=dtype)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def log_event(
    display: Display | Silent, trackers: Trackers | None, kind: str, step: int, words: str, **more: Any
) -> None:
    """Say what happened, and write it down."""
    display.say(words if kind == "stopping" else f"step {step}: {words}")
    if trackers:
        trackers.event(kind, step, words, **more)


def log_stopping(run: Run, progress: Progress, display: Display | Silent, trackers: Trackers | None) -> None:
    """Say that the run ends here, and who has asked for it."""
    step = progress.step
    words = f"stopping after step {step}, as {run.stop.name} asked; the same command goes on from here"
    log_event(display, trackers, "stopping", step, words)


def log_saves(outcomes: Sequence[SaveOutcome], display: Display | Silent, trackers: Trackers | None) -> None:
    """Write down which saves are whole; say which are not."""
    for one in outcomes:
        if one.error is not None:
            log_event(display, trackers, "save_failed", one.step, one.error, where=one.where)
            continue
        if one.note:
            display.say(f"step {one.step}: {one.note}")
        if trackers:
            words = f"saved in {one.seconds:.1f} s, {one.bytes / 2**20:,.1f} MiB ({one.where})"
            trackers.event("saved", one.step, words, seconds=round(one.seconds, 3), bytes=one.bytes, where=one.where)


def throttled(report: StepReport, gradient_clip: float) -> str | None:
    """What to say when clipping bites and leaves most of its norm to the pull."""
    pull = report.pull
    if pull is None or not 0 < gradient_clip < report.grad_norm or pull.grad_norm <= pull.task_grad_norm:
        return None
    return (
        f"the pull's gradient {pull.grad_norm:.3g} is above the task's {pull.task_grad_norm:.3g}, and clipping shrinks "
        "both: learning is throttled. Lower ewc_lambda, or set coupling to decoupled or proximal."
    )


def step_entry(
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
        "expert_load": load.tokens_per_expert,
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
            who = ", ".join(f"{e} of layer {n} ({load.tokens_per_expert[n][e]:.2%})" for n, e in starving[:4])
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


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Dense peak of one device, FLOP/s: from the data sheet for a known GPU, measured for a CPU."""
    if device.type == "cpu":
        return measured_peak_flops(dtype)
    from igla_mega.layout.hardware import dense_peak_flops

    return dense_peak_flops(torch.cuda.get_device_name(device), str(dtype).removeprefix("torch."))
