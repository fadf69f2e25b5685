"""Add the squared gradient of one sample to a running diagonal Fisher information, many tensors in one call."""

from collections.abc import Sequence

import torch
from torch import Tensor

from igla_mega.ops.checks import check_contiguous, check_device, check_lengths, check_shape, check_type


def _check(fisher: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Raise RuntimeError for a type, shape, layout or device that the kernels cannot handle."""
    check_lengths(fisher=fisher, grads=grads)
    for i, (total, grad) in enumerate(zip(fisher, grads, strict=True)):
        check_type(f"fisher[{i}]", total, torch.float32, torch.float64)
        wide = total.dtype == torch.float64
        check_type(f"grads[{i}]", grad, *((torch.float64,) if wide else (torch.float32, torch.bfloat16)))
        check_shape(f"grads[{i}]", grad, total.shape, f"fisher[{i}]")
        for name, tensor in ((f"fisher[{i}]", total), (f"grads[{i}]", grad)):
            check_contiguous(name, tensor)
            check_device(name, tensor, fisher[0].device, "fisher[0]")


def fisher_accumulate_reference_(
    fisher: Sequence[Tensor], grads: Sequence[Tensor], weight: float, zero_grads: bool
) -> None:
    """Accumulate with torch ops; `fisher_accumulate_` documents the arguments."""
    _check(fisher, grads)
    for total, grad in zip(fisher, grads, strict=True):
        # Squared in the precision of the sum: 1e-10 squared is 0 in fp16, and bf16 has only three digits.
        wide = grad.to(total.dtype)
        total.addcmul_(wide, wide, value=weight)
        if zero_grads:
            grad.zero_()


def _fisher_accumulate_fake_(
    fisher: Sequence[Tensor], grads: Sequence[Tensor], weight: float, zero_grads: bool
) -> None:
    _check(fisher, grads)


torch.library.define(
    "igla::fisher_accumulate_",
    "(Tensor(a!)[] fisher, Tensor(b!)[] grads, float weight, bool zero_grads) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl("igla::fisher_accumulate_", "CompositeExplicitAutograd", fisher_accumulate_reference_)
torch.library.register_fake("igla::fisher_accumulate_", _fisher_accumulate_fake_)


def fisher_accumulate_(
    fisher: Sequence[Tensor], grads: Sequence[Tensor], weight: float, *, zero_grads: bool = False
) -> None:
    """Add `weight * g^2` of each gradient to its Fisher tensor, in place.

    Args:
        fisher: running sums, fp32 or fp64, contiguous, of any size and alignment.
        grads: tensors of the same shapes, contiguous; fp32 or bf16 for an fp32 sum, fp64 for an fp64 one. They must be
            the complete gradient of one sample: the square of a sum over samples is not the Fisher information.
        weight: factor of this sample; 1 / (tokens of all samples) gives the Fisher information per token.
        zero_grads: True to set `grads` to zero in the same pass, ready for the next sample.

    Raises:
        RuntimeError: unequal numbers of tensors, or a wrong type, shape or device, or one that is not contiguous.
    """
    torch.ops.igla.fisher_accumulate_(fisher, grads, weight, zero_grads)
