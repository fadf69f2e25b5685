"""What one rank holds for good: weights, gradients and optimizer state, to the byte.

The order of parameters, the padding of megatron-core's buffers and the rows that `fully_shard` gives a rank are those
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
"""Elements that a parameter's start is rounded up to in a buffer that is shared out (megatron-core 0.16.1)."""
NF4_BLOCK, NF4_NESTED_BLOCK, NF4_CODE_BYTES = 64, 256, 256 * 4 + 4
"""Weights that share a scale, scales that share a second one, and the table and mean that decode those."""


@dataclass(frozen=True)
class Parameter:
    """One tensor of one tensor-parallel (and expert-parallel) rank."""

    name: str
    shape: tuple[int, ...]
    trained: bool = True
    expert: bool = False
    """Its gradient is summed over the ranks that hold the same experts, not over all of them."""
    codes: tuple[int, ...] = ()
    """Elements of each projection stacked in it that are held in 4 bits; empty where it is held as it is."""
    shared: bool = False
    """A tied embedding, which has a bucket of its own in the gradient buffer."""

    @cached_property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Chunk:
    """Consecutive layers of one pipeline rank."""

    layers: int
    first: bool
    """Holds the embedding."""
    last: bool
    """Holds the final norm and the output projection."""


@dataclass(frozen=True)
class Held:
    """Bytes that one rank holds from the first step to the last."""

    weights: int
    gradients: int
    optimizer: int
    """fp32 main weights where they are not the weights themselves, and both moments."""
    memory: int
    """Fisher information and anchor of Elastic Weight Consolidation."""
    elements: int
    """Parameters of the rank's model chunks, padding of the vocabulary included."""
    trained: int
    """Of these, those that an optimizer updates somewhere."""
    updated: int
    """Of these, those that this rank's optimizer updates."""


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
    """Return a chunk's parameters in the order of its modules."""
    return _parameters(_kind(recipe, layout), chunk, layout.pipeline > 1)


def of_layer(recipe: Recipe, layout: Layout) -> tuple[Parameter, ...]:
    """Return the parameters of one layer."""
    return parameters_of(recipe, layout, Chunk(1, False, False))


def _kind(recipe: Recipe, layout: Layout) -> "_Kind":
    assert recipe.model is not None, "resolved before"
    return _Kind(
        recipe.model, recipe.moe, recipe.lora, recipe.quantization, layout.tensor, layout.expert, layout.expert_tensor
    )


@dataclass(frozen=True)
class _Kind:
    """All that the shapes of a rank's parameters depend on, beside its chunk."""

    model: Model
    moe: Moe | None
    lora: Lora | None
    quantization: Quantization | None
    tensor: int
    expert: int
    expert_tensor: int

    def replicas(self, parameter: Parameter, data_context: int) -> int:
        """Ranks that hold the same part of a parameter, of so many on the data and context axes."""
        shared = self.expert * self.expert_tensor
        return data_context * self.tensor // shared if parameter.expert else data_context


@lru_cache(maxsize=256)
def _parameters(kind: _Kind, chunk: Chunk, pipelined: bool) -> tuple[Parameter, ...]:
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
    """A frozen or trained projection and its adapters, as one tensor-parallel rank holds them."""
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
    """Elements of all parameters of one pipeline rank's chunks."""

    elements: int
    trained: int
    """Of these, those that are trained and no experts'."""
    expert: int
    """Those that are trained, and are of experts that not every rank has."""


def totals(recipe: Recipe, layout: Layout, stage: int) -> Totals:
    """Count the parameters of a rank of pipeline rank `stage`."""
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
    """Count what a rank of pipeline rank `stage` holds.

    Args:
        data_rank: its place among the data and context ranks; the last one's share may be smaller than the first's.
    """
    assert recipe.model is not None, "resolved before"
    where, memory = recipe.distributed, recipe.memory
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
            memory is not None and memory.ewc_lambda > 0,
            data_rank,
        ),
    )


@dataclass(frozen=True)
class _Spread:
    """How a rank shares its parameters with others, and what it keeps of each."""

    replicas: int
    pipeline: int
    stage: int
    sharded: bool
    distributed_optimizer: bool
    overlap: bool
    value_bytes: int
    holds_back: bool
    data_rank: int


@lru_cache(maxsize=256)
def _held(kind: _Kind, chunks: tuple[Chunk, ...], spread: _Spread) -> Held:
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
            # megatron-core cuts the buffer of the first stage's first chunk into buckets, to send them early.
            cut = spread.overlap and spread.stage == 0 and index == 0
            for expert in (False, True):
                own = [p for p in found if p.trained and p.expert == expert]
                ranks = kind.replicas(own[0], replicas) if own else 1
                size = max(40_000_000, 1_000_000 * replicas) if cut else None
                end, share = buffer(own, ranks, size, shared_out=shared_out, rank=spread.data_rank % ranks)
                padded, updated = padded + end, updated + share
        weights += value * (padded if shared_out else sum(parameter.elements for parameter in trained))
        gradients = 4 * padded
        moments = (8 if value == 4 else 12) * updated
    return Held(
        weights,
        gradients,
        moments,
        8 * updated if spread.holds_back else 0,
        sum(parameter.elements for parameter in every),
        sum(parameter.elements for parameter in trained),
        updated,
    )


def _coded_bytes(quantization: Quantization, parameter: Parameter) -> int:
    total = 0
    for elements in parameter.codes:
        blocks = -(-elements // NF4_BLOCK)
        nested = blocks + 4 * -(-blocks // NF4_NESTED_BLOCK) + NF4_CODE_BYTES
        total += elements * quantization.bits // 8 + (nested if quantization.double_quant else 4 * blocks)
    return total


def rows_of_rank(parameter: Parameter, ranks: int, rank: int) -> int:
    """Elements that `fully_shard` leaves to a rank: as many rows for each but the last ones."""
    rows, columns = parameter.shape[0], math.prod(parameter.shape[1:])
    each = -(-rows // ranks)
    return max(0, min(each, rows - rank * each)) * columns


def buffer(
    parameters: Sequence[Parameter], ranks: int, bucket_elements: int | None, *, shared_out: bool, rank: int
) -> tuple[int, int]:
    """Lay parameters out as megatron-core's gradient buffer does.

    Args:
        bucket_elements: a bucket ends once it holds so many; None: one bucket.
        shared_out: each rank updates its equal part of each bucket.

    Returns:
        Elements of the buffer, and elements of parameters that `rank` updates.
    """
    if not shared_out:
        elements = sum(parameter.elements for parameter in parameters)
        return elements, elements
    unit = math.lcm(ranks, 128)
    updated = at = begin = 0
    runs: list[tuple[int, int]] = []

    def close(end: int) -> int:
        nonlocal updated, begin
        end = -(-end // unit) * unit
        each = (end - begin) // ranks
        low, high = begin + rank * each, begin + (rank + 1) * each
        updated += sum(max(0, min(high, stop) - max(low, start)) for start, stop in runs)
        runs.clear()
        begin = end
        return end

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
