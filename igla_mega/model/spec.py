"""Select the modules of a Llama layer, and the megatron-core settings of optional kernels and precisions."""

import importlib.util
import math
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from igla_mega.config.errors import ConfigError
from igla_mega.config.features import Moe
from igla_mega.config.rules import FP8_CAPABILITY
from igla_mega.distributed import megatron_patches
from igla_mega.model.experts import use_experts
from igla_mega.ops.pointwise import rms_norm, rotate, swiglu
from igla_mega.ops.ring_attention import Kept, ring_attention
from igla_mega.ops.varlen_attention import varlen_attention

BACKENDS = {AttnBackend.flash: SDPBackend.FLASH_ATTENTION, AttnBackend.fused: SDPBackend.CUDNN_ATTENTION}
"""Attention backends of torch by megatron-core's name; with any other name torch chooses."""


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang & Sennrich 2019, arXiv:1910.07467), aware of sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, fused: bool = True, **_):
        """Create the weight [hidden_size], all ones.

        Args:
            config: parameter type and sequence parallelism.
            hidden_size: size of the normalized dimension.
            eps: added to the mean square.
            fused: True for the fused op of `ops/pointwise.py`, False for torch's.
        """
        super().__init__()
        self.eps, self.fused = eps, fused
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Each rank normalizes only its own tokens: megatron-core sums gradients with this mark over tensor-parallel
        # ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x [..., H] over its last dimension."""
        if not self.fused:
            return F.rms_norm(x, (x.size(-1),), self.weight, self.eps)
        return rms_norm(x, self.weight, self.eps)


class SwiGLU(nn.Module):
    """SwiGLU as one fused op, in place of megatron-core's chain of activation and product."""

    def __init__(self, config: TransformerConfig):
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return swiglu(x)


@dataclass
class Documents(PackedSeqParams):
    """Packed rows of several documents, each of which attends only to itself."""

    qkv_format: str = "sbhd"
    rows: Sequence[Sequence[int]] = ()
    """For each row of the batch, the first token of each document in the whole sequence and the end of the last one."""


class CoreAttention(MegatronModule):
    """Causal attention of one rank's heads.

    Without packed documents and context parallelism one call of torch's fused attention is used, otherwise ring
    attention, or flash attention for documents of variable length.

    With full activation recomputation ring attention saves its output, of the size of the layer's input, and does not
    run again in the backward pass: at 131,072 tokens it is most of the layer's work.
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
        """Read the settings; megatron-core passes these arguments to every core attention.

        Args:
            config: head size, attention backend and recomputation.
            layer_number, attn_mask_type, attention_type: ignored.
            softmax_scale: factor of the scores; 1 / sqrt(head size) by default.
            cp_comm_type: schedule of ring attention; "auto" by default.
            pg_collection: process groups, of which the context-parallel one is used.
        """
        super().__init__(config=config)
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.group = pg_collection.cp if pg_collection is not None else None
        self.schedule = cp_comm_type or "auto"
        self.backend = BACKENDS.get(getattr(config, "attention_backend", AttnBackend.auto))
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
        """Attend causally; the last query is at the position of the last key.

        Args:
            query: [Sq, B, H, D]
            key, value: [Sk, B, Hkv, D]; longer than the query when generating from a cache.
            attention_mask: ignored; attention is always causal.
            packed_seq_params: documents of packed rows.

        Returns:
            [Sq, B, H * D]
        """
        num_queries, batch, num_heads = query.shape[:3]
        if packed_seq_params is not None or (self.group is not None and self.group.size() > 1):
            documents = packed_seq_params.rows if packed_seq_params is not None else None
            if documents is not None and self._takes_varlen(query):
                return varlen_attention(query, key, value, documents, self.scale).flatten(2)
            return self._ring(query, key, value, documents).flatten(2)
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))  # [B, H, S, D]
        # torch's `is_causal` aligns the first query with the first key; with a longer cache the last ones must align.
        mask = None
        if 1 < num_queries < k.size(2):
            mask = torch.ones(num_queries, k.size(2), dtype=torch.bool, device=q.device).tril(k.size(2) - num_queries)
        # Forcing a backend that cannot handle the input is an error, and flash and cuDNN handle neither fp32 nor masks.
        backend = self.backend if q.is_cuda and q.dtype != torch.float32 and mask is None else None
        with sdpa_kernel(backend) if backend is not None else nullcontext():
            out = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=num_queries == k.size(2) and num_queries > 1,
                scale=self.scale,
                enable_gqa=num_heads != key.size(2),
            )
        return out.permute(2, 0, 1, 3).reshape(num_queries, batch, -1)  # [Sq, B, H * D]

    def _takes_varlen(self, query: Tensor) -> bool:
        """Return True if one call of flash attention can process all documents.

        Under full recomputation ring attention is preferred, because it can save its output.
        """
        single_rank = self.group is None or self.group.size() == 1
        half = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)
        return single_rank and half and self.config.recompute_granularity != "full"

    def _ring(self, query: Tensor, key: Tensor, value: Tensor, documents: Sequence[Sequence[int]] | None) -> Tensor:
        """Run ring attention, [Sq, B, H, D], or return its saved output if the layer is being recomputed."""
        kept = None
        if self.training and self.config.recompute_granularity == "full":
            # megatron-core runs a recomputed layer first without gradients, then again with them. The micro-batches in
            # flight in a pipeline are recomputed in the order of their forward passes, so a queue matches them.
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
        assert isinstance(out, Tensor), "the log-sum-exp is not requested"
        return out


def use_transformer_engine(kernels: str, device: torch.device) -> bool:
    """Return True if Transformer Engine's modules are used.

    Args:
        kernels: "te", "auto" or "local", the recipe's `distributed.kernels`.
        device: device of the model.

    Raises:
        ConfigError: `kernels` is "te", but Transformer Engine or a CUDA device is missing.
    """
    present = device.type == "cuda" and importlib.util.find_spec("transformer_engine") is not None
    if kernels == "te" and not present:
        raise ConfigError(
            "distributed.kernels: te needs Transformer Engine on a CUDA device, which is not available.\n"
            "  Use the NGC PyTorch image, or set distributed.kernels=local."
        )
    return present and kernels in ("te", "auto")


def use_fused_positions() -> None:
    """Make megatron-core's `apply_rope_fusion` use `ops.pointwise.rotate`, which also handles packed documents."""
    megatron_patches.use_rotary_kernel(rotate)


def fp8_settings(fp8_recipe: str, device: torch.device, transformer_engine: bool) -> dict[str, str]:
    """Return megatron-core's settings for FP8 products: e4m3 in the forward pass, e5m2 for gradients.

    Raises:
        ConfigError: Transformer Engine is missing, or the GPU does not support the FP8 recipe.
    """
    if not transformer_engine:
        raise ConfigError(
            "distributed.precision: FP8 needs Transformer Engine on a CUDA device, which is not available.\n"
            "  Use the NGC PyTorch image, or set distributed.precision=BF16."
        )
    capability = torch.cuda.get_device_capability(device)
    needed = FP8_CAPABILITY[fp8_recipe]
    supported = [name for name, minimum in FP8_CAPABILITY.items() if minimum <= capability]
    if capability < needed:
        raise ConfigError(
            f"distributed.fp8_recipe: {fp8_recipe} needs compute capability {needed[0]}.{needed[1]}, but "
            f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}.\n"
            f"  Use {' or '.join(supported) or 'another GPU'}, or set distributed.precision=BF16."
        )
    return {"fp8": "hybrid", "fp8_recipe": fp8_recipe}


def graph_settings(seed: int, recompute: str) -> dict[str, str]:
    """Return megatron-core's settings for layers that are recorded as CUDA graphs and replayed.

    Raises:
        ConfigError: the layout uses full activation recomputation, which cannot be recorded.
    """
    if recompute == "full":
        raise ConfigError(
            "distributed.cuda_graphs: true, but this model fits only with full activation recomputation, which cannot "
            "be recorded.\n  Set cuda_graphs=false, or split the model over more ranks."
        )
    # Random numbers inside a graph need generators that are registered with it.
    model_parallel_cuda_manual_seed(seed, use_cudagraphable_rng=True, force_reset_rng=True)
    return {"cuda_graph_impl": "local"}


def block_spec(
    config: TransformerConfig,
    virtual_stage: int | None,
    transformer_engine: bool,
    moe: Moe | None = None,
    *,
    fused: bool = True,
):
    """Return the spec of one pipeline chunk: the decoder's layers and the norm after the last of them.

    Args:
        config: built by `build.transformer_config` with the same `transformer_engine` and `fused`.
        virtual_stage: index of the chunk on this rank; None without virtual pipeline stages.
        transformer_engine: True for Transformer Engine's modules, False for local ones.
        moe: the recipe's `moe` section; None for dense layers.
        fused: True for this package's fused RMSNorm and SwiGLU in local layers; False for torch's and megatron-core's.
    """
    num_experts = moe.num_experts if moe is not None else None
    if transformer_engine:
        layer = get_gpt_layer_with_transformer_engine_spec(num_experts, moe_grouped_gemm=moe is not None)
        from megatron.core.extensions.transformer_engine import TENorm as norm
    else:
        layer = get_gpt_layer_local_spec(num_experts, normalization="RMSNorm")
        norm = ModuleSpec(RMSNorm, params={"fused": fused})
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = norm
        mlp = layer.submodules.mlp.submodules
        for part in (mlp,) if moe is None else (mlp.experts.submodules, mlp.shared_experts.submodules):
            # megatron-core builds it only with `use_te_activation_func`, which `transformer_config` sets with `fused`.
            part.activation_func = SwiGLU
    if moe is not None:
        grouped = not transformer_engine and config.bf16 and torch.cuda.is_available()
        use_experts(layer, moe, grouped=grouped)
    # With Transformer Engine's projections too: its context parallelism sums in bf16 and saves every hop's keys.
    layer.submodules.self_attention.submodules.core_attention = CoreAttention
    num_layers = get_num_layers_to_build(config, vp_stage=virtual_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)


# FP8 quantizes inside the products; parameters and activations stay in bf16.
DTYPES = {"BF16": torch.bfloat16, "FP32": torch.float32, "FP8": torch.bfloat16}
