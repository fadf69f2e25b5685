"""From the recipe's `model` section to this rank's chunks of a megatron-core GPTModel, with their weights."""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F

from igla_mega.config.features import Moe
from igla_mega.config.schema import Model
from igla_mega.data.micro_batch import Routing
from igla_mega.distributed.mesh import pipeline_ends
from igla_mega.layout.layout import Layout
from igla_mega.model.experts import connect
from igla_mega.model.lora import seed_dropout
from igla_mega.model.output import Output, SummedLoss
from igla_mega.model.router import router_context
from igla_mega.model.shards import Shard
from igla_mega.model.spec import block_spec, use_fused_positions

NEAR_RADIANS = 256.0
"""Rotary angles below this are rounded to fp32 as they are; those beyond lose their whole turns first."""


class CausalLM(GPTModel):
    """GPTModel with rotary angles for any positions, and an output that never holds the logits of all tokens."""

    true_vocab_size: int
    rotary_frequencies: tuple[Tensor, Tensor]
    """Result of `inverse_frequencies` in fp32 and in fp64."""
    output: Output
    """What the last stage returns when labels are given."""

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: None,
        *,
        dropout_seed: tuple[int, int] | None = None,
        routing: Routing | None = None,
        **rest: Any,
    ) -> Tensor:
        """Run this chunk on one micro-batch; the first two tensors are [B, S].

        Args:
            dropout_seed: see `MicroBatch.dropout_seed`.
            routing: what the routers of this chunk need to know of the micro-batch.
            rest: keyword arguments of GPTModel.forward.
        """
        # Set here and not where the batch is made: with interleaved stages micro-batches overlap, and each forward
        # pass must see its own.
        if dropout_seed is not None:
            seed_dropout(*dropout_seed)
        if routing is not None and (context := router_context(self)) is not None:
            context.routing = routing
        return super().forward(input_ids, position_ids, attention_mask, **rest)

    @contextmanager
    def with_output(self, output: Output) -> Iterator[None]:
        """Return another output while the context is open."""
        before, self.output = self.output, output
        try:
            yield
        finally:
            self.output = before

    def _preprocess(self, input_ids, position_ids, inference_context=None, packed_seq_params=None, **rest):
        hidden, _, *others = super()._preprocess(input_ids, position_ids, inference_context=inference_context, **rest)
        if inference_context is not None:
            # mcore cuts the angles of the tokens at hand out of those of the whole cache.
            longest = inference_context.max_sequence_length
            position_ids = torch.arange(longest, device=position_ids.device).unsqueeze(0)
        elif packed_seq_params is None:
            position_ids = position_ids[:1]  # of every row the same
        if self.rotary_frequencies[0].device != position_ids.device:  # once: a copy waits for the device
            near, exact = self.rotary_frequencies
            self.rotary_frequencies = near.to(position_ids.device), exact.to(position_ids.device)
        return hidden, rotary_angles(position_ids, *self.rotary_frequencies), *others

    def _postprocess(self, hidden_states, *, labels, loss_mask=None, **rest):
        if labels is None or not self.post_process:
            return super()._postprocess(hidden_states=hidden_states, labels=labels, loss_mask=loss_mask, **rest)
        weight = self.output_layer.weight
        if self.share_embeddings_and_output_weights:
            weight = self.shared_embedding_or_output_weight()
        # [S, B, H] on every rank; the backward of either sums the ranks' shares of the gradient.
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden_states, group=self.tp_group)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden_states, group=self.tp_group)
        group = self.tp_group if self.tp_group.size() > 1 else None
        return self.output(hidden, weight, labels, loss_mask, group=group, vocab_size=self.true_vocab_size)


def transformer_config(
    model: Model,
    layout: Layout,
    *,
    dtype: torch.dtype,
    device: torch.device,
    recompute: str = "none",
    transformer_engine: bool = False,
    fused: bool = True,
    attention: str = "auto",
    more: Mapping[str, Any] | None = None,
    moe: Moe | None = None,
    capacity_factor: float | None = None,
) -> TransformerConfig:
    """Translate the `model` section and the layout into megatron-core's words.

    Args:
        dtype: of the parameters as the modules see them (FSDP passes float32 and casts on gathering).
        recompute: "none", "selective" (the MLP, or the experts) or "full" (every layer). Core attention is never
            computed again: its output and log-sum-exp are kept.
        fused: one kernel each for norms, SwiGLU and rotary positions.
        attention: "auto", "flash" or "cudnn".
        more: settings of megatron-core's own, those of FP8 for instance.
        moe: experts in place of each layer's feed-forward network.
        capacity_factor: `training.expert_capacity_factor`; None for a model that does not train.
    """
    cuda = device.type == "cuda"
    if fused:
        use_fused_positions()
    experts: dict[str, Any] = {}
    if moe is not None:
        experts = {
            "num_moe_experts": moe.num_experts,
            "moe_router_topk": moe.num_experts_per_tok,
            "moe_ffn_hidden_size": model.intermediate_size,
            "moe_shared_expert_intermediate_size": moe.shared_intermediate_size,
            "moe_token_dispatcher_type": moe.dispatcher,
            "moe_expert_capacity_factor": capacity_factor,
            "moe_pad_expert_input_to_capacity": moe.pad_to_capacity and capacity_factor is not None,
            "moe_grouped_gemm": transformer_engine,
            "expert_tensor_parallel_size": layout.expert_tensor,
            # Ours are in `router.py`; mcore refuses one expert a token unless it is told this.
            "moe_router_load_balancing_type": "none",
            "moe_router_pre_softmax": True,
        }
    recompute_settings: dict[str, Any] = {
        "none": {},
        "selective": {"recompute_granularity": "selective", "recompute_modules": ["moe" if moe else "mlp"]},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_heads,
        num_query_groups=model.num_kv_heads,
        kv_channels=model.head_size,
        ffn_hidden_size=model.intermediate_size,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Weights are set by `initialize`, by global name, so that every layout starts from the same model.
        perform_initialization=False,
        use_cpu_initialization=True,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        context_parallel_size=layout.context,
        cp_comm_type=layout.context_schedule,
        expert_model_parallel_size=layout.expert,
        sequence_parallel=layout.sequence_parallel,
        calculate_per_token_loss=True,
        # Interleaved stages: batched p2p mismatches two sends between the same two ranks, and freeing an output
        # while gloo still sends it gives wrong numbers without an error.
        overlap_p2p_comm=layout.virtual_pipeline > 1,
        batch_p2p_comm=layout.virtual_pipeline == 1,
        deallocate_pipeline_outputs=cuda,
        # Ours where the layers are; torch.compile's between Transformer Engine's, and for residuals.
        use_te_activation_func=fused and not transformer_engine,
        bias_activation_fusion=fused and transformer_engine,
        bias_dropout_fusion=fused and cuda,
        apply_rope_fusion=fused,
        attention_backend={"flash": AttnBackend.flash, "cudnn": AttnBackend.fused}.get(attention, AttnBackend.auto),
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        **recompute_settings[recompute],
        **experts,
        **(more or {}),
    )


def build_chunks(
    config: TransformerConfig,
    model: Model,
    *,
    transformer_engine: bool = False,
    moe: Moe | None = None,
    output: Output | None = None,
    fused: bool = True,
) -> list[CausalLM]:
    """Build this rank's pipeline chunks, as a rule without allocating their weights (torch's meta device).

    Args:
        output: what the last stage returns when labels are given; None: the summed loss.
        fused: as for `transformer_config`: one kernel each for norms and SwiGLU of local layers.
    """
    padded_vocab = math.ceil(model.vocab_size / config.tensor_model_parallel_size) * config.tensor_model_parallel_size
    num_stages = config.virtual_pipeline_model_parallel_size
    # Tied embeddings on two stages are compared while they are built, so they need memory then.
    where = "cpu" if model.tie_embeddings and config.pipeline_model_parallel_size > 1 else "meta"
    chunks = []
    for stage in range(num_stages) if num_stages else [None]:
        first, last = pipeline_ends(stage)
        with torch.device(where):
            chunk = CausalLM(
                config,
                block_spec(config, stage, transformer_engine, moe, fused=fused),
                vocab_size=padded_vocab,
                max_sequence_length=model.max_position,
                pre_process=first,
                post_process=last,
                share_embeddings_and_output_weights=model.tie_embeddings,
                position_embedding_type="none",  # ours, in `_preprocess`
                vp_stage=stage,
            )
        chunk.true_vocab_size, chunk.output = model.vocab_size, output or SummedLoss()
        chunk.rotary_frequencies = inverse_frequencies(model), inverse_frequencies(model, torch.float64)
        connect(chunk)
        chunks.append(chunk)
    return chunks


def inverse_frequencies(model: Model, dtype: torch.dtype = torch.float32) -> Tensor:
    """Radians per position of each pair of dimensions, [D/2] in `dtype` (Su et al. 2021, arXiv:2104.09864, eq. 15).

    With `rope_scaling`, Llama 3's stretch (Grattafiori et al. 2024, arXiv:2407.21783): long wavelengths slow down by
    `factor`, short ones stay, those between are blended.
    """
    dim = model.head_size
    frequencies = 1.0 / model.rope_theta ** (torch.arange(0, dim, 2, dtype=dtype, device="cpu") / dim)
    scaling = model.rope_scaling
    if scaling is None:
        return frequencies
    turns = scaling.original_max_position * frequencies / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


def rotary_angles(positions: Tensor, near: Tensor, exact: Tensor) -> Tensor:
    """Angles of positions, as mcore's attention turns queries and keys by them.

    In fp32 the product is off by up to 8e-3 radians at position 131072: it is taken in fp64, and whole turns are
    dropped before it is rounded. Angles below `NEAR_RADIANS` are rounded as everybody rounds them, which costs less
    than 3e-5: a short context is then turned as transformers turns it, to the last bit.

    Args:
        positions: [B, S] integers.
        near, exact: [D/2], radians per position, in fp32 and in fp64.

    Returns:
        [S, B, 1, D] fp32: the two halves of D are the same.
    """
    positions = positions.t().unsqueeze(-1)
    usual = positions.float() * near
    turned = torch.remainder(positions * exact, 2 * math.pi).float()
    angles = torch.where(usual < NEAR_RADIANS, usual, turned)
    return torch.cat((angles, angles), -1).unsqueeze(2)


def initialize(runs: Iterable[tuple[Shard, Tensor, int]], model: Model, seed: int) -> None:
    """Fill parameters, or their fp32 masters, with the recipe's initial weights, the same in every layout.

    Each weight is drawn as a whole from a generator seeded by its name, and a rank keeps its own part. Normal with
    `init_std`, the projections back into the residual stream divided by sqrt(2 * num_layers) (Radford et al. 2019,
    section 2.3), norms 1, biases of the routers 0.

    Args:
        runs: a parameter's place, what this rank holds of it (1-D), and where that starts (as `Shard.rectangles`).
    """
    for shard, values, start in runs:
        if len(shard.shape) == 1:
            values.fill_(0.0 if shard.name.endswith("expert_bias") else 1.0)
            continue
        values.zero_()  # rows that pad the vocabulary stay 0
        std = model.init_std
        if shard.name.endswith(("linear_proj.weight", "linear_fc2.weight")):
            std /= math.sqrt(2 * model.num_layers)
        whole = drawn(shard.name, shard.shape, std, seed, values.device)
        for offset, piece in shard.rectangles(values, start):
            piece.copy_(whole[tuple(slice(o, o + n) for o, n in zip(offset, piece.shape, strict=True))])


def drawn(name: str, shape: tuple[int, ...], std: float, seed: int, device: torch.device | str | None = None) -> Tensor:
    """Initial values of a whole weight, fp32: normal, from a generator seeded by its name."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    whole = torch.empty(shape, dtype=torch.float32, device=device)
    return whole.normal_(
        0.0, std, generator=torch.Generator(whole.device).manual_seed(int.from_bytes(digest, "big") >> 1)
    )


def materialize(chunks: Iterable[nn.Module], device: torch.device) -> None:
    """Give chunks built on the meta device memory for their weights (not yet their values), keeping their marks."""
    for chunk in chunks:
        for module in chunk.modules():
            for name, param in module.named_parameters(recurse=False):
                real = nn.Parameter(torch.empty_like(param, device=device), requires_grad=param.requires_grad)
                real.__dict__.update(param.__dict__)  # mcore's marks: sequence_parallel, shared_embedding, ...
                setattr(module, name, real)
