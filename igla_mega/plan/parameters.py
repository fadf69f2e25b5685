"""Persistent memory of one rank: weights, gradients and optimizer state, to the byte.

The order of parameters, the padding of the buffers of megatron-core and the rows per rank of `fully_shard` equal those
of the engine; `tests/plan/test_parameters.py` compares them with engines built for ranks of 256 and 4096.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from igla_mega.config.features import Lora, Moe, Quantization
from igla_mega.config.schema import Model, Recipe
from igla_mega.layout.layout import Layout

ALIGNED = 64
"""Alignment of the start of a parameter in a sharded buffer, in elements (megatron-core 0.16.1)."""
NF4_BLOCK, NF4_NESTED_BLOCK, NF4_CODE_BYTES = 64, 256, 256 * 4 + 4
"""Weights per scale, scales per second-level scale, and bytes of the table and mean that decode the scales."""


@dataclass(frozen=True)
class Parameter:
    """One tensor on one tensor-parallel (and expert-parallel) rank."""

    name: str
    shape: tuple[int, ...]
    trained: bool = True
    expert: bool = False
    """True if its gradient is reduced only over the ranks with the same experts."""
    codes: tuple[int, ...] = ()
    """Number of elements of each stacked projection in 4 bits; empty if it is not quantized."""
    shared: bool = False
    """True for a tied embedding between pipeline stages, which has its own bucket in the gradient buffer."""

    @cached_property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Chunk:
    """Consecutive layers on one pipeline rank."""

    layers: int
    first: bool
    """True if it includes the embedding."""
    last: bool
    """True if it includes the final norm and the output projection."""


@dataclass(frozen=True)
class Held:
    """Persistent memory of one rank, in bytes unless stated otherwise."""

    weights: int
    gradients: int
    optimizer: int
    """Both moments, and fp32 main weights unless the weights themselves are fp32."""
    memory: int
    """Fisher information and anchor of Elastic Weight Consolidation."""
    elements: int
    """Number of parameters of the model chunks of the rank, including padding of the vocabulary."""
    trained: int
    """Number of these that are trained."""
    updated: int
    """Number of these that the optimizer of this rank updates."""


def chunks_of(layout: Layout, num_layers: int, stage: int) -> list[Chunk]:
    """Return the chunks of pipeline rank `stage`, first to last."""
    pieces = layout.pipeline * layout.virtual_pipeline
    return [
        Chunk(
            num_layers // pieces,
            stage == 0 and index == 0,
            stage == layout.pipeline - 1 and index == layout.virtual_pipeline - 1,
        )
        for index in range(layout.virtual_pipeline)
    ]


def parameters_of(recipe: Recipe, layout: Layout, chunk: Chunk) -> tuple[Parameter, ...]:
    """Return the parameters of a chunk in the order of its modules."""
    return _parameters(_kind(recipe, layout), chunk, layout.pipeline > 1)


def of_layer(recipe: Recipe, layout: Layout) -> tuple[Parameter, ...]:
    """Return the parameters of one layer."""
    return parameters_of(recipe, layout, Chunk(1, False, False))


def _kind(recipe: Recipe, layout: Layout) -> "_Kind":
    """Return the part of recipe and layout that determines shapes, as a key for caches."""
    assert recipe.model is not None, "resolved before"
    return _Kind(
        recipe.model, recipe.moe, recipe.lora, recipe.quantization, layout.tensor, layout.expert, layout.expert_tensor
    )


@dataclass(frozen=True)
class _Kind:
    """Inputs that, with the chunk, determine the shapes of the parameters of a rank."""

    model: Model
    moe: Moe | None
    lora: Lora | None
    quantization: Quantization | None
    tensor: int
    expert: int
    expert_tensor: int

    def replicas(self, parameter: Parameter, data_context: int) -> int:
        """Return the number of ranks with the same part of a parameter.

        Args:
            data_context: number of ranks of the data and context axes.
        """
        shared = self.expert * self.expert_tensor
        return data_context * self.tensor // shared if parameter.expert else data_context


@lru_cache(maxsize=256)
def _parameters(kind: _Kind, chunk: Chunk, pipelined: bool) -> tuple[Parameter, ...]:
    """Return the parameters of a chunk; `pipelined` if the model has several pipeline stages."""
    model, trained = kind.model, kind.lora is None
    vocabulary = (math.ceil(model.vocab_size / kind.tensor), model.hidden_size)
    tied = model.tie_embeddings
    shared = tied and pipelined
    found: list[Parameter] = []
    if chunk.first:
        found.append(Parameter("embedding", vocabulary, trained, shared=shared))
    found += list(_layer(kind)) * chunk.layers
    if chunk.last:
        found.append(Parameter("final_norm", (model.hidden_size,), trained))
        if not tied or (shared and not chunk.first):
            found.append(Parameter("output", vocabulary, trained, shared=shared))
    return tuple(found)


def _layer(kind: _Kind) -> Iterator[Parameter]:
    """Yield the parameters of one layer in the order of megatron-core modules."""
    model, moe, tensor = kind.model, kind.moe, kind.tensor
    hidden, size, width, trained = model.hidden_size, model.head_size, model.intermediate_size, kind.lora is None
    heads, kv_heads = model.num_heads * size // tensor, model.num_kv_heads * size // tensor
    yield Parameter("norm", (hidden,), trained)
    yield from _linear(kind, "proj", heads, {"o_proj": hidden})
    yield from _linear(kind, "qkv", hidden, {"q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads})
    yield Parameter("norm", (hidden,), trained)
    if moe is None:
        yield from _linear(kind, "fc1", hidden, {"gate_proj": width // tensor, "up_proj": width // tensor})
        yield from _linear(kind, "fc2", width // tensor, {"down_proj": hidden})
        return
    yield Parameter("router", (moe.num_experts, hidden), trained)
    for _ in range(moe.num_experts // kind.expert):
        own = width // kind.expert_tensor
        yield from _linear(kind, "expert_fc1", hidden, {"gate_proj": own, "up_proj": own}, expert=True)
        yield from _linear(kind, "expert_fc2", own, {"down_proj": hidden}, expert=True)
    if moe.shared_intermediate_size:
        own = moe.shared_intermediate_size // tensor
        yield from _linear(kind, "shared_fc1", hidden, {"gate_proj": own, "up_proj": own})
        yield from _linear(kind, "shared_fc2", own, {"down_proj": hidden})


def _linear(
    kind: _Kind, name: str, inputs: int, projections: dict[str, int], *, expert: bool = False
) -> Iterator[Parameter]:
    """Yield the weight of a projection and of its adapters on one tensor-parallel rank."""
    lora = kind.lora
    codes = tuple(rows * inputs for rows in projections.values()) if kind.quantization is not None else ()
    yield Parameter(name, (sum(projections.values()), inputs), lora is None, expert=expert, codes=codes)
    for target, rows in projections.items():
        if lora is not None and target in lora.target_modules:
            yield Parameter(f"{name}.lora_A", (lora.rank, inputs), expert=expert)
            yield Parameter(f"{name}.lora_B", (rows, lora.rank), expert=expert)
            if lora.use_dora:
                yield Parameter(f"{name}.lora_magnitude", (rows,), expert=expert)


@dataclass(frozen=True)
class Totals:
    """Number of elements of all parameters on one pipeline rank."""

    elements: int
    trained: int
    """Number of trained elements outside experts."""
    expert: int
    """Number of trained elements of experts."""


def totals(recipe: Recipe, layout: Layout, stage: int) -> Totals:
    """Return the number of parameters of a rank of pipeline stage `stage`."""
    assert recipe.model is not None, "resolved before"
    chunks = tuple(chunks_of(layout, recipe.model.num_layers, stage))
    return _totals(_kind(recipe, layout), chunks, layout.pipeline > 1)


@lru_cache(maxsize=256)
def _totals(kind: _Kind, chunks: tuple[Chunk, ...], pipelined: bool) -> Totals:
    every = [parameter for chunk in chunks for parameter in _parameters(kind, chunk, pipelined)]
    trained = [parameter for parameter in every if parameter.trained]
    expert = sum(parameter.elements for parameter in trained if parameter.expert)
    elements = sum(parameter.elements for parameter in every)
    return Totals(elements, sum(parameter.elements for parameter in trained) - expert, expert)


def held(recipe: Recipe, layout: Layout, stage: int, *, device: str = "cuda", data_rank: int = 0) -> Held:
    """Return the persistent memory of a rank of pipeline stage `stage`.

    Args:
        data_rank: index among the data and context ranks; the shard of the last one may be smaller than the others.
    """
    assert recipe.model is not None, "resolved before"
    where = recipe.distributed
    return _held(
        _kind(recipe, layout),
        tuple(chunks_of(layout, recipe.model.num_layers, stage)),
        _Spread(
            layout.data * layout.context,
            layout.pipeline,
            stage,
            layout.strategy == "FSDP",
            layout.distributed_optimizer,
            where.overlap_communication and device == "cuda",
            4 if where.precision == "FP32" else 2,
            recipe.uses_ewc,
            data_rank,
        ),
    )


@dataclass(frozen=True)
class _Spread:
    """Sharding of the parameters of a rank, as a key for caches."""

    replicas: int
    pipeline: int
    stage: int
    sharded: bool
    distributed_optimizer: bool
    overlap: bool
    value_bytes: int
    uses_ewc: bool
    data_rank: int


@lru_cache(maxsize=256)
def _held(kind: _Kind, chunks: tuple[Chunk, ...], spread: _Spread) -> Held:
    """Return the persistent memory for hashable inputs, so that layouts of equal shapes share a result."""
    lists = [_parameters(kind, chunk, spread.pipeline > 1) for chunk in chunks]
    every = [parameter for found in lists for parameter in found]
    trained = [parameter for parameter in every if parameter.trained]
    coded = [parameter for parameter in every if parameter.codes]
    plain = [parameter for parameter in every if not parameter.codes]
    replicas, value = spread.replicas, spread.value_bytes
    weights = sum(_coded_bytes(kind.quantization, parameter) for parameter in coded if kind.quantization is not None)
    if spread.sharded:
        rows = {p: rows_of_rank(p, n := kind.replicas(p, replicas), spread.data_rank % n) for p in {*plain, *trained}}
        weights += sum(4 * rows[parameter] for parameter in plain)
        updated = sum(rows[parameter] for parameter in trained)
        gradients, moments = 4 * updated, 8 * updated
    else:
        shared_out = spread.distributed_optimizer and replicas > 1
        weights += value * sum(parameter.elements for parameter in plain if not parameter.trained)
        padded = updated = 0
        for index, found in enumerate(lists):
            # megatron-core splits the buffer into buckets that are reduced early only in the first chunk of stage 0.
            cut = spread.overlap and spread.stage == 0 and index == 0
            for expert in (False, True):
                own = [p for p in found if p.trained and p.expert == expert]
                ranks = kind.replicas(own[0], replicas) if own else 1
                # Bucket size of megatron-core: 40M elements, or 1M per rank if that is more.
                size = max(40_000_000, 1_000_000 * replicas) if cut else None
                end, share = buffer(own, ranks, size, shared_out=shared_out, rank=spread.data_rank % ranks)
                padded, updated = padded + end, updated + share
        weights += value * (padded if shared_out else sum(parameter.elements for parameter in trained))
        gradients = 4 * padded
        # Two fp32 moments; and fp32 main weights unless the weights are fp32.
        moments = (8 if value == 4 else 12) * updated
    return Held(
        weights,
        gradients,
        moments,
        8 * updated if spread.uses_ewc else 0,
        sum(parameter.elements for parameter in every),
        sum(parameter.elements for parameter in trained),
        updated,
    )


def _coded_bytes(quantization: Quantization, parameter: Parameter) -> int:
    """Return the bytes of a quantized weight with its scales."""
    total = 0
    for elements in parameter.codes:
        blocks = -(-elements // NF4_BLOCK)
        nested = blocks + 4 * -(-blocks // NF4_NESTED_BLOCK) + NF4_CODE_BYTES
        total += elements * quantization.bits // 8 + (nested if quantization.double_quant else 4 * blocks)
    return total


def rows_of_rank(parameter: Parameter, ranks: int, rank: int) -> int:
    """Return the number of elements in the shard of a rank; `fully_shard` gives equal rows to all but the last
    ranks."""
    rows, columns = parameter.shape[0], math.prod(parameter.shape[1:])
    each = -(-rows // ranks)
    return max(0, min(each, rows - rank * each)) * columns


def buffer(
    parameters: Sequence[Parameter], ranks: int, bucket_elements: int | None, *, shared_out: bool, rank: int
) -> tuple[int, int]:
    """Return the size of a gradient buffer as megatron-core lays it out.

    Args:
        bucket_elements: minimum number of elements of a bucket; None: one bucket.
        shared_out: True if each rank updates an equal part of each bucket.

    Returns:
        Number of elements of the buffer, and number of elements of parameters that `rank` updates.
    """
    if not shared_out:
        elements = sum(parameter.elements for parameter in parameters)
        return elements, elements
    # Buckets have equal parts per rank and start at 256-byte addresses: 128 values of 2 bytes (megatron-core 0.16.1,
    # param_and_grad_buffer.py).
    unit = math.lcm(ranks, 128)
    updated = at = begin = 0
    runs: list[tuple[int, int]] = []

    def close(end: int) -> int:
        """Pad the open bucket, count what `rank` updates of it, and return its end."""
        nonlocal updated, begin
        end = -(-end // unit) * unit
        each = (end - begin) // ranks
        low, high = begin + rank * each, begin + (rank + 1) * each
        updated += sum(max(0, min(high, stop) - max(low, start)) for start, stop in runs)
        runs.clear()
        begin = end
        return end

    # Reversed: gradients of the last layers are ready first.
    for parameter in reversed(parameters):
        start = -(-at // ALIGNED) * ALIGNED
        if parameter.shared and runs:
            start = close(start)
        at = start + parameter.elements
        runs.append((start, at))
        if parameter.shared or (bucket_elements is not None and at - begin >= bucket_elements):
            at = close(at)
    if runs:
        at = close(at)
    return at, updated
