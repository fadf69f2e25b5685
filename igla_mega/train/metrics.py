"""What a run writes about itself: metrics.jsonl, the ledger, TensorBoard, Weights & Biases."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import fmean

import torch

from igla_mega.checkpoint.progress import Progress
from igla_mega.config.features import Moe
from igla_mega.engine.step import StepReport
from igla_mega.model.router import Load
from igla_mega.objective.ewc import Pull
from igla_mega.train.state import Run

ALARM_STEPS = 50
"""Steps for which something must have been in order to be reported again."""


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


def throttled(report: StepReport, gradient_clip: float) -> str | None:
    """What to say when clipping bites and leaves most of its norm to the pull."""
    pull = report.pull
    if pull is None or not 0 < gradient_clip < report.grad_norm or pull.grad_norm <= pull.task_grad_norm:
        return None
    return (
        f"the pull's gradient {pull.grad_norm:.3g} is above the task's {pull.task_grad_norm:.3g}, and clipping shrinks "
        "both: learning is throttled. Lower ewc_lambda, or set coupling to decoupled or proximal."
    )


def step_entry(run: Run, progress: Progress, report: StepReport, rate: float, step_seconds: float) -> dict:
    """Return the line of metrics.jsonl for one step.

    Args:
        rate: learning rate of the step.
        step_seconds: wall time since the step before.
    """
    tokens_per_second = run.tokens_per_step / step_seconds
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
        "memory_bytes": peak_memory_bytes(run.session.device),
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
