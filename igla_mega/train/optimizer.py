"""What the training step asks of an optimizer, and what a checkpoint needs to know of its state."""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from igla_mega.model.shards import Slot

MOMENTS = ("exp_avg", "exp_avg_sq")


class Optimizer(Protocol):
    """AdamW over this rank's parameters (Loshchilov & Hutter 2019, arXiv:1711.05101)."""

    def zero_grad(self) -> None:
        """Forget the gradients of the last step."""

    def step(self, learning_rate: float) -> float:
        """Clip by the global norm, update, and return that norm: L2 over all parameters, before clipping."""

    def slots(self) -> Iterator[Slot]:
        """Walk over the state this rank keeps, making it (zeros) where no step has been taken yet."""

    def loaded(self, num_steps: int) -> None:
        """Take up values that were written into the slots, as after `num_steps` updates."""


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
