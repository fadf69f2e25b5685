"""Low-rank adapters on megatron-core's parallel linears (Hu et al. 2021, arXiv:2106.09685), by Hugging Face's names.

Each named projection has its own pair of matrices, as in PEFT: `lora_A` [rank, in] and `lora_B` [out, rank]; its
output grows by `scale * lora_B(lora_A(dropout(x)))`. What tensor parallelism splits of the projection it splits of the
pair, so that what crosses ranks is of width rank, never of width hidden. Projections that share an input share its
dropout.
"""

import contextlib
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
from igla_mega.model.nf4 import frozen_forward, weight_of
from igla_mega.model.projections import Stack, stacks_of
from igla_mega.model.shards import Shard, local_values
from igla_mega.ops.zigzag import zigzag_intervals

_MATRICES = ("lora_A", "lora_B", "lora_magnitude")
_SAMPLE_BITS = 40


@dataclass
class Switch:
    """Whether the adapters of a model take part; off, the model is its base."""

    on: bool = True

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Leave the adapters out for a while: the reference of preference optimization."""
        before, self.on = self.on, False
        try:
            yield
        finally:
            self.on = before


class Adapter(nn.Module):
    """The trained matrices of one projection, as this tensor-parallel rank holds them."""

    lora_magnitude: nn.Parameter | None

    def __init__(self, inputs: int, outputs: int, lora: Lora, *, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(lora.rank, inputs, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.empty(outputs, lora.rank, dtype=dtype, device=device))
        magnitude = nn.Parameter(torch.empty(outputs, dtype=dtype, device=device)) if lora.use_dora else None
        self.register_parameter("lora_magnitude", magnitude)


@dataclass(frozen=True)
class _Place:
    """What the adapters of a linear need to know besides their matrices."""

    stack: Stack
    scale: float
    dropout: float
    context: tuple[int, int]
    """This rank's number and the number of ranks that share each sequence."""
    switch: Switch


def attach(chunks: Iterable[Any], lora: Lora, *, context: tuple[int, int] = (0, 1)) -> Switch:
    """Freeze every weight of this rank's model chunks and give the targets adapters. Call before `shards_of`.

    The adapters lie on the device that the chunks are on (meta, as a rule); `initialize` gives them values.

    Args:
        context: this rank's number on the context axis, and the axis' size.
    """
    switch = Switch()
    for chunk in chunks:
        chunk.requires_grad_(False)
        for stack, linear in stacks_of(chunk):
            linear._forward_impl = frozen_forward
            names = [name for name in stack.sizes if name in lora.target_modules]
            for name in names:
                linear.add_module(name, _adapter(stack, name, linear, lora))
            if names:
                linear.lora = _Place(stack, scaling(lora), lora.dropout, context, switch)
                linear.register_forward_hook(_add)
        if chunk.pre_process and chunk.config.recompute_granularity is not None:
            # A recomputed layer passes no gradient to its weights unless its input asks for one.
            chunk.embedding.register_forward_hook(lambda module, args, output: output.requires_grad_())
    return switch


def _adapter(stack: Stack, name: str, linear: Any, lora: Lora) -> Adapter:
    inputs = linear.input_size_per_partition if stack.row_parallel else linear.input_size
    adapter = Adapter(
        inputs,
        stack.groups * stack.sizes[name],
        lora,
        dtype=linear.config.params_dtype,
        device=next(chain(linear.parameters(), linear.buffers())).device,
    )
    # These see only this rank's tokens: mcore sums such gradients over the tensor-parallel ranks.
    partial = (adapter.lora_B, adapter.lora_magnitude) if stack.row_parallel else (adapter.lora_A,)
    for param in partial:
        if param is not None:
            # An expert sees the tokens of all of them.
            param.sequence_parallel = linear.sequence_parallel and not stack.expert  # type: ignore[attr-defined]
    return adapter


def scaling(lora: Lora) -> float:
    """What an adapter's output is multiplied by: alpha / rank, or alpha / sqrt(rank) (arXiv:2312.03732, rsLoRA)."""
    return lora.alpha / (math.sqrt(lora.rank) if lora.use_rslora else lora.rank)


def adapters_of(linear: nn.Module) -> dict[str, Adapter]:
    """The adapters of a linear by the names of their projections, in the order of the stack."""
    return {name: child for name, child in linear.named_children() if isinstance(child, Adapter)}


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is that of an adapter's matrix; all others belong to the base."""
    return name.rpartition(".")[2] in _MATRICES


def _add(linear: Any, args: tuple, result: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None] | None:
    """Forward hook: add what the adapters make of the linear's input [S, B, I] to its output [S, B, O].

    Of an expert both are of its tokens: [T, I] and [T, O].
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
    hidden = F.linear(x.to(matrices[0].dtype), torch.cat(matrices) if len(matrices) > 1 else matrices[0])
    if stack.row_parallel and linear.sequence_parallel:
        hidden = reduce_scatter_to_sequence_parallel_region(hidden, group=linear.tp_group)
    elif stack.row_parallel:
        hidden = reduce_from_tensor_model_parallel_region(hidden, group=linear.tp_group)
    elif linear.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, group=linear.tp_group)
    else:
        hidden = copy_to_tensor_model_parallel_region(hidden, group=linear.tp_group)
    rows = [(name in adapters, size) for name, size in stack.sizes.items()]
    # What a row-parallel linear gives may be a view of what was reduced, which must not be written to.
    out = out.clone() if stack.row_parallel else out
    out = _AddProjections.apply(out, hidden * scale, stack.groups, rows, *(a.lora_B for a in adapters.values()))
    if any(adapter.lora_magnitude is not None for adapter in adapters.values()):
        out = out * _magnitudes(place, linear, adapters).to(out.dtype)
    return out, bias


class _AddProjections(torch.autograd.Function):
    """Add to out [S, B, O], in place, each projection's lora_B times its part of hidden [S, B, R * projections]."""

    @staticmethod
    def forward(ctx, out, hidden, groups, rows, *matrices):
        ctx.save_for_backward(hidden, *matrices)
        ctx.groups, ctx.rows = groups, rows
        ctx.mark_dirty(out)
        stacked = out.view(-1, groups, out.size(-1) // groups)
        for start, size, part, matrix in _parts(hidden, rows, matrices):
            target = stacked[..., start : start + size]
            if groups == 1 and part.dtype == out.dtype:
                target.squeeze(1).addmm_(part, matrix.t())
            else:
                target.add_((part @ matrix.t()).view(-1, groups, size))
        return out

    @staticmethod
    def backward(ctx, grad):
        hidden, *matrices = ctx.saved_tensors
        stacked = grad.reshape(-1, ctx.groups, grad.size(-1) // ctx.groups)
        grad_parts, grad_matrices = [], []
        for start, size, part, matrix in _parts(hidden, ctx.rows, matrices):
            own = stacked[..., start : start + size].flatten(1).to(matrix.dtype)
            grad_parts.append(own @ matrix)
            grad_matrices.append(own.t() @ part)
        joined = torch.cat(grad_parts, 1) if len(grad_parts) > 1 else grad_parts[0]
        return grad, joined.view_as(hidden), None, None, *grad_matrices


def _parts(
    hidden: Tensor, rows: Sequence[tuple[bool, int]], matrices: Sequence[Tensor]
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """For each adapted projection: where its rows start in a group, how many, its part of hidden [S * B, R], lora_B."""
    rank, start, index = matrices[0].size(1), 0, 0
    flat = hidden.flatten(0, -2)
    for adapted, size in rows:
        if adapted:
            yield start, size, flat[:, index * rank : (index + 1) * rank], matrices[index]
            index += 1
        start += size


def _magnitudes(place: _Place, linear: Any, adapters: Mapping[str, Adapter]) -> Tensor:
    """Trained magnitude over the norm of each row (DoRA: Liu et al. 2024, arXiv:2402.09353, eq. 5), [O] fp32."""
    factors = []
    for name, weight in place.stack.split(weight_of(linear)).items():
        adapter = adapters.get(name)
        if adapter is None:
            factors.append(torch.ones(len(weight), device=weight.device))
        else:
            group = linear.tp_group if place.stack.row_parallel else None
            assert adapter.lora_magnitude is not None, "all have one, or none"
            factors.append(adapter.lora_magnitude / _norms(weight, adapter, place.scale, group))
    return place.stack.fuse(factors)


@torch.no_grad()
def _norms(weight: Tensor, adapter: Adapter, scale: float, group: dist.ProcessGroup | None) -> Tensor:
    """Norm of every row of `weight + scale * B A`, [O] fp32, without forming the sum. It takes no gradient.

    Args:
        group: ranks that each hold some of the columns; None when this one holds all.
    """
    weight, a, b = weight.float(), adapter.lora_A.float(), adapter.lora_B.float()
    own, cross, gram = (weight * weight).sum(1), weight @ a.t(), a @ a.t()
    if group is not None and group.size() > 1:
        for part in (own, cross, gram):
            dist.all_reduce(part, group=group)
    square = own + 2 * scale * (cross * b).sum(1) + scale**2 * ((b @ gram) * b).sum(1)
    return square.clamp_(min=0).sqrt_()


def seed_dropout(seed: int, first_sample: int) -> None:
    """Say which samples the next micro-batch holds: `first_sample` and those after it, counted from the run's start.

    The masks are functions of (seed, sample, layer, linear, token), the same in every layout. The key travels as the
    seed of torch's default generator, which recomputation puts back to what it was in the forward pass.
    """
    digest = hashlib.blake2b(str(seed).encode(), digest_size=2).digest()
    torch.manual_seed(int.from_bytes(digest, "big") << _SAMPLE_BITS | first_sample)
    if not torch.cuda.is_available():
        # Under sequence parallelism mcore runs the layers with a device generator of its own; here that is the host's.
        tracker, state = get_cuda_rng_tracker(), torch.get_rng_state()
        tracker.set_states(dict.fromkeys(tracker.get_states(), state))


def _dropout_mask(place: _Place, linear: Any, x: Tensor) -> tuple[Tensor, float]:
    """Which inputs stay, bool like x, and their share: 1 - dropout, rounded to 1 / 65536.

    An expert's tokens come in an order that depends on the layout, and their mask with it.
    """
    threshold = round(place.dropout * 2**16)
    if place.stack.expert:
        key = hashlib.blake2b(f"{torch.initial_seed()}:{place.stack.name}".encode(), digest_size=8).digest()
        generator = torch.Generator(x.device).manual_seed(int.from_bytes(key, "big") >> 1)
        drawn = torch.randint(2**16, x.shape, generator=generator, device=x.device)
        return drawn >= threshold, 1.0 - threshold / 2**16
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
        # 16 bits of a draw for each input: on a CPU a draw for each costs more than the layer's products.
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
    """Fill adapters as PEFT does, the same in every layout: A uniform in +-1 / sqrt(in), B zero.

    Args:
        runs: as for `build.initialize`; those of the base, and magnitudes, are left alone.
    """
    for shard, values, start in runs:
        if shard.name.endswith(".lora_B"):
            values.zero_()
        elif shard.name.endswith(".lora_A"):
            digest = hashlib.blake2b(f"{seed}:{shard.name}".encode(), digest_size=8).digest()
            generator = torch.Generator(values.device).manual_seed(int.from_bytes(digest, "big") >> 1)
            bound = 1 / math.sqrt(shard.shape[1])
            whole = torch.empty(shard.shape, dtype=torch.float32, device=values.device)
            whole.uniform_(-bound, bound, generator=generator)
            for offset, piece in shard.rectangles(values, start):
                piece.copy_(whole[tuple(slice(o, o + n) for o, n in zip(offset, piece.shape, strict=True))])


@torch.no_grad()
def initialize_magnitudes(chunks: Iterable[Any]) -> None:
    """Set DoRA's magnitudes to the norms of the base's rows. Call when the base has its values."""
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
                assert adapter.lora_magnitude is not None, "filtered above"
                values, start = local_values(adapter.lora_magnitude)
                values.copy_(squares.sqrt_()[start : start + len(values)])
