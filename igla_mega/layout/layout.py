"""Layout of a model and its batch over ranks, with plain defaults for every `auto` of `distributed:`."""

import math
from dataclasses import dataclass, field
from typing import Literal

from igla_mega.config import rules
from igla_mega.config.errors import ConfigError
from igla_mega.config.near import near_divisors, near_multiples
from igla_mega.config.schema import Recipe

# Tokens per micro-batch: about what fits the caches of a CPU core, and what occupies the multiprocessors of a GPU.
MICRO_BATCH_TOKENS = {"cpu": 2048, "cuda": 4096}
# Tokens of one sequence per GPU: with 80 GB, recomputation and a 7B model, twice as many do not fit.
CONTEXT_TOKENS = 16384
# NVLink joins 8 GPUs in DGX and HGX machines; context and expert groups stay within them.
GPUS_OF_A_NODE = 8


@dataclass(frozen=True)
class Layout:
    """Layout of ranks: tensor x pipeline x context x data = world size.

    Sizes are numbers of ranks unless stated otherwise. Samples are sequences, or pairs of sequences for preference
    optimization.
    """

    tensor: int
    pipeline: int
    virtual_pipeline: int
    """Number of model chunks per pipeline rank."""
    context: int
    expert: int
    """Number of ranks of the tensor, context and data axes that the experts of a layer are distributed over."""
    data: int
    sequence_parallel: bool
    strategy: Literal["FSDP", "DDP"]
    distributed_optimizer: bool
    micro_batch_size: int
    """Samples per micro-batch of a data-parallel rank."""
    num_microbatches: int
    """Micro-batches per step and data-parallel rank."""
    global_batch: int
    """Samples per step over all ranks."""
    sequence_length: int
    """Tokens per row, before padding."""
    recompute: str = "none"
    """Activations recomputed in the backward pass: none, selective or full."""
    rows_per_sample: int = 1
    """Sequences per sample: 2 for preference pairs, else 1."""
    context_schedule: str = "auto"
    notes: tuple[str, ...] = field(default=())
    """Decisions to report to the user, one sentence each."""
    expert_tensor: int = 1
    """Number of ranks that the matrices of each expert are split over."""

    @property
    def padded_length(self) -> int:
        """Tokens per row after padding to a multiple of 2 x context, which the zig-zag split requires."""
        return self.sequence_length + (-self.sequence_length % (2 * self.context) if self.context > 1 else 0)

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data


def describe(layout: Layout) -> str:
    """Return the strategy and the sizes above 1 as text: `DDP tensor 2 x data 32, experts over 8`."""
    sizes = {
        "tensor": layout.tensor,
        "pipeline": layout.pipeline,
        "context": layout.context,
        "data": layout.data,
    }
    split = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "on one rank"
    extra = [f"experts over {layout.expert}"] if layout.expert > 1 else []
    extra += [f"virtual pipeline {layout.virtual_pipeline}"] if layout.virtual_pipeline > 1 else []
    return ", ".join([f"{layout.strategy} {split}", *extra])


def lay_out(recipe: Recipe, world_size: int, device: str) -> Layout:
    """Return the layout of a recipe on `world_size` ranks, with plain defaults for every `auto`.

    On GPUs the ranks that are left go to the data axis. `plan.choose.choose_layout` searches for a faster layout.

    Args:
        device: `cpu` or `cuda`.

    Raises:
        ConfigError: the recipe breaks a rule, or the model, the batch and the world size do not fit.
    """
    rules.check(recipe, world_size, device)
    if recipe.stages is not None:
        raise ConfigError("stages: each stage has its own layout. Choose the layout of one stage.")
    if (length := recipe.sequence_length) is None:
        raise ConfigError(
            f"training.sequence_length: not given, and base_model {recipe.base_model} is not loaded to set it. Give it."
        )
    where, notes = recipe.distributed, []
    pipeline = _number(where.pipeline_parallel, otherwise=1)
    context = _number(where.context_parallel, otherwise=0) or _choose_context(recipe, length, world_size, device)
    free = world_size // (pipeline * context)
    tensor = _number(where.tensor_parallel, otherwise=0) or _choose_tensor(recipe, free, length // context, device)
    data = free // tensor
    if recipe.koshey is not None and recipe.koshey.ring_attention and context == 1:
        notes.append(f"koshey.ring_attention: one context-parallel rank of {world_size} in all; nothing is split.")
    sequence_parallel = _choose_sequence_parallel(recipe, length // context, tensor, device)
    if where.sequence_parallel is True and not sequence_parallel:
        notes.append("sequence_parallel: disabled, since there is only one tensor-parallel rank.")
    # The rules skip sizes that are `auto`, so check again with the chosen ones.
    chosen = {"tensor_parallel": tensor, "context_parallel": context, "sequence_parallel": sequence_parallel}
    rules.check(recipe.with_keys({f"distributed.{key}": one for key, one in chosen.items()}), world_size, device)
    strategy = where.strategy
    if strategy == "FSDP" and data * context == 1:
        strategy = "DDP"
        notes.append(
            f"strategy: FSDP has only one data-parallel rank to shard over ({world_size} in all, tensor_parallel "
            f"{tensor}, pipeline_parallel {pipeline}); DDP is used, which is equivalent there."
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


def _choose_sequence_parallel(recipe: Recipe, tokens: int, tensor: int, device: str) -> bool:
    """Return True if tensor-parallel ranks split the `tokens` of a context-parallel rank's sequence among them."""
    given = recipe.distributed.sequence_parallel
    if given != "auto":
        return given and tensor > 1
    # With experts on a CPU too: tensor ranks that hold the same tokens would each send them to the experts.
    useful = device == "cuda" or recipe.moe is not None
    return useful and tensor > 1 and tokens % tensor == 0


def _rows_per_sample(recipe: Recipe) -> int:
    return 2 if recipe.form == "preference_pairs" else 1


def _number(size: int | Literal["auto"], otherwise: int) -> int:
    return otherwise if size == "auto" else size


def _choose_context(recipe: Recipe, length: int, world_size: int, device: str) -> int:
    """Return the context parallel size: 1 without ring attention, else enough ranks for the activations of a sequence.

    Each GPU takes up to `CONTEXT_TOKENS`, within one node, whose GPUs are joined by NVLink. On a CPU, which serves to
    demonstrate a layout, all free ranks are used.
    """
    where = recipe.distributed
    if recipe.koshey is None or not recipe.koshey.ring_attention:
        return 1
    free = world_size // (_number(where.tensor_parallel, otherwise=1) * _number(where.pipeline_parallel, otherwise=1))
    needed = free if device == "cpu" else min(GPUS_OF_A_NODE, -(-length // CONTEXT_TOKENS))
    splits = [
        n for n in range(1, free + 1) if free % n == 0 and (n == 1 or length % (2 * n) == 0 or where.pad_sequences)
    ]
    return min((n for n in splits if n >= needed), default=max(splits))


def _choose_tensor(recipe: Recipe, ranks: int, tokens: int, device: str) -> int:
    """Return the tensor parallel size: the largest that divides the model on a CPU, 1 on a GPU."""
    model = recipe.model
    if device == "cuda" or model is None or recipe.moe is not None:
        return 1  # with experts, the ranks are used for expert parallelism
    splits = math.gcd(model.num_heads, model.num_kv_heads, model.intermediate_size, model.vocab_size)
    if recipe.distributed.sequence_parallel is True:
        splits = math.gcd(splits, tokens)
    return math.gcd(splits, ranks)


def _choose_expert(recipe: Recipe, peers: int, data: int) -> int:
    """Return the expert parallel size: by default at most a node, since tokens are exchanged in every layer.

    Args:
        peers: number of ranks of the tensor and context axes together.

    Raises:
        ConfigError: the configured sizes do not divide the ranks.
    """
    size, split = recipe.distributed.expert_parallel, recipe.distributed.expert_tensor_parallel
    ranks = peers * data
    if ranks % split:
        raise ConfigError(
            f"distributed.expert_tensor_parallel: {split} does not divide the {ranks} ranks of the tensor, context and "
            f"data axes. Use {near_divisors(ranks, split)}."
        )
    if size != "auto":
        if ranks % (size * split):
            axes = "data-parallel ranks" if peers == 1 else "ranks of the tensor, context and data axes"
            also = f" x expert_tensor_parallel {split}" if split > 1 else ""
            raise ConfigError(
                f"distributed.expert_parallel: {size}{also} does not divide the {ranks} {axes}. "
                f"Use {near_divisors(ranks // split, size)}."
            )
        return size
    # FSDP with expert parallelism and EWC is not verified; see `rules_experts.experts_fit_the_rest`.
    if recipe.moe is None or (recipe.uses_ewc and recipe.distributed.strategy == "FSDP"):
        return 1
    shared = math.gcd(recipe.moe.num_experts, ranks // split)
    return max(size for size in range(1, min(shared, GPUS_OF_A_NODE) + 1) if shared % size == 0)


def _batch(recipe: Recipe, length: int, data: int, pipeline: int, context: int, device: str) -> tuple[int, int]:
    """Return the number of samples of the global batch and of a micro-batch.

    Raises:
        ConfigError: the batch does not divide into data-parallel ranks and micro-batches.
    """
    training, written = recipe.training, recipe.training.batch_size
    if training.batch_tokens is not None:
        global_batch = training.batch_tokens // (length * _rows_per_sample(recipe))
    elif training.gradient_accumulation is not None:
        global_batch = int(written) * training.gradient_accumulation * data
    else:
        global_batch = int(written)
    if global_batch % data:
        raise ConfigError(
            f"training.batch_size: {written} = {global_batch} sequences, not divisible by {data} data-parallel "
            f"ranks. Use {near_multiples(data, global_batch)} sequences, or {near_divisors(global_batch, data)} ranks."
        )
    per_rank = global_batch // data
    size = recipe.distributed.micro_batch_size
    if size != "auto" and per_rank % size:
        raise ConfigError(
            f"distributed.micro_batch_size: {size} does not divide the {per_rank} sequences of a data-parallel rank "
            f"(batch {global_batch} / {data} ranks). Use {near_divisors(per_rank, size)}."
        )
    # The interleaved schedule of megatron-core needs a multiple of the pipeline size as number of micro-batches.
    interleaved = _number(recipe.distributed.virtual_pipeline, otherwise=1) > 1
    if interleaved and per_rank % pipeline:
        raise ConfigError(
            f"training.batch_size: {written} gives each data-parallel rank {per_rank} sequences, not divisible by "
            f"pipeline_parallel {pipeline}, which virtual_pipeline requires. "
            f"Use {near_multiples(pipeline * data, global_batch)} sequences in all, or virtual_pipeline 1."
        )
    if size == "auto":
        groups = pipeline if interleaved else 1
        return global_batch, _choose_micro_batch(recipe, per_rank, groups, length // context, device)
    if interleaved and per_rank // size % pipeline:
        raise ConfigError(
            f"distributed.micro_batch_size: {size} gives {per_rank // size} micro-batches, not divisible by "
            f"pipeline_parallel {pipeline}, which virtual_pipeline requires. "
            f"Use {near_divisors(per_rank // pipeline, size)}, or virtual_pipeline 1."
        )
    return global_batch, size


def _choose_micro_batch(recipe: Recipe, per_rank: int, groups: int, length: int, device: str) -> int:
    """Return the largest micro-batch within `MICRO_BATCH_TOKENS` that gives a multiple of `groups` micro-batches."""
    training = recipe.training
    if training.gradient_accumulation is not None and training.gradient_accumulation % groups == 0:
        return per_rank // training.gradient_accumulation
    largest = max(1, MICRO_BATCH_TOKENS[device] // (length * _rows_per_sample(recipe)))
    return max(size for size in range(1, largest + 1) if per_rank % (size * groups) == 0)
