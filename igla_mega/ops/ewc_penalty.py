"""Add the gradient of the Elastic Weight Consolidation penalty and compute its value, in one pass."""

from collections.abc import Sequence

import torch
from torch import Tensor

from igla_mega.ops.checks import check_contiguous, check_device, check_lengths, check_shape, check_type


def _check(
    grads: Sequence[Tensor], weights: Sequence[Tensor], anchors: Sequence[Tensor], fisher: Sequence[Tensor]
) -> None:
    """Raise RuntimeError for a type, shape, layout or device that the kernels cannot handle."""
    check_lengths(grads=grads, weights=weights, anchors=anchors, fisher=fisher)
    for i, weight in enumerate(weights):
        check_type(f"weights[{i}]", weight, torch.float32, torch.float64)
        narrow = (torch.bfloat16,) if weight.dtype == torch.float32 else ()
        for name, tensor in (
            (f"weights[{i}]", weight),
            (f"grads[{i}]", grads[i]),
            (f"anchors[{i}]", anchors[i]),
            (f"fisher[{i}]", fisher[i]),
        ):
            check_type(name, tensor, weight.dtype, *(narrow if tensor is grads[i] else ()))
            check_shape(name, tensor, weight.shape, f"weights[{i}]")
            check_contiguous(name, tensor)
            check_device(name, tensor, weights[0].device, "weights[0]")


def ewc_pull_reference_(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    anchors: Sequence[Tensor],
    fisher: Sequence[Tensor],
    ewc_lambda: float,
) -> Tensor:
    """Pull with torch ops; `ewc_pull_` documents the arguments."""
    _check(grads, weights, anchors, fisher)
    # fp64: the sums run over every parameter of the rank, up to billions of terms.
    sums = torch.zeros(3, dtype=torch.float64, device=weights[0].device if weights else None)
    for grad, weight, anchor, stiffness in zip(grads, weights, anchors, fisher, strict=True):
        drift = weight - anchor
        # This order of operations and this rounding are those of the kernels in csrc/.
        pull = ewc_lambda * (stiffness * drift)
        value = (pull.double() * drift.double()).sum() / 2
        sums += torch.stack([value, grad.double().square().sum(), pull.double().square().sum()])
        grad.copy_(grad.to(weight.dtype) + pull)
    return sums


def _ewc_pull_fake_(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    anchors: Sequence[Tensor],
    fisher: Sequence[Tensor],
    ewc_lambda: float,
) -> Tensor:
    """Check the arguments and return an empty result, for tracing without data."""
    _check(grads, weights, anchors, fisher)
    return torch.empty(3, dtype=torch.float64, device=weights[0].device if weights else None)


torch.library.define(
    "igla::ewc_pull_",
    "(Tensor(a!)[] grads, Tensor[] weights, Tensor[] anchors, Tensor[] fisher, float ewc_lambda) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl("igla::ewc_pull_", "CompositeExplicitAutograd", ewc_pull_reference_)
torch.library.register_fake("igla::ewc_pull_", _ewc_pull_fake_)


def ewc_pull_(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    anchors: Sequence[Tensor],
    fisher: Sequence[Tensor],
    ewc_lambda: float,
) -> Tensor:
    """Add `ewc_lambda * F * (w - a)` to every gradient, in place: the gradient of the penalty, in closed form.

    The penalty is `ewc_lambda / 2 * sum(F * (w - a)^2)` (Kirkpatrick et al. 2017, arXiv:1612.00796, eq. 3). Where
    `w` equals `a`, the gradient is left as it is, exactly. Runs with one number of threads repeat bit for bit.

    Args:
        grads: fp32 or fp64 like the others, or bf16; contiguous, of any size and alignment. They must be complete:
            reduced over ranks and without loss scale.
        weights: fp32 or fp64 tensors of the same shapes, contiguous.
        anchors: weights of the earlier task, in full precision: a rounded anchor would pull at step 0 already.
        fisher: diagonal Fisher information, not negative.
        ewc_lambda: stiffness, dimensionless.

    Returns:
        fp64 [3]: the penalty in nats, the sum of squares of the gradients before the call, and that of the pull. They
        cover these tensors only: sum them over the ranks that hold the others.

    Raises:
        RuntimeError: lists of unequal lengths, or a wrong type, shape or device, or a tensor that is not contiguous.
    """
    with torch.no_grad():
        return torch.ops.igla.ewc_pull_(grads, weights, anchors, fisher, ewc_lambda)
