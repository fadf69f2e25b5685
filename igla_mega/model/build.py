"""Build this rank's chunks of a megatron-core GPTModel from the recipe's `model` section, and initialize their weights.

Shapes: B rows, S tokens, H hidden size, D head size.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
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
"""Rotary angles below this are rounded to fp32 directly; larger ones are reduced by whole turns first."""


class CausalLM(GPTModel):
    """GPTModel with rotary angles for any positions, and an output that never holds the logits of all tokens."""

    true_vocab_size: int
    """Size of the vocabulary without the rows that pad it to a multiple of the tensor-parallel size."""
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
        """Run this chunk on one micro-batch; `input_ids` and `position_ids` are [B, S].

        Args:
            attention_mask: None; attention is causal.
            dropout_seed: see `MicroBatch.dropout_seed`.
            routing: row weights and padding mask for the routers of this chunk.
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
        """Embed tokens, and compute rotary angles from `position_ids`, [B, S]; overrides a step of GPTModel.forward."""
        hidden, _, *others = super()._preprocess(input_ids, position_ids, inference_context=inference_context, **rest)
        if inference_context is not None:
            # mcore slices the angles of the current tokens out of those of the whole cache.
            longest = inference_context.max_sequence_length
            position_ids = torch.arange(longest, device=position_ids.device).unsqueeze(0)  # [1, cache length]
        elif packed_seq_params is None:
            position_ids = position_ids[:1]  # [1, S]: all rows have the same positions, so the angles broadcast
        # The chunk may have been built on the meta device. Copied once only: each copy waits for the device.
        if self.rotary_frequencies[0].device != position_ids.device:
            near, exact = self.rotary_frequencies
            self.rotary_frequencies = near.to(position_ids.device), exact.to(position_ids.device)
        return hidden, rotary_angles(position_ids, *self.rotary_frequencies), *others

    def _postprocess(self, hidden_states, *, labels, loss_mask=None, **rest):
        """Return `self.output` of the last stage's hidden states, [S, B, H]; overrides the end of GPTModel.forward."""
        if labels is None or not self.post_process:
            return super()._postprocess(hidden_states=hidden_states, labels=labels, loss_mask=loss_mask, **rest)
        weight = self.output_layer.weight
        if self.share_embeddings_and_output_weights:
            weight = self.shared_embedding_or_output_weight()
        # [S, B, H] on every rank. Either function sums the gradient over the tensor-parallel ranks in its backward
        # pass: each computes that of its own rows of the vocabulary.
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden_states, group=self.tp_group)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden_states, group=self.tp_group)
        group = self.tp_group if self.tp_group.size() > 1 else None
        return self.output(hidden, weight, labels, loss_mask, group=group, vocab_size=self.true_vocab_size)


@dataclass(frozen=True)
class Execution:
    """How the layers of a model are computed, independent of its shape and layout."""

    dtype: torch.dtype
    """Dtype of the parameters as the modules see them: FSDP passes float32, and casts when it gathers them."""
    device: torch.device
    recompute: str = "none"
    """`none`, `selective` (the MLP, or the experts) or `full` (every layer)."""
    transformer_engine: bool = False
    """True to build Transformer Engine's modules in place of our own."""
    fused: bool = True
    """True to compute norms, SwiGLU and rotary positions in one kernel each."""
    attention: str = "auto"
    """`auto`, `flash` or `cudnn`."""
    capacity_factor: float | None = None
    """`training.expert_capacity_factor`; None for a model that does not train."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """Further settings of megatron-core's TransformerConfig, for example those of FP8."""


def transformer_config(model: Model, layout: Layout, how: Execution, moe: Moe | None = None) -> TransformerConfig:
    """Translate the `model` section, the layout and the execution into megatron-core's TransformerConfig.

    Args:
        moe: experts in place of each layer's feed-forward network.
    """
    if how.fused:
        use_fused_positions()
    return TransformerConfig(
        **_model_settings(model),
        **_layout_settings(layout),
        **_kernel_settings(how),
        **_recompute_settings(how.recompute, experts=moe is not None),
        **(_expert_settings(model, moe, layout, how) if moe is not None else {}),
        # Weights are set by `initialize`, by their names in the whole model, so that every layout starts from the same
        # model; mcore's own initialization depends on the rank.
        perform_initialization=False,
        use_cpu_initialization=True,
        # The loss function then returns a sum and a count, and mcore divides gradients by the number of targets of the
        # global batch: exact for rows of different lengths, and for any number of ranks and micro-batches.
        calculate_per_token_loss=True,
        **how.more,
    )


def _model_settings(model: Model) -> dict[str, Any]:
    """Return the settings that describe a Llama layer: pre-norm, grouped queries, SwiGLU, no biases, no dropout."""
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_heads,
        "num_query_groups": model.num_kv_heads,
        # Else hidden_size / num_heads, which some models do not keep.
        "kv_channels": model.head_size,
        "ffn_hidden_size": model.intermediate_size,
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.norm_epsilon,
        # SwiGLU: SiLU of the gate, times the other half of the first projection.
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        # mcore's default is 0.1 for both.
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }


def _layout_settings(layout: Layout) -> dict[str, Any]:
    """Return the settings that split a model over ranks."""
    return {
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        # A size of 1 would select the interleaved schedule, with several chunks expected.
        "virtual_pipeline_model_parallel_size": layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        "context_parallel_size": layout.context,
        "cp_comm_type": layout.context_schedule,
        "expert_model_parallel_size": layout.expert,
        "sequence_parallel": layout.sequence_parallel,
        # Interleaved stages: batched p2p mismatches two sends between the same two ranks, so each is sent by itself.
        "overlap_p2p_comm": layout.virtual_pipeline > 1,
        "batch_p2p_comm": layout.virtual_pipeline == 1,
    }


def _kernel_settings(how: Execution) -> dict[str, Any]:
    """Return the settings that choose dtypes and kernels."""
    cuda = how.device.type == "cuda"
    backends = {"flash": AttnBackend.flash, "cudnn": AttnBackend.fused}
    return {
        "params_dtype": how.dtype,
        # Dtype of the activations that pipeline stages send: receivers allocate by it.
        "pipeline_dtype": how.dtype,
        "bf16": how.dtype == torch.bfloat16,
        # gloo may still send an output when it would be freed: wrong numbers, without an error.
        "deallocate_pipeline_outputs": cuda,
        # Despite its name: use the activation module of the layer spec. Ours is in it unless Transformer Engine's
        # layers are; those take torch.compile's fusion below.
        "use_te_activation_func": how.fused and not how.transformer_engine,
        "bias_activation_fusion": how.fused and how.transformer_engine,
        # torch.compile's, for the addition of the residual; disabled on a CPU, where `host` turns the compiler off.
        "bias_dropout_fusion": how.fused and cuda,
        # Calls our kernel, which `use_fused_positions` puts in the place of mcore's.
        "apply_rope_fusion": how.fused,
        "attention_backend": backends.get(how.attention, AttnBackend.auto),
        # Attention is in `spec.CoreAttention`, the norm in `spec.RMSNorm`: mcore's own fusions apply to neither.
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        # Needs APEX's kernel; `ops.accumulate` is ours for the output layer.
        "gradient_accumulation_fusion": False,
    }


def _recompute_settings(recompute: str, *, experts: bool) -> dict[str, Any]:
    """Return the settings of what is recomputed in the backward pass.

    Core attention never is, in any mode: `spec.CoreAttention` keeps its output and log-sum-exp. Selective is the MLP,
    whose activations are the largest of a layer for the least work.
    """
    settings: dict[str, Any] = {
        "none": {},
        "selective": {"recompute_granularity": "selective", "recompute_modules": ["moe" if experts else "mlp"]},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }
    return settings[recompute]


def _expert_settings(model: Model, moe: Moe, layout: Layout, how: Execution) -> dict[str, Any]:
    """Return the settings of a mixture of experts."""
    return {
        "num_moe_experts": moe.num_experts,
        "moe_router_topk": moe.num_experts_per_tok,
        "moe_ffn_hidden_size": model.intermediate_size,
        "moe_shared_expert_intermediate_size": moe.shared_intermediate_size,
        "moe_token_dispatcher_type": moe.dispatcher,
        "moe_expert_capacity_factor": how.capacity_factor,
        # mcore refuses padding without a capacity.
        "moe_pad_expert_input_to_capacity": moe.pad_to_capacity and how.capacity_factor is not None,
        "moe_grouped_gemm": how.transformer_engine,
        "expert_tensor_parallel_size": layout.expert_tensor,
        # Choice and balancing are in `router.py`. mcore, which then only moves tokens, refuses one expert per token
        # unless `moe_router_pre_softmax` is set.
        "moe_router_load_balancing_type": "none",
        "moe_router_pre_softmax": True,
    }


def build_chunks(
    config: TransformerConfig,
    model: Model,
    *,
    transformer_engine: bool = False,
    moe: Moe | None = None,
    output: Output | None = None,
    fused: bool = True,
) -> list[CausalLM]:
    """Build this rank's pipeline chunks, normally without memory for their weights (torch's meta device).

    Args:
        output: computes what the last stage returns when labels are given; None for the summed loss.
        fused: as for `transformer_config`: one kernel each for the norms and SwiGLU of local layers.
    """
    # Each tensor-parallel rank holds the same number of rows.
    padded_vocab = math.ceil(model.vocab_size / config.tensor_model_parallel_size) * config.tensor_model_parallel_size
    num_stages = config.virtual_pipeline_model_parallel_size
    # mcore's constructor all-reduces embeddings that the first and last stage share, so they need memory by then.
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
                # mcore would compute angles from 0 to S - 1; `_preprocess` takes any positions.
                position_embedding_type="none",
                vp_stage=stage,
            )
        chunk.true_vocab_size, chunk.output = model.vocab_size, output or SummedLoss()
        chunk.rotary_frequencies = inverse_frequencies(model), inverse_frequencies(model, torch.float64)
        connect(chunk)
        chunks.append(chunk)
    return chunks


def inverse_frequencies(model: Model, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the radians per position of each pair of dimensions, [D/2] in `dtype`.

    Su et al. 2021, arXiv:2104.09864, eq. 15. With `rope_scaling`, as Llama 3 (Grattafiori et al. 2024,
    arXiv:2407.21783): long wavelengths are divided by `factor`, short ones are kept, those between are blended.
    """
    # Explicitly on the CPU: the default device may be meta here.
    dim = model.head_size
    frequencies = 1.0 / model.rope_theta ** (torch.arange(0, dim, 2, dtype=dtype, device="cpu") / dim)
    scaling = model.rope_scaling
    if scaling is None:
        return frequencies
    # Whole turns within the original context: many for a short wavelength, less than one for a long one.
    turns = scaling.original_max_position * frequencies / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


def rotary_angles(positions: Tensor, near: Tensor, exact: Tensor) -> Tensor:
    """Return the angles by which megatron-core's attention rotates queries and keys at the given positions.

    In fp32 the product is off by up to 8e-3 radians at position 131072: it is computed in fp64, and whole turns are
    dropped before it is rounded. Angles below `NEAR_RADIANS` are computed in fp32 as is usual, with an error below
    3e-5: in a short context they equal those of transformers to the last bit.

    Args:
        positions: [B, S] integers.
        near, exact: [D/2], radians per position, in fp32 and in fp64.

    Returns:
        [S, B, 1, D] fp32; the two halves of D are the same.
    """
    positions = positions.t().unsqueeze(-1)  # [S, B, 1]
    usual = positions.float() * near  # [S, B, D/2]
    turned = torch.remainder(positions * exact, 2 * math.pi).float()
    angles = torch.where(usual < NEAR_RADIANS, usual, turned)
    return torch.cat((angles, angles), -1).unsqueeze(2)  # [S, B, 1, D]


def initialize(runs: Iterable[tuple[Shard, Tensor, int]], model: Model, seed: int) -> None:
    """Fill parameters, or their fp32 masters, with the recipe's initial weights, the same in every layout.

    Each weight is drawn as a whole from a generator seeded by its name, and a rank keeps its part. Weights are normal
    with standard deviation `init_std`, divided by sqrt(2 * num_layers) for projections back into the residual stream
    (Radford et al. 2019, section 2.3); norms are 1, biases of the routers 0.

    Args:
        runs: for each parameter its shard, the values that this rank holds of it (1-D), and the offset at which they
            start (as for `Shard.rectangles`).
    """
    for shard, values, start in runs:
        if len(shard.shape) == 1:  # a norm, or a bias of a router; a Llama has no other vectors
            values.fill_(0.0 if shard.name.endswith("expert_bias") else 1.0)
            continue
        # The rows that pad the vocabulary are in no rectangle, and stay 0.
        values.zero_()
        std = model.init_std
        if shard.name.endswith(("linear_proj.weight", "linear_fc2.weight")):
            std /= math.sqrt(2 * model.num_layers)
        whole = drawn(shard.name, shard.shape, std, seed, values.device)
        for offset, piece in shard.rectangles(values, start):
            piece.copy_(whole[tuple(slice(o, o + n) for o, n in zip(offset, piece.shape, strict=True))])


def drawn(name: str, shape: tuple[int, ...], std: float, seed: int, device: torch.device | str | None = None) -> Tensor:
    """Return the initial values of a whole weight, fp32, from a generator seeded by `seed` and the weight's name."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    whole = torch.empty(shape, dtype=torch.float32, device=device)
    return whole.normal_(
        0.0, std, generator=torch.Generator(whole.device).manual_seed(int.from_bytes(digest, "big") >> 1)
    )


def materialize(chunks: Iterable[nn.Module], device: torch.device) -> None:
    """Allocate the weights of chunks built on the meta device, without setting their values."""
    for chunk in chunks:
        for module in chunk.modules():
            for name, param in module.named_parameters(recurse=False):
                real = nn.Parameter(torch.empty_like(param, device=device), requires_grad=param.requires_grad)
                # mcore marks parameters by attributes: sequence_parallel, shared_embedding, ...
                real.__dict__.update(param.__dict__)
                setattr(module, name, real)
