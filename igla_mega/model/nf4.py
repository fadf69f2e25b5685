"""The frozen base in 4 bits a weight: NormalFloat, doubly quantized (QLoRA: Dettmers et al. 2023, arXiv:2305.14314).

Codes and values are bitsandbytes' own, bit for bit, of each projection as a whole: blocks of 64 weights, whose scales
are coded in turn by blocks of 256 about their mean. A tensor-parallel rank holds the codes of its part; of the scales'
mean and of their second scales it holds those of the whole, so that every layout computes with the same weights.
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
"""Weights that share a scale."""
_NESTED_BLOCK = 256


def _functional():
    # On import it warns of a kernel for inference that is not used here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        import bitsandbytes.functional as functional
    except ImportError:
        raise ConfigError(
            "quantization: bitsandbytes is not installed.\n  pip install 'igla-mega[quant]', or leave it out."
        ) from None
    return functional


class Nf4(nn.Module):
    """One projection's weights on one tensor-parallel rank, [O, I]."""

    codes: Tensor
    scales: Tensor
    nested_scales: Tensor
    nested_code: Tensor
    offset: Tensor

    def __init__(self, weight: Tensor, *, dim: int, group: dist.ProcessGroup | None = None, double: bool = True):
        """Quantize this rank's part of a projection; of the whole only the scales (1/64 of it) cross ranks.

        Args:
            weight: [O, I] fp32, bf16 or fp16.
            dim: which dim `group` splits.
            group: the ranks that hold parts; None when this one holds all.
            double: code the scales too.

        Raises:
            ConfigError: a block of 64 weights would lie on two ranks.
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
                    f"{'of a row' if dim == 1 else 'of a projection'} on a rank, no multiple of NF4's {BLOCK}.\n"
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
        """Rows and columns of this rank's blocks, when columns are split; one row of them otherwise."""
        num_blocks = -(-self.shape[0] * self.shape[1] // BLOCK)
        return (self.shape[0], self.shape[1] // BLOCK) if self.dim == 1 and self.size > 1 else (1, num_blocks)

    def _gathered(self, scales: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        """The scales of the whole projection in its order, from those of the ranks' parts."""
        if self.size == 1:
            return scales
        parts = [torch.empty_like(scales) for _ in range(self.size)]
        dist.all_gather(parts, scales, group=group)
        return torch.cat([part.view(self._blocks()) for part in parts], 1).flatten()

    def _own(self, whole: Tensor) -> Tensor:
        """This rank's of the values there are for each block of the whole projection."""
        rows, columns = self._blocks()
        return whole.view(rows, self.size, columns)[:, self.rank].flatten().clone()

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The values that the codes stand for, [O, I], in memory of their own.

        As in bitsandbytes, values of the type that was quantized, converted.
        """
        scales = self.scales
        if scales.dtype == torch.uint8:
            rows, columns = self._blocks()
            first = torch.arange(rows, device=scales.device) * (self.size * columns) + self.rank * columns
            block = (first[:, None] + torch.arange(columns, device=scales.device)).flatten()
            # The order of bitsandbytes' own operations: each rounds to fp32.
            scales = self.nested_code[scales.int()] * self.nested_scales[block // _NESTED_BLOCK]
            scales += self.offset
        # From fp32 both round once: there the kernel converts.
        made = dtype if self.dtype == torch.float32 else self.dtype
        values = torch.ops.bitsandbytes.dequantize_4bit(self.codes.view(-1, 1), scales, BLOCK, "nf4", self.shape, made)
        return values.to(dtype)

    def num_bytes(self) -> int:
        """What the codes and scales take."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())


class StackedNf4(nn.Module):
    """What stands in the place of a stacked linear's `weight`: the codes of its projections."""

    requires_grad = False

    def __init__(self, stack: Stack, projections: dict[str, Nf4], dtype: torch.dtype):
        super().__init__()
        self.stack, self.dtype = stack, dtype
        self.projections = nn.ModuleDict(projections)
        shapes = [p.shape for p in projections.values()]
        self.shape = (sum(shape[0] for shape in shapes), shapes[0][1])

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The values, stacked [O, I]."""
        return self.stack.fuse([p.weight(dtype or self.dtype) for p in self.projections.values()])  # type: ignore[operator]


def weight_of(linear: Any) -> Tensor:
    """A linear's weight, dequantized where it is in 4 bits."""
    return linear.weight.dense() if isinstance(linear.weight, StackedNf4) else linear.weight


def quantize(linear: Any, stack: Stack, weight: Tensor, *, compute_dtype: torch.dtype, double: bool = True) -> None:
    """Replace the weight of a frozen linear (which may be on the meta device) by the codes of `weight`.

    Args:
        weight: this rank's part, [O, I], in the type that is to be quantized.
        compute_dtype: of the products; outputs have the input's.

    Raises:
        ConfigError: a block of weights would lie on two ranks, or bitsandbytes is not installed.
    """
    group = linear.tp_group if linear.tp_group.size() > 1 else None
    dim = 1 if stack.row_parallel else 0
    parts = {name: Nf4(part, dim=dim, group=group, double=double) for name, part in stack.split(weight).items()}
    if "weight" in linear._parameters:
        del linear.weight
    # Where mcore asks for the weight's `requires_grad` and shape it is answered; its product is ours.
    linear.weight = StackedNf4(stack, parts, compute_dtype)
    linear._forward_impl = frozen_forward


def quantize_chunks(
    chunks: Iterable[Any], read: Callable[[str], Tensor], *, compute_dtype: torch.dtype, double: bool = True
) -> None:
    """Quantize the projections of a model on the meta device one linear at a time, so that one exists unquantized.

    Args:
        read: this rank's part of a parameter, [O, I], by its name in every layout.
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
    """Product with a frozen weight, in the place of the `_forward_impl` of megatron-core's linears."""
    assert bias is None, "a Llama's linears have none"
    if sequence_parallel:
        input = gather_from_sequence_parallel_region(input, group=tp_group)
    elif allreduce_dgrad:
        input = copy_to_tensor_model_parallel_region(input, group=tp_group)
    return _Product.apply(input, weight) if isinstance(weight, StackedNf4) else frozen_linear(input, weight)


class _Product(torch.autograd.Function):
    """x @ W.T, with W made from its codes in either pass and kept in neither."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight
        return _product(x, weight.dense())

    @staticmethod
    def backward(ctx, grad):
        return _product(grad, ctx.weight.dense().t()), None


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., I] times weight [O, I] transposed in the weight's type; the result has that of x."""
    return product(x.to(weight.dtype), weight).to(x.dtype)
