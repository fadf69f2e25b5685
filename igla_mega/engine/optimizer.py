"""Define the optimizer interface of the training step and checkpoints, and the step with an EWC penalty."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Protocol

import torch
from torch import Tensor

from igla_mega.model.shards import ParameterState, local_values
from igla_mega.objective.ewc import Ewc, Pull

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names of AdamW's moments, as torch stores them and as checkpoints contain them."""


def decays(name: str, num_dims: int) -> bool:
    """Return True if weight decay applies to a parameter: a matrix, or DoRA's magnitudes, which PEFT decays too."""
    return num_dims > 1 or name.endswith("lora_magnitude")


class BadStep(FloatingPointError):
    """Non-finite or abnormal value that prevented a step; no parameter has been updated."""

    def __init__(self, what: str, value: float, losses: Sequence[float] = ()):
        """Record the reason.

        Args:
            what: `loss`, `gradient norm`, or `spike` (a finite loss far above its recent values).
            value: value of the loss or of the norm.
            losses: this rank's loss of each micro-batch, summed over its targets, in nats.
        """
        super().__init__(f"{what} {value}")
        self.what, self.value, self.losses = what, value, list(losses)


class Optimizer(Protocol):
    """Interface of AdamW over this rank's parameters (Loshchilov & Hutter 2019, arXiv:1711.05101)."""

    def zero_grad(self) -> None:
        """Clear the gradients of the last step."""

    def step(self, learning_rate: float, ewc: Ewc | None = None) -> tuple[float, Pull | None]:
        """Clip the gradients by their global norm and update the parameters, with the penalty of `ewc` if active.

        Returns:
            The L2 norm over all parameters before clipping, and the penalty's values if it is active.

        Raises:
            BadStep: the norm is not finite; no parameter has been updated.
        """

    def states(self) -> Iterator[ParameterState]:
        """Yield this rank's optimizer states; moments are allocated as zeros before the first step."""

    def loaded(self, num_steps: int) -> None:
        """Continue from values that were written into the states, as after `num_steps` updates."""

    @property
    def one_sample(self) -> bool:
        """True if `per_sample` needs a sample on one data-parallel rank at a time and empty ones on the others."""

    def per_sample(self) -> AbstractContextManager[Callable[[list[Tensor]], None]]:
        """Square gradients before they are summed over ranks, for backward passes over one sample per data rank.

        Yields:
            A function that adds to one 1-D fp32 tensor per state the sum over data-parallel ranks of the squared
            gradient of the last backward pass.
        """


def step_with_ewc(
    ewc: Ewc | None,
    states: Sequence[ParameterState],
    gradients: Sequence[Tensor],
    adams: Sequence[torch.optim.Optimizer],
    *,
    clip: Callable[[], float],
    update: Callable[[], None],
) -> tuple[float, Pull | None]:
    """Clip the gradients and update the parameters, with the EWC penalty applied where `ewc.coupling` says.

    `coupled`: before clipping, so that the sum of both gradients is clipped. `decoupled`: after clipping, so that a
    large penalty does not shrink the task's gradient. `proximal`: after AdamW's update, as a separate step.

    Args:
        ewc: penalty; None or inactive for a plain step.
        states: optimizer states of this rank.
        gradients: gradient of each state; reduced, divided and unscaled.
        adams: optimizers that `update` steps.
        clip: clips the gradients and returns their norm before clipping.
        update: updates the parameters.

    Returns:
        The gradient norm before clipping, and the penalty's values if it is active.

    Raises:
        BadStep: the norm is not finite; no parameter has been updated.
    """
    clip = _finite(clip)
    if ewc is None or not ewc.holds:
        grad_norm = clip()
        update()
        return grad_norm, None
    if ewc.coupling == "coupled":
        pull = ewc.pull(states, gradients)
        grad_norm = clip()
        update()
        return grad_norm, pull
    grad_norm = clip()
    if ewc.coupling == "decoupled":
        pull = ewc.pull(states, gradients)
        update()
        return grad_norm, pull
    pull = ewc.measure(states, gradients)
    with ExitStack() as hooks:
        # A hook, because `update` also copies the masters to the modules and all-gathers them: the proximal step must
        # come after AdamW's step and before that copy.
        for adam in adams:
            hook = adam.register_step_post_hook(lambda stepped, *_: _draw_to_anchor(ewc, states, stepped))
            hooks.callback(hook.remove)
        update()
    return grad_norm, pull


def _finite(clip: Callable[[], float]) -> Callable[[], float]:
    """Return `clip` with a check that raises BadStep, before any update, if the norm is not finite."""

    def checked() -> float:
        if not math.isfinite(grad_norm := clip()):
            raise BadStep("gradient norm", grad_norm)
        return grad_norm

    return checked


def _draw_to_anchor(ewc: Ewc, states: Sequence[ParameterState], adam: torch.optim.Optimizer) -> None:
    """Apply the proximal step to every state that `adam` has just updated."""
    # Matched by memory: wrappers give the optimizer other tensor objects over the same storage.
    places = {state.values["master"].data_ptr(): i for i, state in enumerate(states) if state.values["master"].numel()}
    for group in adam.param_groups:
        for param in group["params"]:
            weights = local_values(param)[0]
            if (index := places.get(weights.data_ptr())) is None:
                continue
            num_steps = float(adam.state[param].get("step", group.get("step")))
            unbiased = states[index].values["exp_avg_sq"] / (1 - group["betas"][1] ** num_steps)
            ewc.draw_to_anchor(index, weights, unbiased, learning_rate=group["lr"], epsilon=group["eps"])


def moments_of(adam: torch.optim.Optimizer, master: Tensor) -> dict[str, Tensor]:
    """Return the two moments of a parameter, allocated as AdamW's first step would if they do not exist yet."""
    state = adam.state[master]
    if not state:
        state.update({name: torch.zeros_like(master) for name in MOMENTS})
        # Transformer Engine and apex count steps per group, torch per parameter; fused AdamW needs the count on the
        # device.
        if isinstance(adam, torch.optim.AdamW):
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
    return {name: state[name] for name in MOMENTS}


def set_num_steps(adam: torch.optim.Optimizer, num_steps: int) -> None:
    """Set the number of updates for AdamW's bias correction.

    Filled in place: torch keeps one tensor per parameter and increments it, so they must not share one.
    """
    for state in adam.state.values():
        if "step" in state:
            state["step"].fill_(num_steps)
    for group in adam.param_groups:
        if "step" in group:
            group["step"] = num_steps
