"""Map parameters to the tensors of Hugging Face models with one table that is read in both directions."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from igla_mega.config.features import Moe
from igla_mega.config.schema import Model

# Each row: a parameter's name here, and the names and shapes of the tensors in a Hugging Face folder that it stacks.
# Letters of a shape: h hidden size, q query heads * head size, k key-value heads * head size, f feed-forward, v
# vocabulary, e experts, s shared experts' feed-forward. In `linear_qkv` megatron-core interleaves the rows by key-value
# group: the queries of group 0, its key, its value, then group 1. Hugging Face stores queries, keys and values apart.
_LAYER = (
    ("input_layernorm.weight", (("input_layernorm.weight", "h"),)),
    (
        "self_attention.linear_qkv.weight",
        (("self_attn.q_proj.weight", "qh"), ("self_attn.k_proj.weight", "kh"), ("self_attn.v_proj.weight", "kh")),
    ),
    ("self_attention.linear_proj.weight", (("self_attn.o_proj.weight", "hq"),)),
    ("pre_mlp_layernorm.weight", (("post_attention_layernorm.weight", "h"),)),
)
_DENSE = (
    ("mlp.linear_fc1.weight", (("mlp.gate_proj.weight", "fh"), ("mlp.up_proj.weight", "fh"))),
    ("mlp.linear_fc2.weight", (("mlp.down_proj.weight", "hf"),)),
)
_ROUTER = ("mlp.router.weight", (("block_sparse_moe.gate.weight", "eh"),))
_EXPERT = (
    ("linear_fc1.weight", (("w1.weight", "fh"), ("w3.weight", "fh"))),
    ("linear_fc2.weight", (("w2.weight", "hf"),)),
)
# transformers' Mixtral has no shared experts; these names are ours, and `is_mixtral` rejects their export.
_SHARED = (
    (
        "mlp.shared_experts.linear_fc1.weight",
        (("mlp.shared.gate_proj.weight", "sh"), ("mlp.shared.up_proj.weight", "sh")),
    ),
    ("mlp.shared_experts.linear_fc2.weight", (("mlp.shared.down_proj.weight", "hs"),)),
)
_BIAS = ("mlp.router.expert_bias", (("mlp.router.expert_bias", "e"),))
_EMBEDDING = ("embedding.word_embeddings.weight", (("model.embed_tokens.weight", "vh"),))
_FINAL_NORM = ("decoder.final_layernorm.weight", (("model.norm.weight", "h"),))
_OUTPUT = ("output_layer.weight", (("lm_head.weight", "vh"),))


@dataclass(frozen=True)
class Weight:
    """One parameter, and the tensors of a Hugging Face folder that are stacked in it."""

    native: str
    """Name of the parameter in a checkpoint."""
    parts: dict[str, tuple[int, ...]]
    """Names and shapes of the Hugging Face tensors, in the order in which their rows are stacked."""
    groups: int
    """Number of groups by which the rows are stacked: each part contributes 1 / groups of its rows to each group."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        shapes = list(self.parts.values())
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def fuse(self, tensors: Iterable[Tensor]) -> Tensor:
        """Return the parameter made of its parts."""
        return torch.cat([t.unflatten(0, (self.groups, -1)) for t in tensors], dim=1).flatten(0, 1)

    def split(self, whole: Tensor) -> Iterator[Tensor]:
        """Yield the parts of the parameter, each a copy: safetensors rejects tensors that share memory."""
        rows = [shape[0] // self.groups for shape in self.parts.values()]
        for part in whole.unflatten(0, (self.groups, -1)).split(rows, dim=1):  # [groups, rows of one group, ...]
            yield part.flatten(0, 1).clone()


def weights_of(model: Model, moe: Moe | None = None) -> list[Weight]:
    """Return every parameter of a model with its Hugging Face tensors, in the order of the layers."""
    sizes = {
        "h": model.hidden_size,
        "q": model.num_heads * model.head_size,
        "k": model.num_kv_heads * model.head_size,
        "f": model.intermediate_size,
        "v": model.vocab_size,
    }
    rows: tuple = (*_LAYER, *_DENSE)
    if moe is not None:
        sizes |= {"e": moe.num_experts, "s": moe.shared_intermediate_size or 0}
        shared = _SHARED if moe.shared_intermediate_size else ()
        rows = (*_LAYER, _ROUTER, *((_BIAS,) if moe.bias_update_rate > 0 else ()), *shared)

    def weight(row, ours: str = "", theirs: str = "") -> Weight:
        """Return the weight of a table row, with the prefixes of its layer and expert."""
        native, parts = row
        shapes = {theirs + name: tuple(sizes[letter] for letter in shape) for name, shape in parts}
        return Weight(ours + native, shapes, model.num_kv_heads if native.endswith("linear_qkv.weight") else 1)

    layers = []
    for n in range(model.num_layers):
        ours, theirs = f"decoder.layers.{n}.", f"model.layers.{n}."
        layers += [weight(row, ours, theirs) for row in rows]
        for e in range(moe.num_experts if moe is not None else 0):
            prefixes = f"{ours}mlp.experts.local_experts.{e}.", f"{theirs}block_sparse_moe.experts.{e}."
            layers += [weight(row, *prefixes) for row in _EXPERT]
    ends = [_FINAL_NORM] if model.tie_embeddings else [_FINAL_NORM, _OUTPUT]
    return [weight(_EMBEDDING), *layers, *map(weight, ends)]
