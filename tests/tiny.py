"""A tiny model for tests, trained on any layout from the same weights and the same batches."""

import torch
import torch.distributed as dist

from igla_mega.config.schema import Recipe
from igla_mega.data.micro_batch import MicroBatch
from igla_mega.distributed.mesh import build_mesh
from igla_mega.engine.build import build_engine
from igla_mega.engine.step import train_step
from igla_mega.plan.choose import choose_layout

VOCAB, SEQUENCE, ROWS = 250, 32, 8


def recipe(
    *, model: dict | None = None, training: dict | None = None, moe: dict | None = None, **distributed
) -> Recipe:
    """A recipe of about 100k parameters; `distributed` is what a test varies."""
    return Recipe.model_validate(
        {
            "name": "tiny",
            "model": {
                "hidden_size": 64,
                "num_layers": 4,
                "num_heads": 4,
                "num_kv_heads": 2,
                "intermediate_size": 96,
                "vocab_size": VOCAB,
                "max_position": SEQUENCE,
                "init_std": 0.05,
                **(model or {}),
            },
            "training": {"learning_rate": 1e-2, "batch_size": ROWS, "total_steps": 100, **(training or {})},
            **({"moe": moe} if moe is not None else {}),
            "distributed": {
                "strategy": "DDP",
                "precision": "FP32",
                "tensor_parallel": 1,
                "pipeline_parallel": 1,
                "micro_batch_size": 2,
                **distributed,
            },
        }
    )


def engine(tiny: Recipe, *, initialize: bool = True):
    """Build the engine of this rank; returns it with the places of its parameters."""
    layout = choose_layout(tiny, dist.get_world_size(), "cpu")
    mesh = build_mesh(layout, tiny.training.seed)
    return build_engine(tiny, layout, mesh, torch.device("cpu"), initialize=initialize)


def batches(step: int, layout, data_rank: int):
    """Random rows with an uneven mask: micro-batches, and so ranks, differ in their number of targets."""
    generator = torch.Generator().manual_seed(1000 + step)
    length = layout.sequence_length
    rows = torch.randint(0, VOCAB, (ROWS, length + 1), generator=generator)
    mask = (torch.rand(ROWS, length, generator=generator) < torch.linspace(0.3, 1.0, ROWS)[:, None]).float()
    mbs = layout.micro_batch_size
    for m in range(layout.num_microbatches):
        at = (m * layout.data + data_rank) * mbs
        yield MicroBatch(
            tokens=rows[at : at + mbs, :-1].contiguous(),
            labels=rows[at : at + mbs, 1:].contiguous(),
            loss_mask=mask[at : at + mbs],
            position_ids=torch.arange(length).expand(mbs, length),
        )


def steps(built, first: int, last: int, learning_rate: float = 1e-2) -> list[tuple[float, float]]:
    """Loss and gradient norm of the steps `first` to `last` - 1."""
    reports = []
    for step in range(first, last):
        rows = batches(step, built.layout, built.mesh.data.rank)
        report = train_step(built, rows, step=step, seed=1, learning_rate=learning_rate)
        reports.append((report.loss, report.grad_norm))
    return reports


def trained(tiny: Recipe, num_steps: int = 6) -> list[tuple[float, float]]:
    """Train from the initial weights; every rank returns the same."""
    return steps(engine(tiny)[0], 0, num_steps, tiny.training.learning_rate)
