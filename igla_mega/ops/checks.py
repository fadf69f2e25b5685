"""What the ops refuse, in the words of csrc/checks.h."""

from collections.abc import Sequence

import torch
from torch import Tensor


def check_lengths(**lists: Sequence[Tensor]) -> None:
    lengths = [len(tensors) for tensors in lists.values()]
    torch._check(len(set(lengths)) == 1, lambda: f"{', '.join(lists)} must be of one length, got {lengths}")


def check_type(name: str, tensor: Tensor, *types: torch.dtype) -> None:
    words = " or ".join(str(t).removeprefix("torch.") for t in types)
    torch._check(
        tensor.dtype in types, lambda: f"{name} must be {words}, got {str(tensor.dtype).removeprefix('torch.')}"
    )


def check_shape(name: str, tensor: Tensor, shape: torch.Size, like: str) -> None:
    torch._check(tensor.shape == shape, lambda: f"{name} must be {list(shape)} like {like}, got {list(tensor.shape)}")


def check_device(name: str, tensor: Tensor, device: torch.device, like: str) -> None:
    torch._check(tensor.device == device, lambda: f"{name} must be on the device of {like}, got {tensor.device}")


def check_contiguous(name: str, tensor: Tensor) -> None:
    torch._check(tensor.is_contiguous(), lambda: f"{name} must be contiguous; call .contiguous() first")


def check_rows(name: str, tensor: Tensor) -> None:
    torch._check(
        tensor.shape[-1] <= 1 or tensor.stride(-1) == 1, lambda: f"{name} must have stride 1 in its last dimension"
    )


def check_not_expanded(name: str, tensor: Tensor) -> None:
    torch._check(
        all(size <= 1 or stride != 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)),
        lambda: f"{name} is written, so must not be expanded",
    )
