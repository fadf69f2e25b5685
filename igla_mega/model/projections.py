"""The projections of a Llama layer, by Hugging Face's names, in megatron-core's stacked linears.

megatron-core stacks what reads the same input: `linear_qkv` holds q, k and v, `linear_fc1` gate and up. What is done
to a projection by its name (an adapter, a code of 4 bits) finds its rows here.
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
"""The linears of a layer, and the projections whose rows each holds."""
ROW_PARALLEL = ("linear_proj", "linear_fc2")
"""Last part of linears whose columns tensor parallelism splits; of the others it splits the rows."""


@dataclass(frozen=True)
class Stack:
    """How the rows of one linear, on one tensor-parallel rank, are made up of projections."""

    layer: int
    """From 0, over all pipeline stages."""
    path: str
    """Of the linear in its layer; an expert's with its number among all of them."""
    groups: int
    """The rows are stacked group by group: each projection gives 1 / groups of its own, in turn."""
    sizes: Mapping[str, int]
    """Rows of each projection in one group, in the order of the stack."""

    @property
    def row_parallel(self) -> bool:
        return self.path.endswith(ROW_PARALLEL)

    @property
    def expert(self) -> bool:
        """Whether only some tokens pass, in no order: [T, H] instead of [S, B, H]."""
        return ".local_experts." in self.path

    @property
    def name(self) -> str:
        """Of the linear's parameters, without the last part; the same in every layout."""
        return f"decoder.layers.{self.layer}.{self.path}"

    def split(self, stacked: Tensor) -> dict[str, Tensor]:
        """The rows of each projection, in the projection's own order; copies where there are several groups."""
        parts = stacked.unflatten(0, (self.groups, -1)).split(list(self.sizes.values()), 1)
        return {name: part.flatten(0, 1) for name, part in zip(self.sizes, parts, strict=True)}

    def fuse(self, parts: Sequence[Tensor]) -> Tensor:
        """The stacked rows from those of all projections."""
        if len(parts) == 1:
            return parts[0]
        return torch.cat([part.unflatten(0, (self.groups, -1)) for part in parts], 1).flatten(0, 1)


def stacks_of(chunk: Any) -> Iterator[tuple[Stack, Any]]:
    """Every stacked linear of a model chunk, in the order of the layers; of experts, those of this rank."""
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
    """Path of each linear of a layer in every layout, its path on this rank, and the projections that it holds."""
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
