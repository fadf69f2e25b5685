"""What the training step asks of an optimizer, and what a checkpoint needs to know of its state."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Protocol

import torch
from torch import Tensor

from igla_mega.model.shards import ParameterState, local_values
from igla_mega.objective.ewc import Ewc, Pull

MOMENTS = ("exp_avg", "exp_avg_sq")


class BadStep(FloatingPointError):
    """A step that was not taken: nothing has been updated."""

    def __init__(self, what: str, value: float, losses: Sequence[float] = ()):
        """
        Args:
            what: `loss`, `gradient norm`, or `spike` (a loss that is finite and out of all proportion).
            value: of the loss, or of the norm.
            losses: this rank's, of each micro-batch, summed over its targets.
        """
        super().__init__(f"{what} {value}")
        self.what, self.value, self.losses = what, value, list(losses)


class Optimizer(Protocol):
    """AdamW over this rank's parameters (Loshchilov & Hutter 2019, arXiv:1711.05101)."""

    def zero_grad(self) -> None:
        """Forget the gradients of the last step."""

    def step(self, learning_rate: float, ewc: Ewc | None = None) -> tuple[float, Pull | None]:
        """Clip by the global norm and update, pulled by `ewc`.

        Returns:
            That norm, L2 over all parameters before clipping, and what the pull was while something is held.

        Raises:
            BadStep: the norm is not finite; nothing has been updated.
        """

    def states(self) -> Iterator[ParameterState]:
        """Walk over the state this rank keeps, making it (zeros) where no step has been taken yet."""

    def loaded(self, num_steps: int) -> None:
        """Take up values that were written into the states, as after `num_steps` updates."""

    @property
    def one_sample(self) -> bool:
        """Whether `per_sample` wants a sample on one data-parallel rank at a time, and blank ones on the others."""

    def per_sample(self) -> AbstractContextManager[Callable[[list[Tensor]], None]]:
        """For backward passes over one sample a data-parallel rank, whose gradients are squared before they are summed.

        Yields:
            A function that adds the sum over data-parallel ranks of the squared gradient of the pass just made to
            tensors of the states, 1-D fp32.
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
    """Clip and update with the pull where `ewc.coupling` puts it.

    `coupled`: before clipping, the gradient of loss and penalty together. `decoupled`: after it, so that a large
    penalty does not use up the norm that clipping leaves. `proximal`: after AdamW's step, as a step of its own.

    Args:
        states, gradients: of one another, in the same order; gradients reduced, divided and unscaled.
        adams: the optimizers that `update` steps.
        clip: clips the gradients and returns their norm.

    Raises:
        BadStep: that norm is not finite.
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
        # Behind AdamW's step and before the weights are handed on to the modules and to other ranks.
        for adam in adams:
            hook = adam.register_step_post_hook(lambda stepped, *_: _draw_to_anchor(ewc, states, stepped))
            hooks.callback(hook.remove)
        update()
    return grad_norm, pull


def _finite(clip: Callable[[], float]) -> Callable[[], float]:
    def checked() -> float:
        if not math.isfinite(grad_norm := clip()):
            raise BadStep("gradient norm", grad_norm)
        return grad_norm

    return checked


def _draw_to_anchor(ewc: Ewc, states: Sequence[ParameterState], adam: torch.optim.Optimizer) -> None:
    """Take the proximal step of every state that `adam` has just updated."""
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
    """The two moments of a parameter, made as AdamW's first step would make them where there are none."""
    state = adam.state[master]
    if not state:
        state.update({name: torch.zeros_like(master) for name in MOMENTS})
        # Transformer Engine and apex count steps per group, torch per parameter; fused AdamW wants it on the device.
        if isinstance(adam, torch.optim.AdamW):
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
    return {name: state[name] for name in MOMENTS}


def set_num_steps(adam: torch.optim.Optimizer, num_steps: int) -> None:
    """Set AdamW's bias correction. One tensor for each parameter: AdamW counts them up in place."""
    for state in adam.state.values():
        if "step" in state:
            state["step"].fill_(num_steps)
    for group in adam.param_groups:
        if "step" in group:
            group["step"] = num_steps
