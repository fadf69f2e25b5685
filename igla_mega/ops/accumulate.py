"""Add tensors of one precision to running sums of another, many tensors in one call."""

from collections.abc import Sequence

import torch
from torch import Tensor

from igla_mega.ops.checks import check_device, check_lengths, check_not_expanded, check_rows, check_shape, check_type

# The kernels treat the last dimension as a row and iterate over at most three further ones.
_MAX_DIMENSIONS = 4


def _check(sums: Sequence[Tensor], terms: Sequence[Tensor]) -> None:
    """Raise RuntimeError for a type, shape, stride or device that the kernels cannot handle."""
    check_lengths(sums=sums, terms=terms)
    for i, (total, term) in enumerate(zip(sums, terms, strict=True)):
        check_type(f"sums[{i}]", total, torch.float32, torch.float64)
        check_type(f"terms[{i}]", term, torch.float32, torch.bfloat16, torch.float16, torch.float64)
        check_shape(f"terms[{i}]", term, total.shape, f"sums[{i}]")
        for name, tensor in ((f"sums[{i}]", total), (f"terms[{i}]", term)):
            _check_dimensions(name, tensor)
            check_rows(name, tensor)
            check_device(name, tensor, sums[0].device, "sums[0]")
        check_not_expanded(f"sums[{i}]", total)


def _check_dimensions(name: str, tensor: Tensor) -> None:
    """Check that the kernels can iterate over the tensor's dimensions."""
    torch._check(
        1 <= tensor.dim() <= _MAX_DIMENSIONS,
        lambda: f"{name} must have 1 to {_MAX_DIMENSIONS} dimensions, got {tensor.dim()}",
    )


def accumulate_reference_(sums: Sequence[Tensor], terms: Sequence[Tensor]) -> None:
    """Add with torch ops; `accumulate_` documents the arguments."""
    _check(sums, terms)
    for total, term in zip(sums, terms, strict=True):
        total += term


def _accumulate_fake_(sums: Sequence[Tensor], terms: Sequence[Tensor]) -> None:
    _check(sums, terms)


torch.library.define(
    "igla::accumulate_", "(Tensor(a!)[] sums, Tensor[] terms) -> ()", tags=(torch.Tag.pt2_compliant_tag,)
)
torch.library.impl("igla::accumulate_", "CompositeExplicitAutograd", accumulate_reference_)
torch.library.register_fake("igla::accumulate_", _accumulate_fake_)


def accumulate_(sums: Sequence[Tensor], terms: Sequence[Tensor]) -> None:
    """Add each term to its sum, in place and in the precision of the sum, without a converted copy.

    Args:
        sums: fp32 or fp64, 1 to 4 dimensions, the last at stride 1, other strides free (slices of a larger buffer).
        terms: tensors of the same shapes; fp32, bf16, fp16 or fp64; strides as for `sums`.

    Raises:
        RuntimeError: unequal numbers of tensors, or a wrong type, shape, stride or device.
    """
    torch.ops.igla.accumulate_(sums, terms)
