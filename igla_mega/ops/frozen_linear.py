"""Multiply by a weight that takes no gradient, without saving the input for the backward pass."""

import torch
from torch import Tensor

from igla_mega.ops.linear_cross_entropy import project


class _FrozenLinear(torch.autograd.Function):
    """Linear layer that saves only its weight: the input is needed for the weight's gradient alone."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return product(x, weight)

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        return product(grad, weight.t()), None


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x [..., I] times weight [O, I] transposed, in new memory, for use within an autograd function."""
    flat = project(x.reshape(-1, x.size(-1)), weight)  # [N, O]
    # Not a view to autograd: an in-place op on the output of a custom function that is a view would raise.
    return torch.ops.aten._unsafe_view(flat, [*x.shape[:-1], len(weight)])


def frozen_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return x [..., I] times weight [O, I] transposed, [..., O]; only x receives a gradient."""
    return _FrozenLinear.apply(x, weight)
