"""A linear layer whose weight takes no gradient: neither the weight's gradient nor the input is made or kept for it."""

import torch
from torch import Tensor

from igla_mega.ops.linear_cross_entropy import project


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return product(x, weight)

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        return product(grad, weight.t()), None


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., I] times weight [O, I] transposed, in memory of its own, for use within an autograd function."""
    flat = project(x.reshape(-1, x.size(-1)), weight)
    # To autograd no view of the product: what comes next may write into it.
    return torch.ops.aten._unsafe_view(flat, [*x.shape[:-1], len(weight)])


def frozen_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., I] times weight [O, I] transposed: [..., O]."""
    return _FrozenLinear.apply(x, weight)
