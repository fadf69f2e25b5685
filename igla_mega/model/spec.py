"""Which module stands where in a Llama layer. The only file besides `run.py` that turns a config word into a choice."""

import importlib.util
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F

from igla_mega.config.errors import ConfigError
from igla_mega.config.features import Moe
from igla_mega.model.experts import use_experts
from igla_mega.ops.ring_attention import Kept, ring_attention


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang & Sennrich 2019, arXiv:1910.07467), aware of sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Each rank normalises its own tokens: mcore sums such gradients over the tensor-parallel ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),), self.weight, self.eps)


@dataclass
class Documents(PackedSeqParams):
    """Rows that hold several documents, each of which sees only itself."""

    qkv_format: str = "sbhd"
    rows: Sequence[Sequence[int]] = ()
    """For each row of the batch, where documents begin in the whole sequence, and where the last one ends."""


class CoreAttention(MegatronModule):
    """Causal attention of one rank's heads: over its own tokens by torch's fused kernels, over those of several
    context-parallel ranks, or within documents, by ring attention.

    When a layer is checkpointed (recomputed in the backward pass) ring attention keeps its output, of the size of the
    layer's input, and is not run again: at 131,072 tokens it is most of the layer's work.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type,
        attention_type: str,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_,
    ):
        super().__init__(config=config)
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.group = pg_collection.cp if pg_collection is not None else None
        self.schedule = cp_comm_type or "auto"
        self._to_recompute: deque[Kept] = deque()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: Documents | None = None,
        **_,
    ) -> Tensor:
        """Attend; a query sees the keys up to its own position, counted from the end of the keys.

        Args:
            query: [Sq, B, H, D]
            key, value: [Sk, B, Hkv, D]; longer than the query when generating from a cache.

        Returns:
            [Sq, B, H * D]
        """
        num_queries, batch, num_heads = query.shape[:3]
        if packed_seq_params is not None or (self.group is not None and self.group.size() > 1):
            documents = packed_seq_params.rows if packed_seq_params is not None else None
            return self._ring(query, key, value, documents).flatten(2)
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        mask = None
        if 1 < num_queries < k.size(2):
            mask = torch.ones(num_queries, k.size(2), dtype=torch.bool, device=q.device).tril(k.size(2) - num_queries)
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=num_queries == k.size(2) and num_queries > 1,
            scale=self.scale,
            enable_gqa=num_heads != key.size(2),
        )
        return out.permute(2, 0, 1, 3).reshape(num_queries, batch, -1)

    def _ring(self, query: Tensor, key: Tensor, value: Tensor, documents: Sequence[Sequence[int]] | None) -> Tensor:
        kept = None
        if self.training and self.config.recompute_granularity == "full":
            # mcore runs a checkpointed layer first without gradients, then again with them, in the same order.
            kept = self._to_recompute.popleft() if torch.is_grad_enabled() else Kept()
            if not torch.is_grad_enabled():
                self._to_recompute.append(kept)
        out = ring_attention(
            query,
            key,
            value,
            self.group,
            scale=self.scale,
            cu_seqlens=documents,
            schedule=self.schedule,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            kept=kept,
        )
        assert isinstance(out, Tensor), "asked for without its log-sum-exp"
        return out


def use_transformer_engine(kernels: str, device: torch.device) -> bool:
    """Decide once whether Transformer Engine's modules are used.

    Raises:
        ConfigError: asked for by name and not there.
    """
    present = device.type == "cuda" and importlib.util.find_spec("transformer_engine") is not None
    if kernels == "te" and not present:
        raise ConfigError(
            "distributed.kernels: te needs Transformer Engine on a CUDA device, and it is not there.\n"
            "  Use the NGC PyTorch image, or set distributed.kernels=local."
        )
    return present and kernels in ("te", "auto")


def block_spec(config: TransformerConfig, virtual_stage: int | None, transformer_engine: bool, moe: Moe | None = None):
    """The decoder's layers of one pipeline chunk and the norm behind the last of them."""
    num_experts = moe.num_experts if moe is not None else None
    if transformer_engine:
        layer = get_gpt_layer_with_transformer_engine_spec(num_experts, moe_grouped_gemm=moe is not None)
        from megatron.core.extensions.transformer_engine import TENorm as norm
    else:
        layer = get_gpt_layer_local_spec(num_experts, normalization="RMSNorm")
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = norm = RMSNorm
    if moe is not None:
        grouped = not transformer_engine and config.bf16 and torch.cuda.is_available()
        use_experts(layer, moe, grouped=grouped)
    # Also between Transformer Engine's projections: its context parallelism sums in bf16 and keeps every hop's keys.
    layer.submodules.self_attention.submodules.core_attention = CoreAttention
    num_layers = get_num_layers_to_build(config, vp_stage=virtual_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)
