"""Locate the projections of a Llama layer, by Hugging Face's names, in megatron-core's stacked linears.

megatron-core stacks projections that read the same input: `linear_qkv` holds q, k and v, `linear_fc1` gate and up.
Adapters and 4-bit codes belong to single projections and find their rows here.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

STACKS = {
    "self_attention.linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "self_attention.linear_proj": ("o_proj",),
    "mlp.linear_fc1": ("gate_proj", "up_proj"),
    "mlp.linear_fc2": ("down_proj",),
}
"""Linears of a layer, and the projections whose rows each of them stacks."""
ROW_PARALLEL = ("linear_proj", "linear_fc2")
"""Names of the linears whose columns tensor parallelism splits; of all others it splits the rows."""


@dataclass(frozen=True)
class Stack:
    """Arrangement of projections in the rows of one linear on one tensor-parallel rank."""

    layer: int
    """Index of the layer over all pipeline stages, counted from 0."""
    path: str
    """Path of the linear in its layer; for an expert with the expert's number over all ranks."""
    groups: int
    """Number of repetitions of the stack: megatron-core interleaves q, k and v by key-value head, so each group holds
    1 / groups of the rows of every projection."""
    sizes: Mapping[str, int]
    """Number of rows of each projection in one group, in the order of the stack."""

    @property
    def row_parallel(self) -> bool:
        """True if tensor parallelism splits the columns (the input), False if it splits the rows."""
        return self.path.endswith(ROW_PARALLEL)

    @property
    def expert(self) -> bool:
        """True if the linear belongs to a routed expert, whose input is [T, H] tokens instead of [S, B, H]."""
        return ".local_experts." in self.path

    @property
    def name(self) -> str:
        """Global name of the linear, the same in every layout: the prefix of its parameters' names."""
        return f"decoder.layers.{self.layer}.{self.path}"

    def split(self, stacked: Tensor) -> dict[str, Tensor]:
        """Return the rows of each projection in the projection's order; copies if there are several groups."""
        # [groups, rows of a group, ...]: a projection is a slice of every group.
        parts = stacked.unflatten(0, (self.groups, -1)).split(list(self.sizes.values()), 1)
        return {name: part.flatten(0, 1) for name, part in zip(self.sizes, parts, strict=True)}

    def fuse(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the stacked rows, given those of all projections; the inverse of `split`."""
        if len(parts) == 1:
            return parts[0]
        return torch.cat([part.unflatten(0, (self.groups, -1)) for part in parts], 1).flatten(0, 1)


def stacks_of(chunk: Any) -> Iterator[tuple[Stack, Any]]:
    """Yield every stacked linear of a model chunk in layer order; of the experts, only those of this rank."""
    config = chunk.config
    heads, groups, head = config.num_attention_heads, config.num_query_groups, config.kv_channels
    for layer in chunk.decoder.layers:
        for path, local, projections in _linears(layer):
            linear = layer.get_submodule(local)
            size = linear.tp_group.size()
            if path.endswith("linear_qkv"):
                sizes = {"q_proj": heads // groups * head, "k_proj": head, "v_proj": head}
            elif path.endswith("linear_fc1"):
                sizes = dict.fromkeys(projections, linear.output_size // len(projections) // size)
            else:
                sizes = {projections[0]: config.hidden_size}
            num_groups = groups // size if path.endswith("linear_qkv") else 1
            yield Stack(layer.layer_number - 1, path, num_groups, sizes), linear


def _linears(layer: Any) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Yield the global path of each linear of a layer, its path on this rank, and the projections that it stacks."""
    routed = hasattr(layer.mlp, "local_expert_indices")
    for path, projections in STACKS.items():
        block, _, linear = path.partition(".")
        if block != "mlp" or not routed:
            yield path, path, projections
            continue
        for local, expert in enumerate(layer.mlp.local_expert_indices):
            stem = "mlp.experts.local_experts"
            yield f"{stem}.{expert}.{linear}", f"{stem}.{local}.{linear}", projections
        if layer.mlp.shared_experts is not None:
            yield f"mlp.shared_experts.{linear}", f"mlp.shared_experts.{linear}", projections
