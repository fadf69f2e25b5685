"""Locate each rank's piece of a parameter in the whole parameter, for every layout.

Two cuts separate a whole ("global") parameter from the values that a rank stores:

    1. Tensor parallelism splits one dimension: the rank's *part* is a 2-D block of rows or columns. The stacked gate
       and up projections are split separately, so their part is two blocks of rows. Rows that pad the vocabulary are in
       the part, but not in the global parameter.
    2. Data parallelism keeps a contiguous *run* of the flattened part: all of it (plain, DDP), some rows (FSDP), or any
       flat range (DistributedOptimizer), which may start and stop in the middle of a row.

Every run is therefore a few rectangles of the global parameter (`Shard.rectangles`). Initial values, checkpoints,
digests and everything else that must not depend on the layout read and write those rectangles.
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

# Transformer Engine fuses a norm into the projection that follows; the global name is that of the separate norm.
_TRANSFORMER_ENGINE_NAMES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
# Dimension that tensor parallelism splits, by the end of the parameter's name; others are replicated.
_SPLIT_DIM = {
    "embedding.word_embeddings.weight": 0,
    "output_layer.weight": 0,
    "self_attention.linear_qkv.weight": 0,
    "self_attention.linear_proj.weight": 1,
    # In the dense MLP, in an expert (`local_experts.7.`) and in shared experts (`shared_experts.`).
    "linear_fc1.weight": 0,
    "linear_fc2.weight": 1,
    # Adapters are split along the same dimension as their projections.
    **{f"{p}_proj.{matrix}": 0 for p in ("q", "k", "v", "gate", "up") for matrix in ("lora_B", "lora_magnitude")},
    "o_proj.lora_A": 1,
    "down_proj.lora_A": 1,
}
# Transformer Engine's grouped experts: one linear with a weight per local expert.
_GROUPED = re.compile(r"mlp\.experts\.(linear_fc[12])\.weight(\d+)")
_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")

Rectangle = tuple[tuple[int, ...], Tensor]
"""Offset in the global parameter, and a view of the local values that belong there."""


@dataclass(frozen=True)
class Shard:
    """Position of one tensor-parallel rank's part of a parameter in the whole parameter."""

    name: str
    """Global name, the same in every layout: layers counted over all stages, tied weights named after the embedding."""
    shape: tuple[int, ...]
    """Shape of the whole parameter, without the rows that pad the vocabulary."""
    local_shape: tuple[int, ...]
    """Shape of this tensor-parallel rank's part."""
    dim: int | None
    """Dimension that tensor parallelism splits; None if every tensor-parallel rank holds the whole parameter."""
    tensor_rank: int
    """Rank on the tensor axis; for an expert on the axis of expert tensor parallelism."""
    tensor_size: int
    """Size of that axis."""
    halves: int
    """Number of projections stacked along dim 0 that are split separately: 2 for gate and up, otherwise 1."""
    sequence_parallel: bool
    """True if the gradient on one tensor-parallel rank covers only that rank's tokens."""
    shared: bool = False
    """True for the last pipeline stage's copy of a tied embedding."""
    expert: bool = False
    """True for a routed expert, whose replicas are on `Mesh.expert_data` instead of `Mesh.data_context`."""

    @property
    def is_first_copy(self) -> bool:
        """True if sums over one replica of the model count this rank's copy; identical copies must count once."""
        return not self.shared and (self.dim is not None or self.tensor_rank == 0)

    def rectangles(self, values: Tensor, start: int = 0) -> Iterator[Rectangle]:
        """Cut a run of the local part into rectangles of the global parameter.

        Example: a part [4, 3] and the run of its elements 2 to 9, marked x:

            . . x    one rectangle of the end of row 0
            x x x    one rectangle of the whole rows 1 and 2
            x x x
            x . .    one rectangle of the start of row 3

        Each rectangle is then shifted to its place in the global parameter. With `halves` 2 a rectangle that spans gate
        and up is cut in two, because the two halves of a part are not adjacent in the whole parameter.

        Args:
            values: 1-D, the elements `start : start + len(values)` of the flattened local part.
            start: index of the first element in the flattened local part.

        Yields:
            Offset in the global parameter, and a view of `values` of the rectangle's shape: writing to it writes to the
            rank's own memory. Rows that pad the vocabulary are left out.
        """
        # 1-D parameters count as one element per row.
        columns = math.prod(self.local_shape[1:])
        stop, at = start + values.numel(), start
        while at < stop:
            row, column = divmod(at, columns)
            # A partial row on its own, all following whole rows together.
            if column or stop - at < columns:
                num_rows, width = 1, min(columns - column, stop - at)
            else:
                num_rows, width = (stop - at) // columns, columns
            block = values[at - start : at - start + num_rows * width].view(num_rows, width)
            yield from self._place(block, row, column)
            at += num_rows * width

    def _place(self, block: Tensor, row: int, column: int) -> Iterator[Rectangle]:
        """Yield the block at (row, column) of the local part as one or two rectangles of the global parameter."""
        if len(self.local_shape) == 1:
            shift = self.tensor_rank * self.local_shape[0] if self.dim == 0 else 0
            yield (row + shift,), block.view(-1)
            return
        if self.dim != 0:
            shift = self.tensor_rank * self.local_shape[1] if self.dim == 1 else 0
            yield (row, column + shift), block
            return
        # Local rows are [gate of this rank, up of this rank]; global rows are [gate of all ranks, up of all ranks].
        half_rows = self.local_shape[0] // self.halves
        for half in range(self.halves):
            first, last = max(row, half * half_rows), min(row + len(block), (half + 1) * half_rows)
            global_row = first + (half * (self.tensor_size - 1) + self.tensor_rank) * half_rows
            last = min(last, first + self.shape[0] - global_row)  # later rows pad the vocabulary
            if first < last:
                yield (global_row, column), block[first - row : last - row]


class ParameterState(NamedTuple):
    """Optimizer state in fp32 that this rank keeps for one parameter, or for a run of it."""

    shard: Shard
    start: int
    """Index of the run's first element in the flattened tensor-parallel part of the parameter."""
    values: dict[str, Tensor]
    """1-D views of the run's length: `master` (the fp32 weights), `exp_avg`, `exp_avg_sq`; with Elastic Weight
    Consolidation also `fisher` and `anchor`."""
    replicated: bool
    """True if every data-parallel rank keeps the same state."""


Shards = dict[tuple[int, str], Shard]
"""Shards by chunk index and local parameter name. Not by parameter: wrappers replace parameters, but keep names."""


def shards_of(chunks: Sequence[GPTModel], mesh: Mesh, vocab_size: int) -> Shards:
    """Describe every parameter of this rank's model chunks, and set the marks that megatron-core reads on them.

    Call before wrapping the chunks: afterwards parameters may already be split over data-parallel ranks.
    """
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
            # megatron-core's gradient norm counts parameters without this mark on tensor rank 0 only, and sets the mark
            # only where it initializes the weights itself. Experts always count: tensor-parallel ranks hold different
            # experts, or act as data-parallel ranks for them.
            param.tensor_model_parallel = expert or dim is not None  # type: ignore[attr-defined]
            if expert:
                # megatron-core sums gradients with this mark over `expert_data`, and sets it only under expert
                # parallelism; tensor parallelism alone already changes which ranks hold the same expert.
                param.allreduce = False  # type: ignore[attr-defined]
            if dim is not None:
                param.partition_dim, param.partition_stride = dim, 1  # type: ignore[attr-defined]
    return shards


def named_shards(chunks: Sequence[nn.Module], shards: Shards) -> Iterator[tuple[Shard, nn.Parameter]]:
    """Yield every parameter of the chunks, wrapped or not, with its shard."""
    for index, chunk in enumerate(chunks):
        for name, param in chunk.named_parameters():
            # DistributedDataParallel adds the prefix.
            yield shards[index, name.removeprefix("module.")], param


def local_runs(chunks: Sequence[nn.Module], shards: Shards) -> Iterator[tuple[Shard, Tensor, int]]:
    """Yield every parameter's shard, the flat run of it that this rank holds, and the run's start."""
    for shard, param in named_shards(chunks, shards):
        yield shard, *local_values(param)


def is_expert(name: str) -> bool:
    """Return True if the parameter of this name belongs to a routed expert (not to a shared one)."""
    return ".local_experts." in name


def _global_name(chunk: GPTModel, name: str, expert_rank: int) -> str:
    """Return the layout-independent name of a parameter: layers and experts numbered over all ranks."""
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        layer = chunk.decoder.layers[int(parts[2])]
        parts[2] = str(layer.layer_number - 1)
        rest = ".".join(parts[3:])
        if rest.startswith("mlp.experts."):
            first = expert_rank * layer.mlp.num_local_experts
            if stacked := _GROUPED.fullmatch(rest):
                rest = f"mlp.experts.local_experts.{first + int(stacked[2])}.{stacked[1]}.weight"
            else:
                parts[6] = str(first + int(parts[6]))
                rest = ".".join(parts[3:])
        return ".".join([*parts[:3], _TRANSFORMER_ENGINE_NAMES.get(rest, rest)])
    if name == "output_layer.weight" and chunk.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"
    return name


def local_values(tensor: Tensor) -> tuple[Tensor, int]:
    """Return the run of a parameter that this rank holds, flat, and its start in the flattened tensor-parallel part.

    A plain tensor is the whole part, from element 0. A DTensor comes from FSDP, which splits dim 0 (rows) over the data
    and context ranks: the run is a number of whole rows, and may be empty on the last ranks. The result is a view, so
    that writing to it sets the parameter. Runs of the DistributedOptimizer have no tensor here; their `ParameterState`
    carries the start.
    """
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor.view(-1), 0
    # `tensor.shape` is the shape of the whole tensor-parallel part: DTensor knows the FSDP split only.
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local().view(-1), offset[0] * math.prod(tensor.shape[1:])
