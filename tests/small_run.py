"""Whole runs of a second: a recipe on random words, and `run.train` on forked ranks, with faults where a test wants."""

import contextlib
import io
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import ranks
import torch
import torch.distributed as dist
import yaml

from igla_mega import run as engine
from igla_mega.config.load import load_recipe
from igla_mega.data.indexed import IndexedWriter
from igla_mega.train import loop

VOCAB = 64


class Fault:
    """Hurts a module's output, or the gradient of it, on one rank, in one micro-batch of one step."""

    def __init__(self, rank: int, step: int, module: str, *, backward=False, times=10**6, value=math.nan):
        self.rank, self.step, self.module = rank, step, module
        self.backward, self.times, self.value = backward, times, value

    def __call__(self) -> None:
        if int(os.environ["RANK"]) != self.rank:
            return
        take = loop.train_step

        def hurt_step(engine, batches, *, step, **given):
            if step + 1 != self.step or self.times == 0:
                return take(engine, batches, step=step, **given)
            self.times -= 1
            hooks = [
                module.register_forward_hook(lambda *args: self.hurt(engine, args[-1]), prepend=True)
                for chunk in engine.chunks
                for name, module in chunk.named_modules()
                if name.endswith(self.module)
            ]
            assert len(hooks) == 1
            try:
                return take(engine, batches, step=step, **given)
            finally:
                hooks[0].remove()

        loop.train_step = hurt_step

    def hurt(self, engine, output):
        if engine.heartbeat.micro_batch != 2:
            return None
        tensor, *rest = output if isinstance(output, tuple) else (output,)
        if self.backward:
            tensor.register_hook(lambda gradient: torch.full_like(gradient, self.value))
            return None
        tensor = tensor * self.value
        return (tensor, *rest) if isinstance(output, tuple) else tensor


def write_recipe(folder: Path, **sections) -> Path:
    """A recipe of 8 steps, saved after every second."""
    folder.mkdir(parents=True, exist_ok=True)
    with IndexedWriter(folder / "words", np.uint16) as writer:
        writer.add(np.random.default_rng(3).integers(0, VOCAB, 20_000), np.full(100, 200))
    recipe: dict = {
        "model": {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
            "intermediate_size": 48,
            "vocab_size": VOCAB,
            "max_position": 32,
        },
        "training": {"learning_rate": 1e-2, "batch_size": 8, "total_steps": 8},
        "distributed": {"strategy": "DDP", "precision": "FP32", "tensor_parallel": 1, "micro_batch_size": 2},
        "data": {"mix": {"words": 1.0}, "sources": {"words": str(folder / "words")}},
        "checkpoint": {"every_steps": 2},
        "evaluation": {"every_steps": 0, "num_batches": 1},
        "logging": {"tensorboard": False},
    }
    for section, changes in sections.items():
        recipe[section] = {**recipe.get(section, {}), **changes}
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def train(
    num_ranks: int, recipe: Path, run_dir: Path, fault: Callable | None = None, *args, mark: Path | None = None
) -> list:
    """Run it; what each rank said, or the error it ended with.

    Args:
        fault: called on every rank before the run, with `args`.
        mark: also write what rank N said to this file with _N behind its name.
    """
    return ranks.run(num_ranks, rank_main, str(recipe), str(run_dir), fault, args, mark)


def rank_main(recipe: str, run_dir: str, fault: Callable | None, args: tuple, mark: Path | None) -> str:
    said = run_said(recipe, run_dir, fault, args)
    if mark is not None:
        mark.with_name(f"{mark.name}_{os.environ['RANK']}").write_text(said)
    return said


def run_said(recipe: str, run_dir: str, fault: Callable | None, args: tuple) -> str:
    store = own_world()
    if fault is not None:
        fault(*args)
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            engine.train(load_recipe(recipe), Path(run_dir))
        except (FloatingPointError, RuntimeError) as error:
            return f"{said.getvalue()}\n{type(error).__name__}: {error}"
        finally:
            del store
    return said.getvalue()


def own_world() -> dist.TCPStore | None:
    """Leave the world that the test made, so that the run makes its own; what is returned must stay as long."""
    # The store is there before any rank receives its port, as torchrun's is.
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False) if dist.get_rank() == 0 else None
    port = [store.port if store else None]
    dist.broadcast_object_list(port)
    dist.destroy_process_group()
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port[0]), TORCHELASTIC_USE_AGENT_STORE="True")
    return store


def as_rank(function, text: str, run_dir: str, *args):
    """Call `function(recipe, run_dir, *args)` on this rank in a world of the run's own; return what the run says."""
    store = own_world()
    path = Path(run_dir) / f"recipe_{os.environ['RANK']}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        function(load_recipe(path), Path(run_dir), *args)
    del store
    return said.getvalue()


def train_hurt(recipe, run_dir: Path, fault: Fault):
    """Train with a fault, for `as_rank`."""
    fault()
    engine.train(recipe, run_dir)


def lines(run_dir: Path, name: str) -> list[dict]:
    path = run_dir / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def losses(run_dir: Path) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm by step."""
    return {one["step"]: (one["loss"], one["grad_norm"]) for one in lines(run_dir, "metrics.jsonl") if "loss" in one}


def events(run_dir: Path) -> list[str]:
    return [one["event"] for one in lines(run_dir, "events.jsonl")]
