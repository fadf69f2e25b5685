"""The command as a process: what it is given, what it says, and a recipe of a second's training."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml

from igla_mega.data.indexed import IndexedWriter

VOCAB = 250
LIMIT_SECONDS = 300
"""Of a command. It ends a hang; it measures nothing: a loaded machine takes ten times as long as a quiet one."""


def environment(**variables) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "IGLA_MODELS")}
    root = str(Path(__file__).resolve().parent.parent)
    return {**kept, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", **{name: str(v) for name, v in variables.items()}}


def igla(*arguments, cwd=None, **variables) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "igla_mega", *map(str, arguments)],
        env=environment(**variables),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )


def refused(*arguments, code=2, **options) -> str:
    """Run what must be refused; the message."""
    done = igla(*arguments, **options)
    said = done.stdout + done.stderr
    assert done.returncode == code, said
    assert "Traceback" not in said and 'File "' not in said, said
    assert done.stderr.count("error:") <= 1, said
    return done.stderr


def write_dataset(prefix: Path, *, highest_id: int = VOCAB - 1, dtype=np.uint16) -> Path:
    generator = np.random.default_rng(3)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    tokens = generator.integers(0, VOCAB, 20_000)
    tokens[150] = highest_id
    with IndexedWriter(prefix, dtype) as writer:
        writer.add(tokens, np.full(100, 200))
    return prefix


def write_recipe(folder: Path, **sections) -> Path:
    """A recipe of a second's training, on the dataset `prepared/words`."""
    recipe = {
        "model": {
            "hidden_size": 64,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
            "intermediate_size": 96,
            "vocab_size": VOCAB,
            "max_position": 32,
        },
        "training": {"learning_rate": 1e-2, "batch_size": 8, "total_steps": 8, "warmup_steps": 2},
        "distributed": {"precision": "FP32", "timeout_seconds": 300},
        "data": {
            "mix": {"words": 1.0},
            "sources": {"words": str(folder / "words.jsonl")},
            "prepared": str(folder / "prepared"),
        },
        "checkpoint": {"every_steps": 2},
        "evaluation": {"num_batches": 1},
        "logging": {"tensorboard": False},
    }
    for section, changes in sections.items():
        recipe[section] = {**recipe.get(section, {}), **changes}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def metrics(run: Path) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm by step."""
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {entry["step"]: (entry["loss"], entry["grad_norm"]) for entry in entries if "loss" in entry}
