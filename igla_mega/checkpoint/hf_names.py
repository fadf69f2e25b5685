"""Names of the weights of Hugging Face models beside ours: one table, read in both directions."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from igla_mega.config.features import Moe
from igla_mega.config.schema import Model

# Ours, and what it is made of there. Rows and columns: h hidden, q query heads * head size, k the same of key and
# value heads, f feed-forward, v vocabulary, e experts. In linear_qkv the rows of each key-value group lie together.
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
# transformers' Mixtral has none of these: they stay here.
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
    """One parameter of ours and the tensors that it is made of in a Hugging Face folder."""

    native: str
    parts: dict[str, tuple[int, ...]]
    """Their names and shapes, in the order in which their rows are stacked."""
    groups: int
    """The rows are stacked group by group: each part gives 1 / groups of its rows, in turn."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter."""
        shapes = list(self.parts.values())
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def fuse(self, tensors: Iterable[Tensor]) -> Tensor:
        """The parameter from its parts."""
        return torch.cat([t.unflatten(0, (self.groups, -1)) for t in tensors], dim=1).flatten(0, 1)

    def split(self, whole: Tensor) -> Iterator[Tensor]:
        """The parts of the parameter, each with memory of its own."""
        rows = [shape[0] // self.groups for shape in self.parts.values()]
        for part in whole.unflatten(0, (self.groups, -1)).split(rows, dim=1):
            yield part.flatten(0, 1).clone()


def weights_of(model: Model, moe: Moe | None = None) -> list[Weight]:
    """Every parameter of a model and what it is called on the other side, in the order of the layers."""
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
        native, parts = row
        shapes = {theirs + name: tuple(sizes[letter] for letter in shape) for name, shape in parts}
        return Weight(ours + native, shapes, model.num_kv_heads if native.endswith("linear_qkv.weight") else 1)

    layers = []
    for n in range(model.num_layers):
        ours, theirs = f"decoder.layers.{n}.", f"model.layers.{n}."
        layers += [weight(row, ours, theirs) for row in rows]
        for e in range(moe.num_experts if moe is not None else 0):
            places = f"{ours}mlp.experts.local_experts.{e}.", f"{theirs}block_sparse_moe.experts.{e}."
            layers += [weight(row, *places) for row in _EXPERT]
    ends = [_FINAL_NORM] if model.tie_embeddings else [_FINAL_NORM, _OUTPUT]
    return [weight(_EMBEDDING), *layers, *map(weight, ends)]
