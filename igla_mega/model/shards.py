"""Where a rank's piece of a parameter lies in the whole: the geometry that every layout shares.

A rank holds a contiguous run of the elements of its tensor-parallel part of a parameter: all of them (plain, DDP),
some rows (FSDP), or any flat range (DistributedOptimizer). Whatever it holds is at most a few rectangles of the
global parameter. Initialisation, checkpoints and everything else that must not depend on the layout work on those.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron.core.models.gpt import GPTModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from igla_mega.distributed.mesh import Mesh

# Transformer Engine fuses a norm into the projection behind it; the global name is the one without it.
_TRANSFORMER_ENGINE_NAMES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
_SPLIT_DIM = {
    "embedding.word_embeddings.weight": 0,
    "output_layer.weight": 0,
    "self_attention.linear_qkv.weight": 0,
    "self_attention.linear_proj.weight": 1,
    # Of the dense network, of an expert (`local_experts.7.`) and of shared experts (`shared_experts.`).
    "linear_fc1.weight": 0,
    "linear_fc2.weight": 1,
    # Adapters split where their projections do.
    **{f"{p}_proj.{matrix}": 0 for p in ("q", "k", "v", "gate", "up") for matrix in ("lora_B", "lora_magnitude")},
    "o_proj.lora_A": 1,
    "down_proj.lora_A": 1,
}
_GROUPED = re.compile(r"mlp\.experts\.(linear_fc[12])\.weight(\d+)")
_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")

Rectangle = tuple[tuple[int, ...], Tensor]
"""Offset in the global parameter, and the values there (a view)."""


@dataclass(frozen=True)
class Shard:
    """One parameter as one rank holds it."""

    name: str
    """The same in every layout: layers counted over all stages, tied weights under the embedding's name."""
    shape: tuple[int, ...]
    """Of the whole parameter, without the rows that pad the vocabulary."""
    local_shape: tuple[int, ...]
    """Of this tensor-parallel rank's part."""
    dim: int | None
    """Which dim tensor parallelism splits; None when every tensor-parallel rank holds all of it."""
    tensor_rank: int
    """Of an expert, on the axis of expert tensor parallelism."""
    tensor_size: int
    halves: int
    """2 for the stacked gate and up projections, each of which is split by itself."""
    sequence_parallel: bool
    """Its gradient on one tensor-parallel rank covers only that rank's tokens."""
    shared: bool = False
    """The last pipeline stage's copy of a tied embedding."""
    expert: bool = False
    """Held by the ranks of its expert alone: others hold the same on `Mesh.expert_data`, not on `Mesh.data_context`."""

    @property
    def is_first_copy(self) -> bool:
        """Whether this rank's copy is the one to count, where ranks of one replica of the model hold the same."""
        return not self.shared and (self.dim is not None or self.tensor_rank == 0)

    def rectangles(self, values: Tensor, start: int = 0) -> Iterator[Rectangle]:
        """Cut a run of the local part into rectangles of the global parameter.

        Args:
            values: 1-D, the elements `start : start + len(values)` of the flattened local part.
        """
        columns = math.prod(self.local_shape[1:])
        stop, at = start + values.numel(), start
        while at < stop:
            row, column = divmod(at, columns)
            # A partial row by itself, whole rows together.
            if column or stop - at < columns:
                num_rows, width = 1, min(columns - column, stop - at)
            else:
                num_rows, width = (stop - at) // columns, columns
            block = values[at - start : at - start + num_rows * width].view(num_rows, width)
            yield from self._place(block, row, column)
            at += num_rows * width

    def _place(self, block: Tensor, row: int, column: int) -> Iterator[Rectangle]:
        if len(self.local_shape) == 1:
            shift = self.tensor_rank * self.local_shape[0] if self.dim == 0 else 0
            yield (row + shift,), block.view(-1)
            return
        if self.dim != 0:
            shift = self.tensor_rank * self.local_shape[1] if self.dim == 1 else 0
            yield (row, column + shift), block
            return
        half_rows = self.local_shape[0] // self.halves
        for half in range(self.halves):
            first, last = max(row, half * half_rows), min(row + len(block), (half + 1) * half_rows)
            global_row = first + (half * (self.tensor_size - 1) + self.tensor_rank) * half_rows
            last = min(last, first + self.shape[0] - global_row)  # rows beyond are vocabulary padding
            if first < last:
                yield (global_row, column), block[first - row : last - row]


class ParameterState(NamedTuple):
    """The fp32 state that this rank's optimizer keeps for (a run of) one parameter."""

    shard: Shard
    start: int
    """Where the run starts in the flattened tensor-parallel part of the parameter."""
    values: dict[str, Tensor]
    """1-D views, all of the run's length: `master` (the fp32 weights), `exp_avg`, `exp_avg_sq`; with Elastic Weight
    Consolidation also `fisher` and `anchor`."""
    replicated: bool
    """Every data-parallel rank keeps the same."""


Shards = dict[tuple[int, str], Shard]
"""By chunk and the parameter's name in it: wrappers replace the parameters, the names stay."""


def shards_of(chunks: Sequence[GPTModel], mesh: Mesh, vocab_size: int) -> Shards:
    """Describe every parameter of this rank's model chunks. Call before wrapping them."""
    shards: Shards = {}
    for index, chunk in enumerate(chunks):
        for local_name, param in chunk.named_parameters():
            name = _global_name(chunk, local_name, mesh.expert.rank)
            expert = is_expert(name)
            tensor = mesh.expert_tensor if expert else mesh.tensor
            dim = next((d for suffix, d in _SPLIT_DIM.items() if name.endswith(suffix)), None)
            shape = list(param.shape)
            if dim is not None:
                shape[dim] *= tensor.size
            if name.endswith(_VOCABULARY):
                shape[0] = vocab_size
            shards[index, local_name] = Shard(
                name=name,
                shape=tuple(shape),
                local_shape=tuple(param.shape),
                dim=dim,
                tensor_rank=tensor.rank,
                tensor_size=tensor.size,
                halves=2 if name.endswith("linear_fc1.weight") else 1,
                sequence_parallel=getattr(param, "sequence_parallel", False),
                shared=getattr(param, "shared", False),
                expert=expert,
            )
            # mcore's norm counts a parameter by this mark, and sets it only where it initialises the weights itself.
            # Tensor-parallel ranks hold different experts, or are data-parallel ranks to them.
            param.tensor_model_parallel = expert or dim is not None  # type: ignore[attr-defined]
            if expert:
                # mcore sums its gradient over `expert_data`, also where one rank holds all experts.
                param.allreduce = False  # type: ignore[attr-defined]
            if dim is not None:
                param.partition_dim, param.partition_stride = dim, 1  # type: ignore[attr-defined]
    return shards


def named_shards(chunks: Sequence[nn.Module], shards: Shards) -> Iterator[tuple[Shard, nn.Parameter]]:
    """Pair every parameter of the chunks, wrapped or not, with its place in the whole."""
    for index, chunk in enumerate(chunks):
        for name, param in chunk.named_parameters():
            yield shards[index, name.removeprefix("module.")], param


def local_runs(chunks: Sequence[nn.Module], shards: Shards) -> Iterator[tuple[Shard, Tensor, int]]:
    """Every parameter's place, the flat run of it that this rank holds, and where that run starts."""
    for shard, param in named_shards(chunks, shards):
        yield shard, *local_values(param)


def is_expert(name: str) -> bool:
    """Whether a parameter, by its name, belongs to one of the experts among which a router chooses."""
    return ".local_experts." in name


def _global_name(chunk: GPTModel, name: str, expert_rank: int) -> str:
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        layer = chunk.decoder.layers[int(parts[2])]
        parts[2] = str(layer.layer_number - 1)
        rest = ".".join(parts[3:])
        if rest.startswith("mlp.experts."):
            first = expert_rank * layer.mlp.num_local_experts
            if stacked := _GROUPED.fullmatch(rest):  # Transformer Engine's experts of a rank
                rest = f"mlp.experts.local_experts.{first + int(stacked[2])}.{stacked[1]}.weight"
            else:
                parts[6] = str(first + int(parts[6]))
                rest = ".".join(parts[3:])
        return ".".join([*parts[:3], _TRANSFORMER_ENGINE_NAMES.get(rest, rest)])
    if name == "output_layer.weight" and chunk.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"
    return name


def local_values(tensor: Tensor) -> tuple[Tensor, int]:
    """What this rank holds of a parameter, flat, and where it starts in the flattened tensor-parallel part."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor.view(-1), 0
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local().view(-1), offset[0] * math.prod(tensor.shape[1:])
