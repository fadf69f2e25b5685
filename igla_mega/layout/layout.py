"""Where a recipe's model and batch lie in a world of ranks; every `auto` of `distributed:` is decided here."""

import math
from dataclasses import dataclass, field
from typing import Literal

from igla_mega.config import rules
from igla_mega.config.errors import ConfigError
from igla_mega.config.near import near_divisors, near_multiples
from igla_mega.config.schema import Recipe

# Tokens of a micro-batch that keep a core's caches, or a GPU's multiprocessors, busy.
MICRO_BATCH_TOKENS = {"cpu": 2048, "cuda": 4096}
# Tokens of one sequence on a GPU: with 80 GB, recompute and a 7B model, twice as many do not fit.
CONTEXT_TOKENS, GPUS_OF_A_NODE = 16384, 8


@dataclass(frozen=True)
class Layout:
    """A layout of ranks: tensor x pipeline x context x data = world size. All sizes are numbers of ranks but for:

    expert x expert_tensor: of the tensor, context and data axes' ranks those that together hold a layer's experts;
    virtual_pipeline: model chunks a pipeline rank; micro_batch_size, global_batch: samples, which are sequences, or
    pairs of them (rows_per_sample 2); num_microbatches: a step and data-parallel rank; sequence_length: tokens;
    recompute: what the backward pass computes again; notes: decisions to say aloud.
    """

    tensor: int
    pipeline: int
    virtual_pipeline: int
    context: int
    expert: int
    data: int
    sequence_parallel: bool
    strategy: Literal["FSDP", "DDP"]
    distributed_optimizer: bool
    micro_batch_size: int
    num_microbatches: int
    global_batch: int
    sequence_length: int
    recompute: str = "none"
    rows_per_sample: int = 1
    context_schedule: str = "auto"
    notes: tuple[str, ...] = field(default=())
    expert_tensor: int = 1

    @property
    def padded_length(self) -> int:
        """Tokens of a sequence as it is split over the context-parallel ranks."""
        return self.sequence_length + (-self.sequence_length % (2 * self.context) if self.context > 1 else 0)

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data


def lay_out(recipe: Recipe, world_size: int, device: str) -> Layout:
    """As `choose_layout`, with the plainest choice for what is left open: GPUs get data parallelism.

    Raises:
        ConfigError: as there.
    """
    rules.check(recipe, world_size, device)
    if recipe.stages is not None:
        raise ConfigError("stages: each stage has a layout of its own. Choose it for one stage.")
    length = recipe.sequence_length
    if length is None:
        raise ConfigError(
            f"training.sequence_length: not given, and {recipe.base_model} is not loaded to tell its longest. Set it."
        )
    where, notes = recipe.distributed, []
    pipeline = _number(where.pipeline_parallel, otherwise=1)
    context = _number(where.context_parallel, otherwise=0) or _choose_context(recipe, length, world_size, device)
    free = world_size // (pipeline * context)
    tensor = _number(where.tensor_parallel, otherwise=0) or _choose_tensor(recipe, free, length // context, device)
    data = free // tensor
    if recipe.koshey is not None and recipe.koshey.ring_attention and context == 1:
        notes.append(f"koshey.ring_attention: one context-parallel rank of {world_size} in all; nothing is split.")

    sequence_parallel = where.sequence_parallel
    if sequence_parallel == "auto":
        # Ranks that share a token would each send it to its experts.
        wanted = device == "cuda" or recipe.moe is not None
        sequence_parallel = wanted and tensor > 1 and length // context % tensor == 0
    elif sequence_parallel and tensor == 1:
        sequence_parallel = False
        notes.append("sequence_parallel: one tensor-parallel rank has no peers to split the sequence with; it is off.")
    chosen = {"tensor_parallel": tensor, "context_parallel": context, "sequence_parallel": sequence_parallel}
    rules.check(recipe.model_copy(update={"distributed": where.model_copy(update=chosen)}), world_size, device)

    strategy = where.strategy
    if strategy == "FSDP" and data * context == 1:
        strategy = "DDP"
        notes.append(
            f"strategy: FSDP has one data-parallel rank to shard over ({world_size} in all, tensor_parallel {tensor}, "
            f"pipeline_parallel {pipeline}); it runs as DDP, which is the same there."
        )

    global_batch, micro_batch_size = _batch(recipe, length, data, pipeline, context, device)
    return Layout(
        tensor=tensor,
        pipeline=pipeline,
        virtual_pipeline=_number(where.virtual_pipeline, otherwise=1),
        context=context,
        context_schedule=where.context_schedule,
        expert=_choose_expert(recipe, tensor * context, data),
        expert_tensor=where.expert_tensor_parallel,
        data=data,
        sequence_parallel=sequence_parallel,
        strategy=strategy,
        distributed_optimizer=where.distributed_optimizer,
        micro_batch_size=micro_batch_size,
        num_microbatches=global_batch // (data * micro_batch_size),
        global_batch=global_batch,
        sequence_length=length,
        rows_per_sample=_rows_per_sample(recipe),
        recompute=where.gradient_checkpointing or "none",
        notes=(*notes, *rules.warnings(recipe)),
    )


def _rows_per_sample(recipe: Recipe) -> int:
    return 2 if recipe.form == "preference_pairs" else 1


def _number(size: int | Literal["auto"], otherwise: int) -> int:
    return otherwise if size == "auto" else size


def _choose_context(recipe: Recipe, length: int, world_size: int, device: str) -> int:
    """Return 1 unless ring attention is asked for; then ranks enough to hold the sequence's activations.

    A GPU takes `CONTEXT_TOKENS` of a sequence, on at most a node's GPUs, which NVLink joins; on a CPU, where the point
    is to see it work, every rank that is free takes part.
    """
    where = recipe.distributed
    if recipe.koshey is None or not recipe.koshey.ring_attention:
        return 1
    free = world_size // (_number(where.tensor_parallel, otherwise=1) * _number(where.pipeline_parallel, otherwise=1))
    wanted = free if device == "cpu" else min(GPUS_OF_A_NODE, -(-length // CONTEXT_TOKENS))
    splits = [
        n for n in range(1, free + 1) if free % n == 0 and (n == 1 or length % (2 * n) == 0 or where.pad_sequences)
    ]
    return min((n for n in splits if n >= wanted), default=max(splits))


def _choose_tensor(recipe: Recipe, ranks: int, tokens: int, device: str) -> int:
    model = recipe.model
    if device == "cuda" or model is None or recipe.moe is not None:
        return 1  # experts are what the ranks share
    splits = math.gcd(model.num_heads, model.num_kv_heads, model.intermediate_size, model.vocab_size)
    if recipe.distributed.sequence_parallel is True:
        splits = math.gcd(splits, tokens)
    return math.gcd(splits, ranks)


def _choose_expert(recipe: Recipe, peers: int, data: int) -> int:
    """Return the ranks that share the experts; by choice as many as a node has, for their tokens cross in every layer.

    Args:
        peers: ranks of the tensor and context axes together.
    """
    wanted, split = recipe.distributed.expert_parallel, recipe.distributed.expert_tensor_parallel
    ranks = peers * data
    if ranks % split:
        raise ConfigError(
            f"distributed.expert_tensor_parallel: {split} does not divide the {ranks} ranks of the tensor, context and "
            f"data axes. Use {near_divisors(ranks, split)}."
        )
    if wanted != "auto":
        if ranks % (wanted * split):
            axes = "data-parallel ranks" if peers == 1 else "ranks of the tensor, context and data axes"
            also = f" x expert_tensor_parallel {split}" if split > 1 else ""
            raise ConfigError(
                f"distributed.expert_parallel: {wanted}{also} does not divide the {ranks} {axes}. "
                f"Use {near_divisors(ranks // split, wanted)}."
            )
        return wanted
    ewc = recipe.memory is not None and recipe.memory.ewc_lambda > 0
    if recipe.moe is None or (ewc and recipe.distributed.strategy == "FSDP"):
        return 1
    shared = math.gcd(recipe.moe.num_experts, ranks // split)
    return max(size for size in range(1, min(shared, GPUS_OF_A_NODE) + 1) if shared % size == 0)


def _batch(recipe: Recipe, length: int, data: int, pipeline: int, context: int, device: str) -> tuple[int, int]:
    """Return the sequences of the global batch and of a micro-batch."""
    training, written = recipe.training, recipe.training.batch_size
    if training.batch_tokens is not None:
        global_batch = training.batch_tokens // (length * _rows_per_sample(recipe))
    elif training.gradient_accumulation is not None:
        global_batch = int(written) * training.gradient_accumulation * data
    else:
        global_batch = int(written)
    if global_batch % data:
        raise ConfigError(
            f"training.batch_size: {written} = {global_batch} sequences does not divide among {data} data-parallel "
            f"ranks. Use {near_multiples(data, global_batch)} sequences, or {near_divisors(global_batch, data)} ranks."
        )
    per_rank = global_batch // data
    wanted = recipe.distributed.micro_batch_size
    if wanted != "auto" and per_rank % wanted:
        raise ConfigError(
            f"distributed.micro_batch_size: {wanted} does not divide the {per_rank} sequences of a data-parallel rank "
            f"(batch {global_batch} / {data} ranks). Use {near_divisors(per_rank, wanted)}."
        )
    interleaved = _number(recipe.distributed.virtual_pipeline, otherwise=1) > 1
    if interleaved and per_rank % pipeline:
        raise ConfigError(
            f"training.batch_size: {written} leaves {per_rank} sequences to a data-parallel rank, which "
            f"pipeline_parallel {pipeline} does not divide, as virtual_pipeline asks. "
            f"Use {near_multiples(pipeline * data, global_batch)} sequences in all, or virtual_pipeline 1."
        )
    if wanted == "auto":
        groups = pipeline if interleaved else 1
        return global_batch, _choose_micro_batch(recipe, per_rank, groups, length // context, device)
    if interleaved and per_rank // wanted % pipeline:
        raise ConfigError(
            f"distributed.micro_batch_size: {wanted} makes {per_rank // wanted} micro-batches, which pipeline_parallel "
            f"{pipeline} does not divide, as virtual_pipeline asks. "
            f"Use {near_divisors(per_rank // pipeline, wanted)}, or virtual_pipeline 1."
        )
    return global_batch, wanted


def _choose_micro_batch(recipe: Recipe, per_rank: int, groups: int, length: int, device: str) -> int:
    """Return the largest micro-batch within the device's budget that leaves a multiple of `groups` micro-batches."""
    training = recipe.training
    if training.gradient_accumulation is not None and training.gradient_accumulation % groups == 0:
        return per_rank // training.gradient_accumulation
    most = max(1, MICRO_BATCH_TOKENS[device] // (length * _rows_per_sample(recipe)))
    return max(size for size in range(1, most + 1) if per_rank % (size * groups) == 0)
