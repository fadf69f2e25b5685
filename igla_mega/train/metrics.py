"""Build the line of metrics.jsonl of a training step, and the warnings that follow from it."""

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
"""Number of steps without an alarm after which the same alarm is shown again."""


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory of this rank: of the device's allocator on CUDA, resident memory of the process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    # Linux counts in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measured_peak_flops(dtype: torch.dtype) -> float:
    """Measure the matrix-product rate of this process on this CPU, in FLOP/s: the best of six products."""
    # Large enough to reach the peak rate, small enough to take milliseconds.
    size = 768
    a = torch.ones(size, size, dtype=dtype)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def throttled(report: StepReport, gradient_clip: float) -> str | None:
    """Return a warning if the gradient is clipped and the EWC pull is the larger part of it, else None.

    Clipping scales both parts by the same factor, so a large pull shrinks the gradient of the task.
    """
    pull = report.pull
    if pull is None or not 0 < gradient_clip < report.grad_norm or pull.grad_norm <= pull.task_grad_norm:
        return None
    return (
        f"the gradient norm of the EWC pull, {pull.grad_norm:.3g}, exceeds the task's, {pull.task_grad_norm:.3g}, and "
        "clipping scales both down: the task is learned slowly. Lower continual.ewc_lambda, or set continual.coupling "
        "to decoupled or proximal."
    )


def step_entry(run: Run, progress: Progress, report: StepReport, rate: float, step_seconds: float) -> dict:
    """Return the line of metrics.jsonl for one step.

    Args:
        rate: learning rate of the step.
        step_seconds: wall time since the previous step.
    """
    tokens_per_second = run.tokens_per_step / step_seconds
    model = run.recipe.model
    assert model is not None, "a run has a model by now"
    # FLOPs of the model, not of the hardware: recomputation is not counted, so that it lowers the MFU. A parameter
    # costs 2 forward and 4 backward per token; attention 12 * S * heads * head size, of which causality masks half.
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
    """Return the metrics of EWC: penalty in nats, and L2 norms of its gradient and of the task's."""
    return {"ewc_nats": pull.nats, "ewc_grad_norm": pull.grad_norm, "task_grad_norm": pull.task_grad_norm}


def _load_metrics(load: Load, moe: Moe) -> dict:
    """Return the metrics of the experts: means over layers (the maximum, for the violation), and values per layer."""
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
    """Reports experts with too few tokens and layers that drop too many; `ALARM_STEPS` keeps it from repeating."""

    moe: Moe
    _last: dict[object, int] = field(default_factory=dict)
    """Last step of each alarm; the key is (layer, expert) for a starving expert, a layer's number for drops."""

    def lines(self, step: int, load: Load) -> Iterator[str]:
        """Yield a line for each kind of alarm that is new in this step."""
        moe, fair = self.moe, 1 / self.moe.num_experts
        if starving := self._new(step, load.starving(moe.alarm_load)):
            who = ", ".join(f"{e} of layer {n} ({load.tokens_per_expert[n][e]:.2%})" for n, e in starving[:4])
            more = f" and {len(starving) - 4} more" if len(starving) > 4 else ""
            yield (
                f"{'experts get' if len(starving) > 1 else 'an expert gets'} too few tokens: {who}{more}; the fair "
                f"share is {fair:.1%}, moe.alarm_load {moe.alarm_load:g}. If it lasts, raise moe.router_aux_loss_coef "
                "or set moe.bias_update_rate=1e-3."
            )
        if dropping := self._new(step, load.dropping(moe.alarm_drop_rate)):
            who = ", ".join(f"layer {layer} {load.drop_rate[layer]:.1%}" for layer in dropping[:8])
            yield (
                f"routed tokens are dropped: {who}; moe.alarm_drop_rate {moe.alarm_drop_rate:g}. If it lasts, raise "
                "training.expert_capacity_factor or moe.router_aux_loss_coef."
            )

    def _new(self, step: int, found: list) -> list:
        """Return the alarms that were not raised in the last `ALARM_STEPS` steps, and remember all of them."""
        new = [one for one in found if step - self._last.get(one, -ALARM_STEPS) >= ALARM_STEPS]
        self._last.update(dict.fromkeys(found, step))
        return new


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the dense peak of one device, in FLOP/s: from the data sheet for a known GPU, measured for a CPU."""
    if device.type == "cpu":
        return measured_peak_flops(dtype)
    from igla_mega.layout.hardware import dense_peak_flops

    return dense_peak_flops(torch.cuda.get_device_name(device), str(dtype).removeprefix("torch."))
