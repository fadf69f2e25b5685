"""Quantize a frozen base model to 4-bit NormalFloat with double quantization (QLoRA, arXiv:2305.14314).

Codes and values equal those of bitsandbytes bit for bit, for each whole projection: blocks of 64 weights share a scale,
and the scales minus their mean are quantized to 8 bits in blocks of 256, which share a nested scale. A tensor-parallel
rank holds the codes and scales of its part, but the mean and the nested scales of the whole projection: they depend on
all scales, and every layout must compute with the same weights.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor, nn

from igla_mega.config.errors import ConfigError
from igla_mega.model.projections import Stack, stacks_of
from igla_mega.ops.frozen_linear import frozen_linear, product

BLOCK = 64
"""Number of weights that share a scale."""
# Number of scales that share a nested scale.
_NESTED_BLOCK = 256


def _functional():
    """Return bitsandbytes.functional.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    # Its import logs a warning about an inference kernel that is not used here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        import bitsandbytes.functional as functional
    except ImportError:
        raise ConfigError(
            "quantization: bitsandbytes is not installed.\n  pip install 'igla-mega[quant]', or leave it out."
        ) from None
    return functional


class Nf4(nn.Module):
    """Quantized weights [O, I] of one projection on one tensor-parallel rank."""

    codes: Tensor
    """uint8, two weights per byte."""
    scales: Tensor
    """One per block of `BLOCK` weights of this rank: fp32, or uint8 codes with double quantization."""
    nested_scales: Tensor
    """fp32, one per block of scales of the whole projection."""
    nested_code: Tensor
    """fp32 [256]: value of each 8-bit code of a scale."""
    offset: Tensor
    """Mean of the scales of the whole projection, fp32."""

    def __init__(self, weight: Tensor, *, dim: int, group: dist.ProcessGroup | None = None, double: bool = True):
        """Quantize this rank's part of a projection; only the scales (1/64 of the size) cross ranks.

        Args:
            weight: [O, I] fp32, bf16 or fp16.
            dim: dimension that `group` splits.
            group: ranks that hold parts of the projection; None if this rank holds all of it.
            double: True to quantize the scales too.

        Raises:
            ConfigError: a block of 64 weights would span two ranks.
        """
        super().__init__()
        functional = _functional()
        self.shape, self.dim, self.dtype = tuple(weight.shape), dim, weight.dtype
        self.rank, self.size = (group.rank(), group.size()) if group is not None else (0, 1)
        if self.size > 1:
            run = weight.shape[1] if dim == 1 else weight.numel()
            if run % BLOCK:
                raise ConfigError(
                    f"distributed.tensor_parallel: {self.size} leaves {run} weights "
                    f"{'of a row' if dim == 1 else 'of a projection'} on a rank, not a multiple of NF4's {BLOCK}.\n"
                    f"  Use fewer tensor-parallel ranks, or leave `quantization` out."
                )
        codes, state = functional.quantize_4bit(weight.contiguous(), blocksize=BLOCK, quant_type="nf4")
        self.register_buffer("codes", codes.view(-1), persistent=False)
        scales = state.absmax
        if double:
            whole = self._gathered(scales, group)
            offset = whole.mean()
            coded, nested = functional.quantize_blockwise(whole - offset, blocksize=_NESTED_BLOCK)
            scales = self._own(coded)
            self.register_buffer("nested_scales", nested.absmax, persistent=False)
            self.register_buffer("nested_code", nested.code, persistent=False)
            self.register_buffer("offset", offset, persistent=False)
        self.register_buffer("scales", scales, persistent=False)

    def _blocks(self) -> tuple[int, int]:
        """Return rows and columns of the grid of this rank's blocks.

        If columns are split, a rank's blocks are part of every row of the whole grid; otherwise they are consecutive in
        the whole projection, and the grid has one row.
        """
        num_blocks = -(-self.shape[0] * self.shape[1] // BLOCK)
        return (self.shape[0], self.shape[1] // BLOCK) if self.dim == 1 and self.size > 1 else (1, num_blocks)

    def _gathered(self, scales: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        """All-gather the scales of the whole projection, in the order of its blocks."""
        if self.size == 1:
            return scales
        parts = [torch.empty_like(scales) for _ in range(self.size)]
        dist.all_gather(parts, scales, group=group)
        return torch.cat([part.view(self._blocks()) for part in parts], 1).flatten()

    def _own(self, whole: Tensor) -> Tensor:
        """Return this rank's part of values given for each block of the whole projection."""
        rows, columns = self._blocks()
        return whole.view(rows, self.size, columns)[:, self.rank].flatten().clone()

    def weight(self, dtype: torch.dtype) -> Tensor:
        """Return the dequantized weights [O, I] in new memory.

        As in bitsandbytes, they are computed in the type that was quantized, then converted to `dtype`.
        """
        scales = self.scales
        if scales.dtype == torch.uint8:
            # Index of each local block in the whole projection, which selects its nested scale.
            rows, columns = self._blocks()
            first = torch.arange(rows, device=scales.device) * (self.size * columns) + self.rank * columns
            block = (first[:, None] + torch.arange(columns, device=scales.device)).flatten()
            # The order of bitsandbytes' operations matters: each rounds to fp32.
            scales = self.nested_code[scales.int()] * self.nested_scales[block // _NESTED_BLOCK]
            scales += self.offset
        # For fp32 weights the kernel may convert: either way the values are rounded once.
        out_dtype = dtype if self.dtype == torch.float32 else self.dtype
        codes = self.codes.view(-1, 1)
        values = torch.ops.bitsandbytes.dequantize_4bit(codes, scales, BLOCK, "nf4", self.shape, out_dtype)
        return values.to(dtype)  # [O, I]

    def num_bytes(self) -> int:
        """Return the size of the codes and scales in bytes."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())


class StackedNf4(nn.Module):
    """Quantized replacement of a stacked linear's `weight`: the codes of its projections."""

    requires_grad = False

    def __init__(self, stack: Stack, projections: dict[str, Nf4], dtype: torch.dtype):
        """Combine the codes of a stack's projections; `dtype` is the type of the products."""
        super().__init__()
        self.stack, self.dtype = stack, dtype
        self.projections = nn.ModuleDict(projections)
        shapes = [p.shape for p in projections.values()]
        self.shape = (sum(shape[0] for shape in shapes), shapes[0][1])

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the dequantized weights of all projections, stacked [O, I]."""
        return self.stack.fuse([p.weight(dtype or self.dtype) for p in self.projections.values()])  # type: ignore[operator]


def weight_of(linear: Any) -> Tensor:
    """Return a linear's weight, dequantized if it is quantized."""
    return linear.weight.dense() if isinstance(linear.weight, StackedNf4) else linear.weight


def quantize(linear: Any, stack: Stack, weight: Tensor, *, compute_dtype: torch.dtype, double: bool = True) -> None:
    """Replace the weight of a frozen linear (which may be on the meta device) by the codes of `weight`.

    Args:
        linear: a linear of megatron-core.
        stack: projections of the linear.
        weight: this rank's part, [O, I], in the type to quantize from.
        compute_dtype: type of the products; outputs have the type of the input.
        double: True to quantize the scales too.

    Raises:
        ConfigError: a block of weights would span two ranks, or bitsandbytes is not installed.
    """
    group = linear.tp_group if linear.tp_group.size() > 1 else None
    dim = 1 if stack.row_parallel else 0
    parts = {name: Nf4(part, dim=dim, group=group, double=double) for name, part in stack.split(weight).items()}
    if "weight" in linear._parameters:
        del linear.weight
    # megatron-core reads the weight's `requires_grad` and shape, which `StackedNf4` has; the product itself is computed
    # by `frozen_forward`.
    linear.weight = StackedNf4(stack, parts, compute_dtype)
    linear._forward_impl = frozen_forward


def quantize_chunks(
    chunks: Iterable[Any], read: Callable[[str], Tensor], *, compute_dtype: torch.dtype, double: bool = True
) -> None:
    """Quantize the projections of a model on the meta device, with one unquantized linear in memory at a time.

    Args:
        chunks: this rank's pipeline chunks.
        read: returns this rank's part [O, I] of a parameter, given its global name.
        compute_dtype: type of the products.
        double: True to quantize the scales too.
    """
    for chunk in chunks:
        for stack, linear in stacks_of(chunk):
            quantize(linear, stack, read(f"{stack.name}.weight"), compute_dtype=compute_dtype, double=double)


def frozen_forward(
    input: Tensor,
    weight: Tensor | StackedNf4,
    *,
    bias: Tensor | None,
    allreduce_dgrad: bool,
    sequence_parallel: bool,
    tp_group: dist.ProcessGroup | None,
    **_,
) -> Tensor:
    """Multiply by a frozen weight, in place of the `_forward_impl` of megatron-core's linears."""
    assert bias is None, "the linears of a Llama have no bias"
    if sequence_parallel:
        input = gather_from_sequence_parallel_region(input, group=tp_group)
    elif allreduce_dgrad:
        input = copy_to_tensor_model_parallel_region(input, group=tp_group)
    return _Product.apply(input, weight) if isinstance(weight, StackedNf4) else frozen_linear(input, weight)


class _Product(torch.autograd.Function):
    """x @ W.T, with W dequantized in each pass and saved in neither."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight
        return _product(x, weight.dense())

    @staticmethod
    def backward(ctx, grad):
        return _product(grad, ctx.weight.dense().t()), None


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x [..., I] times weight [O, I] transposed, computed in the weight's type and returned in that of x."""
    return product(x.to(weight.dtype), weight).to(x.dtype)
