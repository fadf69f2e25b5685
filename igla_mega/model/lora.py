"""Attach low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685) to megatron-core's parallel linears.

Projections go by Hugging Face's names. Each has its own pair of matrices, as in PEFT: `lora_A` [rank, in] and `lora_B`
[out, rank]; its output becomes `W x + scale * lora_B(lora_A(dropout(x)))`. Tensor parallelism splits the pair along the
same dimension as the projection, so the activations that cross ranks have width rank instead of the hidden width.
Projections that share an input share its dropout mask.
"""

import contextlib
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from igla_mega.config.features import Lora
from igla_mega.model import expert_tokens
from igla_mega.model.nf4 import frozen_forward, weight_of
from igla_mega.model.projections import Stack, stacks_of
from igla_mega.model.shards import Shard, local_values
from igla_mega.ops.categorical import uniform_int16
from igla_mega.ops.zigzag import zigzag_intervals

_MATRICES = ("lora_A", "lora_B", "lora_magnitude")
# Bits of the generator seed that hold the sample number; the run's seed is hashed to the 16 bits above.
_SAMPLE_BITS = 40


@dataclass
class Switch:
    """Flag shared by all adapters of a model: True if they are applied, False if the model is its base."""

    on: bool = True

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Disable the adapters within a block: the base model is the reference of preference optimization."""
        before, self.on = self.on, False
        try:
            yield
        finally:
            self.on = before


class Adapter(nn.Module):
    """Trained matrices of one projection: this tensor-parallel rank's part."""

    lora_magnitude: nn.Parameter | None
    """Norm of each row of the adapted weight (DoRA), [outputs]; None without DoRA."""

    def __init__(self, inputs: int, outputs: int, lora: Lora, *, dtype: torch.dtype, device: torch.device):
        """Allocate the matrices without values; `inputs` and `outputs` are this rank's dimensions."""
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(lora.rank, inputs, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.empty(outputs, lora.rank, dtype=dtype, device=device))
        magnitude = nn.Parameter(torch.empty(outputs, dtype=dtype, device=device)) if lora.use_dora else None
        self.register_parameter("lora_magnitude", magnitude)


@dataclass(frozen=True)
class _Place:
    """Settings of the adapters of one linear, in addition to their matrices."""

    stack: Stack
    scale: float
    """Factor of the adapters' output (`scaling`)."""
    dropout: float
    """Probability with which an input element is dropped, 0 to 1."""
    context: tuple[int, int]
    """Rank and size of the group of ranks that share each sequence."""
    switch: Switch


def attach(chunks: Iterable[Any], lora: Lora, *, context: tuple[int, int] = (0, 1)) -> Switch:
    """Freeze every weight of this rank's model chunks and add adapters to the target projections.

    Call before `shards_of`, which describes the parameters that exist by then. The adapters are allocated on the device
    of the chunks (usually meta); `initialize` sets their values.

    Args:
        chunks: this rank's pipeline chunks.
        lora: the recipe's `lora` section.
        context: this rank's index on the context axis, and the size of the axis.

    Returns:
        The switch that turns all adapters on and off.
    """
    switch = Switch()
    for chunk in chunks:
        chunk.requires_grad_(False)
        for stack, linear in stacks_of(chunk):
            # Every linear is frozen, also those without adapters: none has to save its input.
            linear._forward_impl = frozen_forward
            names = [name for name in stack.sizes if name in lora.target_modules]
            for name in names:
                linear.add_module(name, _adapter(stack, name, linear, lora))
            if names:
                linear.lora = _Place(stack, scaling(lora), lora.dropout, context, switch)
                linear.register_forward_hook(_add)
        if lora.dropout and {"gate_proj", "up_proj", "down_proj"} & set(lora.target_modules):
            for layer in (one.mlp for one in chunk.decoder.layers if hasattr(one.mlp, "local_expert_indices")):
                expert_tokens.identify(layer, context, partial(_drops, layer, switch))
        if chunk.pre_process and chunk.config.recompute_granularity is not None:
            # A recomputed layer computes no gradients at all if its input does not require one, and the embedding that
            # produces the input of the first layer is frozen.
            chunk.embedding.register_forward_hook(lambda module, args, output: output.requires_grad_())
    return switch


def _drops(module: nn.Module, switch: Switch) -> bool:
    """Return True if the adapters of a module are in use and their inputs are dropped."""
    return switch.on and module.training


def _adapter(stack: Stack, name: str, linear: Any, lora: Lora) -> Adapter:
    """Return the adapter of one projection, split over tensor-parallel ranks as the projection is."""
    inputs = linear.input_size_per_partition if stack.row_parallel else linear.input_size
    adapter = Adapter(
        inputs,
        stack.groups * stack.sizes[name],
        lora,
        dtype=linear.config.params_dtype,
        device=next(chain(linear.parameters(), linear.buffers())).device,
    )
    # Under sequence parallelism the gradients of these replicated matrices cover only this rank's tokens; megatron-core
    # sums the gradients of parameters with this mark over the tensor-parallel ranks.
    partial = (adapter.lora_B, adapter.lora_magnitude) if stack.row_parallel else (adapter.lora_A,)
    for param in partial:
        if param is not None:
            # An expert receives the tokens of all tensor-parallel ranks, so its gradient is complete.
            param.sequence_parallel = linear.sequence_parallel and not stack.expert  # type: ignore[attr-defined]
    return adapter


def scaling(lora: Lora) -> float:
    """Return the factor of an adapter's output: alpha / rank, or alpha / sqrt(rank) (rsLoRA, arXiv:2312.03732)."""
    return lora.alpha / (math.sqrt(lora.rank) if lora.use_rslora else lora.rank)


def adapters_of(linear: nn.Module) -> dict[str, Adapter]:
    """Return the adapters of a linear by the names of their projections, in the order of the stack."""
    return {name: child for name, child in linear.named_children() if isinstance(child, Adapter)}


def is_adapter(name: str) -> bool:
    """Return True if a parameter belongs to an adapter, False if it belongs to the base."""
    return name.rpartition(".")[2] in _MATRICES


def _add(linear: Any, args: tuple, result: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None] | None:
    """Forward hook: add the adapters' outputs for the linear's input [S, B, I] to its output [S, B, O].

    For an expert the shapes are [T, I] and [T, O], with T the tokens routed to it.
    """
    place: _Place = linear.lora
    stack = place.stack
    if not place.switch.on:
        return None
    out, bias = result
    adapters, x, scale = adapters_of(linear), args[0], place.scale
    if place.dropout and linear.training:
        mask, kept = _dropout_mask(place, linear, x)
        x, scale = x * mask, scale / kept
    matrices: list[Tensor] = [adapter.lora_A for adapter in adapters.values()]
    # One product for all projections of the stack: they read the same input.
    hidden = F.linear(x.to(matrices[0].dtype), torch.cat(matrices) if len(matrices) > 1 else matrices[0])  # [S, B, P*R]
    # The same communication as in the linear itself, but of width rank: a row-parallel linear has only part of the
    # input's columns, a column-parallel one only part of the tokens or of the output's gradient.
    if stack.row_parallel and linear.sequence_parallel:
        hidden = reduce_scatter_to_sequence_parallel_region(hidden, group=linear.tp_group)
    elif stack.row_parallel:
        hidden = reduce_from_tensor_model_parallel_region(hidden, group=linear.tp_group)
    elif linear.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, group=linear.tp_group)
    else:
        hidden = copy_to_tensor_model_parallel_region(hidden, group=linear.tp_group)
    rows = [(name in adapters, size) for name, size in stack.sizes.items()]
    # The output of a row-parallel linear may be a view of the reduced tensor, which must not be modified in place.
    out = out.clone() if stack.row_parallel else out
    out = _AddProjections.apply(out, hidden * scale, stack.groups, rows, *(a.lora_B for a in adapters.values()))
    if any(adapter.lora_magnitude is not None for adapter in adapters.values()):
        out = out * _magnitudes(place, linear, adapters).to(out.dtype)
    return out, bias


class _AddProjections(torch.autograd.Function):
    """Add to out [S, B, O], in place, each projection's lora_B times its part of hidden [S, B, R * projections].

    In place, because each out-of-place sum would allocate another tensor of the size of the output.
    """

    @staticmethod
    def forward(ctx, out, hidden, groups, rows, *matrices):
        """Return `out`, modified in place; it is not saved, since its own gradient passes through."""
        ctx.save_for_backward(hidden, *matrices)
        ctx.groups, ctx.rows = groups, rows
        ctx.mark_dirty(out)
        stacked = out.view(-1, groups, out.size(-1) // groups)  # [S * B, groups, O / groups]
        for start, size, part, matrix in _parts(hidden, rows, matrices):
            target = stacked[..., start : start + size]
            if groups == 1 and part.dtype == out.dtype:
                target.squeeze(1).addmm_(part, matrix.t())
            else:
                target.add_((part @ matrix.t()).view(-1, groups, size))
        return out

    @staticmethod
    def backward(ctx, grad):
        """Return the gradients of out, hidden and each lora_B."""
        hidden, *matrices = ctx.saved_tensors
        stacked = grad.reshape(-1, ctx.groups, grad.size(-1) // ctx.groups)
        grad_parts, grad_matrices = [], []
        for start, size, part, matrix in _parts(hidden, ctx.rows, matrices):
            grad_rows = stacked[..., start : start + size].flatten(1).to(matrix.dtype)  # [S * B, groups * size]
            grad_parts.append(grad_rows @ matrix)
            grad_matrices.append(grad_rows.t() @ part)
        joined = torch.cat(grad_parts, 1) if len(grad_parts) > 1 else grad_parts[0]
        return grad, joined.view_as(hidden), None, None, *grad_matrices


def _parts(
    hidden: Tensor, rows: Sequence[tuple[bool, int]], matrices: Sequence[Tensor]
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Yield for each adapted projection the start and number of its rows in a group, its hidden [S * B, R] and lora_B.

    Args:
        hidden: [S, B, R * adapted projections].
        rows: for each projection of the stack, whether it is adapted and its number of rows in a group.
        matrices: lora_B of the adapted projections.
    """
    rank, start, index = matrices[0].size(1), 0, 0
    flat = hidden.flatten(0, -2)
    for adapted, size in rows:
        if adapted:
            yield start, size, flat[:, index * rank : (index + 1) * rank], matrices[index]
            index += 1
        start += size


def _magnitudes(place: _Place, linear: Any, adapters: Mapping[str, Adapter]) -> Tensor:
    """Return trained magnitude / norm of each output row (DoRA: Liu et al. 2024, arXiv:2402.09353, eq. 5), [O] fp32."""
    factors = []
    for name, weight in place.stack.split(weight_of(linear)).items():
        adapter = adapters.get(name)
        if adapter is None:
            factors.append(torch.ones(len(weight), device=weight.device))
        else:
            group = linear.tp_group if place.stack.row_parallel else None
            assert adapter.lora_magnitude is not None, "either all adapters of a linear have magnitudes or none"
            factors.append(adapter.lora_magnitude / _norms(weight, adapter, place.scale, group))
    return place.stack.fuse(factors)


@torch.no_grad()
def _norms(weight: Tensor, adapter: Adapter, scale: float, group: dist.ProcessGroup | None) -> Tensor:
    """Return the norm of every row of `weight + scale * B A`, [O] fp32, without forming the sum.

    No gradient flows through it: DoRA treats the norm as a constant (section 4.3).

    Args:
        group: ranks that each hold some of the columns; None if this rank holds all of them.
    """
    weight, a, b = weight.float(), adapter.lora_A.float(), adapter.lora_B.float()
    # |w + s b A|^2 = |w|^2 + 2 s w A^T b + s^2 b (A A^T) b: three sums over columns, which ranks can add up.
    squares, cross, gram = (weight * weight).sum(1), weight @ a.t(), a @ a.t()  # [O], [O, R], [R, R]
    if group is not None and group.size() > 1:
        for part in (squares, cross, gram):
            dist.all_reduce(part, group=group)
    square = squares + 2 * scale * (cross * b).sum(1) + scale**2 * ((b @ gram) * b).sum(1)
    return square.clamp_(min=0).sqrt_()


def seed_dropout(seed: int, first_sample: int) -> None:
    """Set the samples of the next micro-batch: `first_sample` and the following ones, counted from the run's start.

    Masks are functions of (seed, sample, layer, linear, token), so they are the same in every layout. The key is passed
    as the seed of torch's default generator, because activation recomputation restores exactly that state.
    """
    digest = hashlib.blake2b(str(seed).encode(), digest_size=2).digest()
    torch.manual_seed(int.from_bytes(digest, "big") << _SAMPLE_BITS | first_sample)
    if not torch.cuda.is_available():
        # Under sequence parallelism megatron-core runs the layers with the generators of its tracker, which on a host
        # without CUDA fork the default generator: they need the same seed.
        tracker, state = get_cuda_rng_tracker(), torch.get_rng_state()
        tracker.set_states(dict.fromkeys(tracker.get_states(), state))


def _dropout_mask(place: _Place, linear: Any, x: Tensor) -> tuple[Tensor, float]:
    """Return the mask of kept inputs, bool in the shape of x, and their fraction: 1 - dropout, rounded to 1 / 65536.

    The mask of a whole sequence is drawn on every rank, which keeps the part of its tokens and columns: this is what
    makes masks independent of the layout. For an expert, whose tokens come in the order of the layout, the mask is a
    function of the keys of the tokens.
    """
    threshold = round(place.dropout * 2**16)
    if place.stack.expert:
        # The name contains the expert's number over all ranks.
        name = hashlib.blake2b(place.stack.name.encode(), digest_size=8).digest()
        keys = linear.token_keys + int.from_bytes(name, "big", signed=True)
        return uniform_int16(keys, x.size(-1)) >= threshold - 2**15, 1.0 - threshold / 2**16
    rank, size = linear.tp_group.rank(), linear.tp_group.size()
    split_columns = place.stack.row_parallel
    split_tokens = linear.sequence_parallel and not split_columns
    context_rank, context_size = place.context
    length = x.size(0) * (size if split_tokens else 1) * context_size
    width = x.size(2) * (size if split_columns else 1)
    mask = torch.empty(x.size(1), x.size(0), x.size(2), dtype=torch.bool, device=x.device)
    for row in range(x.size(1)):
        key = hashlib.blake2b(f"{torch.initial_seed() + row}:{place.stack.name}".encode(), digest_size=8).digest()
        generator = torch.Generator(x.device).manual_seed(int.from_bytes(key, "big") >> 1)
        # Four masks per 64-bit draw, 16 bits each: on a CPU one draw per input costs more than the layer's products.
        draws = torch.empty(-(-length * width // 4), dtype=torch.int64, device=x.device)
        draws.random_(-(2**63), None, generator=generator)
        kept = (draws.view(torch.int16)[: length * width] >= threshold - 2**15).view(length, width)
        if context_size > 1:
            kept = torch.cat([kept[a:b] for a, b in zigzag_intervals(length, context_rank, context_size)])
        if split_tokens:
            kept = kept.chunk(size)[rank]
        mask[row] = kept.chunk(size, 1)[rank] if split_columns else kept
    return mask.transpose(0, 1), 1.0 - threshold / 2**16


def initialize(runs: Iterable[tuple[Shard, Tensor, int]], seed: int) -> None:
    """Initialize adapters as PEFT does, the same in every layout: A uniform in +-1 / sqrt(in), B zero.

    Args:
        runs: as for `build.initialize`; runs of the base and of magnitudes are skipped.
        seed: the recipe's seed.
    """
    for shard, values, start in runs:
        if shard.name.endswith(".lora_B"):
            values.zero_()
        elif shard.name.endswith(".lora_A"):
            digest = hashlib.blake2b(f"{seed}:{shard.name}".encode(), digest_size=8).digest()
            generator = torch.Generator(values.device).manual_seed(int.from_bytes(digest, "big") >> 1)
            bound = 1 / math.sqrt(shard.shape[1])
            # Drawn whole on every rank, so that the values do not depend on how the matrix is split.
            whole = torch.empty(shard.shape, dtype=torch.float32, device=values.device)
            whole.uniform_(-bound, bound, generator=generator)
            for offset, piece in shard.rectangles(values, start):
                piece.copy_(whole[tuple(slice(o, o + n) for o, n in zip(offset, piece.shape, strict=True))])


@torch.no_grad()
def initialize_magnitudes(chunks: Iterable[Any]) -> None:
    """Set DoRA's magnitudes to the row norms of the base weights. Call after the base weights are loaded."""
    for chunk in chunks:
        for stack, linear in stacks_of(chunk):
            adapters = {name: a for name, a in adapters_of(linear).items() if a.lora_magnitude is not None}
            if not adapters:
                continue
            weight = weight_of(linear)
            weights = stack.split(weight.full_tensor() if isinstance(weight, DTensor) else weight)
            for name, adapter in adapters.items():
                squares = weights[name].float().square().sum(1)
                if stack.row_parallel and linear.tp_group.size() > 1:
                    dist.all_reduce(squares, group=linear.tp_group)
                assert adapter.lora_magnitude is not None, "adapters without magnitudes are filtered out above"
                values, start = local_values(adapter.lora_magnitude)
                values.copy_(squares.sqrt_()[start : start + len(values)])
