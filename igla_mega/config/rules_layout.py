"""Rules about `distributed:`: sizes of the model, batch and world that must divide, and supported combinations."""

import math
from collections.abc import Iterator

from igla_mega.config.near import near_divisors, near_multiples
from igla_mega.config.schema import Recipe

_OTHER_LENGTHS = ("needle", "tasks", "prompts")
"""Keys of `evaluation:` that run the model on lengths other than that of training."""
NF4_BLOCK = 64
"""Weights that share a scale, consecutive in a row."""


def tensor_parallel_divides_model(recipe: Recipe) -> Iterator[str]:
    """Require that the tensor parallel size divides the heads, the feed-forward width and the vocabulary."""
    tensor, model = recipe.distributed.tensor_parallel, recipe.model
    if tensor == "auto" or model is None:
        return
    for key in ("num_heads", "num_kv_heads", "intermediate_size", "vocab_size"):
        size = getattr(model, key)
        if size % tensor:
            yield (
                f"distributed.tensor_parallel: {tensor} does not divide model.{key} {size}. "
                f"Use {near_divisors(size, tensor)}, or set {key} to {near_multiples(tensor, size)}."
            )


def quantized_blocks_stay_on_a_rank(recipe: Recipe) -> Iterator[str]:
    """Require that no block of quantized weights spans two tensor-parallel ranks."""
    tensor, model = recipe.distributed.tensor_parallel, recipe.model
    if recipe.quantization is None or model is None or tensor == "auto" or tensor == 1:
        return
    inputs = {"o_proj": model.num_heads * model.head_size, "down_proj": model.intermediate_size}
    outputs = {"k_proj": model.num_kv_heads * model.head_size, "up_proj": model.intermediate_size}
    runs = {name: size // tensor for name, size in inputs.items()}
    runs |= {name: size // tensor * model.hidden_size for name, size in outputs.items()}
    for name, run in runs.items():
        if run % NF4_BLOCK:
            yield (
                f"distributed.tensor_parallel: {tensor} leaves {run} weights of {name} on a rank, not a multiple of "
                f"NF4's {NF4_BLOCK}. Use fewer tensor-parallel ranks, or leave `quantization` out."
            )


def pipeline_divides_layers(recipe: Recipe) -> Iterator[str]:
    """Require that pipeline stages and their chunks divide the layers, and no chunks without stages."""
    pipeline, chunks = recipe.distributed.pipeline_parallel, recipe.distributed.virtual_pipeline
    chunks = 1 if chunks == "auto" else chunks
    if chunks > 1 and pipeline in ("auto", 1):
        yield (
            f"distributed.virtual_pipeline: {chunks} needs distributed.pipeline_parallel above 1, not {pipeline}. "
            "Use virtual_pipeline 1, or pipeline_parallel 2."
        )
    if pipeline == "auto" or recipe.model is None or recipe.model.num_layers % (pipeline * chunks) == 0:
        return
    layers = recipe.model.num_layers
    split = f"{pipeline}" if chunks == 1 else f"{pipeline} x virtual_pipeline {chunks} = {pipeline * chunks}"
    yield (
        f"distributed.pipeline_parallel: {split} does not divide model.num_layers {layers}. "
        f"Use {near_divisors(layers, pipeline * chunks)} in all, or {near_multiples(pipeline * chunks, layers)} layers."
    )


def sequence_divides_among_ranks(recipe: Recipe) -> Iterator[str]:
    """Require that context-parallel and sequence-parallel ranks divide the sequence."""
    where, length = recipe.distributed, recipe.sequence_length
    if length is None:
        return
    context, tensor = where.context_parallel, where.tensor_parallel
    if context == "auto" and not (recipe.koshey is not None and recipe.koshey.ring_attention):
        context = 1
    # Zig-zag gives each rank two chunks, one from each end, to balance the causal mask: hence the factor of 2.
    if context != "auto" and context > 1 and length % (2 * context):
        if not where.pad_sequences:
            yield (
                f"distributed.context_parallel: {context} does not fit the sequence of {length} tokens: zig-zag needs "
                f"a multiple of {2 * context}. Set training.sequence_length to {near_multiples(2 * context, length)}, "
                "or distributed.pad_sequences=true."
            )
        length += -length % (2 * context)
    if where.sequence_parallel is not True or tensor == "auto" or context == "auto" or length // context % tensor == 0:
        return
    unit = math.lcm(2 * context, tensor * context) if context > 1 else tensor
    split = f", {length // context} on each of {context} context-parallel ranks" if context > 1 else ""
    yield (
        f"distributed.sequence_parallel: tensor_parallel {tensor} does not divide the sequence of {length} tokens"
        f"{split}. Set training.sequence_length to {near_multiples(unit, length)}."
    )


def heads_divide_among_context_ranks(recipe: Recipe) -> Iterator[str]:
    """Require that a2a can distribute the key-value heads evenly over the context-parallel ranks."""
    where, model = recipe.distributed, recipe.model
    context, tensor = where.context_parallel, where.tensor_parallel
    if where.context_schedule != "a2a" or model is None or context == "auto" or tensor == "auto":
        return
    if (heads := model.num_kv_heads // tensor) % context:
        yield (
            f"distributed.context_schedule: a2a distributes key-value heads over {context} context-parallel ranks, "
            f"which does not divide {heads} (num_kv_heads {model.num_kv_heads} / tensor_parallel {tensor}). "
            f"Use p2p or auto, or context_parallel {near_divisors(heads, context)}."
        )


def fsdp_is_proved(recipe: Recipe) -> Iterator[str]:
    """Refuse FSDP with pipeline stages, a combination without a test that it trains exactly."""
    where = recipe.distributed
    if where.strategy != "FSDP":
        return
    size = where.pipeline_parallel
    if size not in ("auto", 1):
        yield (
            f"distributed.strategy: FSDP with pipeline_parallel {size} is not verified to train exactly, so it "
            "is refused. Use strategy DDP (which also shards the optimizer state), or pipeline_parallel 1."
        )


def fp8_has_its_kernels(recipe: Recipe) -> Iterator[str]:
    """Require Transformer Engine layers, verified features and sizes that 8-bit products accept, for FP8."""
    where, model = recipe.distributed, recipe.model
    if where.precision != "FP8":
        return
    if where.kernels not in ("auto", "te"):
        yield (
            f"distributed.precision: FP8 needs Transformer Engine, but distributed.kernels is {where.kernels}. "
            "Use kernels te or auto, or precision BF16."
        )
    if where.strategy == "FSDP":
        yield "distributed.precision: FP8 with strategy FSDP is not verified. Use strategy DDP, or precision BF16."
    if recipe.moe is not None:
        yield "distributed.precision: FP8 with `moe:`, whose experts get varying numbers of tokens. Use precision BF16."
    if recipe.lora is not None:
        yield "distributed.precision: FP8 with `lora:`, which does not use Transformer Engine. Use precision BF16."
    if model is None:
        return
    # 8-bit matrix products need dimensions that are multiples of 16; MXFP8 has one scale per 32 values.
    unit = 32 if where.fp8_recipe == "mxfp8" else 16
    tensor = 1 if where.tensor_parallel == "auto" else where.tensor_parallel
    sizes = {
        "model.hidden_size": model.hidden_size,
        "model.intermediate_size": model.intermediate_size,
        "training.sequence_length": recipe.sequence_length or unit,
    }
    for key, size in sizes.items():
        split = 1 if key == "training.sequence_length" else tensor
        if size % (unit * split):
            by = f" x distributed.tensor_parallel {split}" if split > 1 else ""
            yield (
                f"{key}: {size} is not a multiple of {unit}{by}, which distributed.fp8_recipe {where.fp8_recipe} "
                f"needs. Use {near_multiples(unit * split, size)}, or precision BF16."
            )


def layers_can_be_recorded(recipe: Recipe) -> Iterator[str]:
    """Refuse CUDA graphs with features whose shapes, addresses or communication change between steps."""
    where = recipe.distributed
    if not where.cuda_graphs:
        return
    sizes = {key: getattr(where, key) for key in ("pipeline_parallel", "context_parallel")}
    lengths = {phase.sequence_length for phase in recipe.curriculum.phases} if recipe.curriculum else set()
    obstacles = {
        "strategy FSDP": where.strategy == "FSDP",
        "gradient_checkpointing full": where.gradient_checkpointing == "full",
        **{f"{key} {size}": size not in ("auto", 1) for key, size in sizes.items()},
        "`moe:`, whose tokens per expert are counted on the host": recipe.moe is not None,
        "`lora:`": recipe.lora is not None,
        "`dpo:`": recipe.dpo is not None,
        "packed documents": recipe.data.document_mask or (recipe.form == "instructions" and recipe.data.packing),
        "phases of several sequence lengths": len(lengths) > 1,
        "the Fisher pass, which takes one row at a time": recipe.memory is not None,
        **{f"evaluation.{key}, which uses other lengths": getattr(recipe.evaluation, key) for key in _OTHER_LENGTHS},
    }
    for what in (what for what, present in obstacles.items() if present):
        yield f"distributed.cuda_graphs: true with {what}: layers cannot be recorded. Set cuda_graphs=false."


def world_fits_layout(recipe: Recipe, world_size: int) -> Iterator[str]:
    """Require that the fixed sizes of the layout divide the world size."""
    where = recipe.distributed
    sizes = {
        key: size
        for key in ("tensor_parallel", "pipeline_parallel", "context_parallel")
        if (size := getattr(where, key)) != "auto"
    }
    product = 1
    for size in sizes.values():
        product *= size
    if world_size % product:
        terms = " x ".join(f"{key} {size}" for key, size in sizes.items() if size > 1)
        yield (
            f"distributed: {terms} = {product} ranks does not divide the world of {world_size}. "
            f"Start {near_multiples(product, world_size)} ranks, or use {near_divisors(world_size, product)} in all."
        )


def device_has_kernels(recipe: Recipe, device: str) -> Iterator[str]:
    """Refuse FP8 and DeepEP on a CPU."""
    if recipe.distributed.precision == "FP8" and device == "cpu":
        yield "distributed.precision: FP8 needs an Ada, Hopper or newer GPU. Use BF16 or FP32 on a CPU."
    if recipe.moe is not None and recipe.moe.dispatcher == "flex" and device == "cpu":
        yield "moe.dispatcher: flex uses DeepEP, which needs GPUs with NVLink or InfiniBand. Use alltoall or allgather."
