"""Run folders to look at: small, and with a bit of everything."""

import json
import math
from pathlib import Path

from igla_mega.monitor.heartbeat import HeartbeatFile
from igla_mega.train.trackers import Trackers


def opened(run: Path, logging, resume_step: int = 0, recipe: dict | None = None) -> Trackers:
    """Trackers as `run.train` opens them, once nothing can refuse the run any more."""
    trackers = Trackers(run, logging, recipe or {})
    trackers.open(resume_step)
    return trackers


def train_entry(step: int) -> dict:
    return {
        "step": step,
        "stage": "toy",
        "loss": 8 * math.exp(-step / 80) + 1,
        "grad_norm": 1.0 + step % 3,
        "learning_rate": 1e-3 * step / 200,
        "tokens": step * 100,
        "tokens_per_second": 5000.0 + step,
        "step_seconds": 0.02,
        "tflops_per_device": 0.1,
        "mfu": None,
        "memory_bytes": 2**30,
    }


def append(path: Path, *entries: dict) -> None:
    with open(path, "a") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in entries)


def small_run(folder: Path, *, steps: int = 200) -> Path:
    """A run with validation, two stages, events, samples and what only some runs have."""
    folder.mkdir(parents=True, exist_ok=True)
    HeartbeatFile(folder, step=steps).close()  # this process is the one that trains
    metrics = folder / "metrics.jsonl"
    append(metrics, {"step": 0, "unigram_entropy": 6.2})
    for step in range(1, steps + 1):
        busy = 0.5 + 0.4 * step / steps
        more: dict = {"moe_aux_loss": 1.1, "moe_drop_rate": 0.02, "expert_load": [[busy, 1 - busy], [0.5, 0.5]]}
        more |= {"moe_layers": {"drop_rate": [0.03, 0.01], "max_violation": [2 * busy - 1, 0.0]}}
        more |= {"ewc_nats": 0.1, "ewc_grad_norm": 0.5, "task_grad_norm": 1.0}
        more |= {"dpo_margin": step / 100, "dpo_accuracy": 0.5 + step / 1000}
        if step % 10 == 0:
            more["rank_step_seconds"] = [0.02, 0.02, 0.03, 0.02]
        stage = {"stage": "books"} if step > steps // 2 else {}
        append(metrics, {**train_entry(step), **more, **stage})
        if step % 50 == 0:
            append(metrics, {"step": step, "validation_loss": {"web": 3.5, "code": 2.5 + step / 1000}})
            append(
                metrics, {"step": step, "needle": {"256": {"0": 1.0, "50": step / 400}, "1024": {"0": 0.5, "50": 0.0}}}
            )
            append(metrics, {"step": step, "tasks": {"arc_easy/acc": 0.25 + step / 1000}})
    matrix = {
        "domains": ["code", "books"],
        "phases": ["code", "books"],
        "forgetting_matrix": [[2.5, None], [3.25, 2.0]],
    }
    append(metrics, {"step": steps, "stage": "books", **matrix, "backward_transfer": -0.75})
    append(
        folder / "events.jsonl",
        {"time": 1.7e9, "step": 0, "event": "started", "message": "on 4 ranks"},
        {"time": 1.7e9 + 2, "step": 100, "event": "saved", "message": "step_00000100 in 0.4 s"},
        {"time": 1.7e9 + 3, "step": 120, "event": "spike", "message": "loss 9.1 is far above the mean"},
    )
    append(
        folder / "samples.jsonl",
        {"step": 100, "stage": "toy", "prompt": "Once", "text": " upon a midnight"},
        {"step": 200, "stage": "toy", "prompt": "Once", "text": " upon a time"},
    )
    return folder
