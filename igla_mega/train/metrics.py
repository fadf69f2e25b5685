"""What a run writes about itself: metrics.jsonl, the ledger, TensorBoard, Weights & Biases."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from igla_mega.config.errors import ConfigError
from igla_mega.config.schema import Logging


class Trackers:
    """Appends to the run folder's files; the main rank has one, the others none."""

    def __init__(self, run_dir: Path, logging: Logging, *, resume_step: int, recipe: dict[str, Any]):
        rewind(run_dir / "metrics.jsonl", resume_step)
        rewind(run_dir / "ledger.jsonl", resume_step)
        self._metrics = open(run_dir / "metrics.jsonl", "a")  # noqa: SIM115 (closed by `close`)
        self._ledger = open(run_dir / "ledger.jsonl", "a")  # noqa: SIM115
        self._scalars: list[Callable[[dict[str, float], int], None]] = []
        self._closers: list[Callable[[], None]] = [self._metrics.close, self._ledger.close]
        if logging.tensorboard:
            self._add_tensorboard(run_dir / "tensorboard")
        if logging.wandb != "off":
            self._add_wandb(run_dir, logging, recipe)

    def metrics(self, entry: dict[str, Any]) -> None:
        """Write one object; numbers in it, also one level down, go to the trackers as scalars at `entry["step"]`."""
        _append(self._metrics, entry)
        scalars = {k: v for k, v in entry.items() if isinstance(v, int | float) and k != "step"}
        for group, values in entry.items():
            if isinstance(values, dict):
                scalars |= {f"{group}/{k}": v for k, v in values.items() if isinstance(v, int | float)}
        for write in self._scalars:
            write(scalars, entry["step"])

    def ledger(self, entry: dict[str, Any]) -> None:
        """Write which samples of which source a step consumed."""
        _append(self._ledger, entry)

    def close(self) -> None:
        """Flush and close everything."""
        for close in self._closers:
            close()

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


def rewind(path: Path, step: int) -> None:
    """Drop what a killed run wrote after its last checkpoint: entries beyond `step`, and a half-written last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and entry.get("step", 0) <= step:
            kept.append(line + "\n")
    temporary = path.with_name(f".{path.name}")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)


def _append(file, entry: dict[str, Any]) -> None:
    file.write(json.dumps(entry) + "\n")
    file.flush()


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
