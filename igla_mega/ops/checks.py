"""Check the arguments of ops, with the same error texts as csrc/checks.h.

Each check raises RuntimeError with the name of the tensor, the requirement and the value found.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def check_lengths(**lists: Sequence[Tensor]) -> None:
    """Check that lists of tensors have one length."""
    lengths = [len(tensors) for tensors in lists.values()]
    torch._check(len(set(lengths)) == 1, lambda: f"{', '.join(lists)} must be of one length, got {lengths}")


def check_type(name: str, tensor: Tensor, *types: torch.dtype) -> None:
    """Check that a tensor has one of `types`."""
    words = " or ".join(str(t).removeprefix("torch.") for t in types)
    torch._check(
        tensor.dtype in types, lambda: f"{name} must be {words}, got {str(tensor.dtype).removeprefix('torch.')}"
    )


def check_shape(name: str, tensor: Tensor, shape: torch.Size, like: str) -> None:
    """Check that a tensor has the shape of the tensor named `like`."""
    torch._check(tensor.shape == shape, lambda: f"{name} must be {list(shape)} like {like}, got {list(tensor.shape)}")


def check_device(name: str, tensor: Tensor, device: torch.device, like: str) -> None:
    """Check that a tensor is on the device of the tensor named `like`."""
    torch._check(tensor.device == device, lambda: f"{name} must be on the device of {like}, got {tensor.device}")


def check_contiguous(name: str, tensor: Tensor) -> None:
    """Check that a tensor is contiguous."""
    torch._check(tensor.is_contiguous(), lambda: f"{name} must be contiguous; call .contiguous() first")


def check_rows(name: str, tensor: Tensor) -> None:
    """Check that the last dimension of a tensor has stride 1."""
    torch._check(
        tensor.shape[-1] <= 1 or tensor.stride(-1) == 1, lambda: f"{name} must have stride 1 in its last dimension"
    )


def check_not_expanded(name: str, tensor: Tensor) -> None:
    """Check that no element of a tensor that will be written is aliased by an expanded dimension."""
    torch._check(
        all(size <= 1 or stride != 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)),
        lambda: f"{name} is written, so must not be expanded",
    )
