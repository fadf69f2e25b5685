"""A tiny mixture of experts, and what is compared of its steps."""

import tiny
import tuned

from igla_mega.engine.step import train_step

TOLERANCE = 1e-5
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.1}
STEADY = {"learning_rate": 1e-3}
DROPPING = {**STEADY, "expert_capacity_factor": 1.0}

TP = {"tensor_parallel": 2, "sequence_parallel": True}
EP, PP, CP = {"expert_parallel": 2}, {"pipeline_parallel": 2}, {"context_parallel": 2}
ETP, VPP = {"expert_tensor_parallel": 2}, {**PP, "virtual_pipeline": 2}
FSDP, FULL = {"strategy": "FSDP"}, {"gradient_checkpointing": "full"}
ALLGATHER = {"dispatcher": "allgather"}


def recipe(moe=None, training=None, **distributed):
    # A sequence at a time, so that of one rank every scope of balancing and of capacity is one.
    whole = {"expert_parallel": 1, "micro_batch_size": 1, **distributed}
    return tiny.recipe(moe={**MOE, **(moe or {})}, training=training or STEADY, **whole)


def reports(built, first: int, last: int, rate: float = 1e-3, dropout_seed: int | None = None) -> list[dict]:
    """What is compared of the steps `first` to `last` - 1."""
    taken = []
    for step in range(first, last):
        rows = tiny.batches(step, built.layout, built.mesh.data.rank)
        if dropout_seed is not None:
            rows = tuned.seeded(rows, built, step, dropout_seed)
        report = train_step(built, rows, step=step, seed=1, learning_rate=rate)
        numbers = {"loss": report.loss, "grad_norm": report.grad_norm}
        for name in ("balance", "drop_rate", "entropy"):
            numbers |= {f"{name}.{layer}": value for layer, value in enumerate(getattr(report.load, name))}
        taken.append(numbers)
    return taken


def furthest(one: list[dict], other: list[dict]) -> float:
    assert len(one) == len(other) >= 1 and one[0].keys() == other[0].keys()
    return max(abs(a[key] - b[key]) for a, b in zip(one, other, strict=True) for key in a)
