"""The most that a rank holds for a while within a step: what autograd keeps, and what is in work beside it.

A layer is a list of ops, each with what it keeps for its backward pass and what that pass makes; a step is played
through them in the engine's order, and the largest sum is the peak. Against the allocator's own peak of real steps on
CPU this is held to 5 % (`tests/plan/test_activations.py`, `tools/bench/memory.py`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from igla_mega.config.schema import Recipe
from igla_mega.plan.layout import Layout
from igla_mega.plan.parameters import Chunk, chunks_of, held, parameters_of

LOSS_CHUNK_TOKENS = {"cpu": 256, "cuda": 4096}
"""Tokens whose logits are held at once, as `ops.linear_cross_entropy` has it."""
BATCH_BYTES = 28
"""Of one token of a batch: three int64 and one fp32."""


@dataclass(frozen=True)
class Op:
    """One op of a layer on one rank, in bytes."""

    name: str
    kept: int
    """From its forward pass to its backward pass."""
    given: int
    """The gradient that its backward pass is given."""
    made: int
    """The gradients of activations that its backward pass makes."""
    extra: int = 0
    """What else that pass needs: the gradient of its weight, copies."""
    beside: int = 0
    """The gradient of the residual stream that waits meanwhile."""


@dataclass(frozen=True)
class Peak:
    """Bytes of one rank at the moment of a step when they are most, by what they are for."""

    moment: str
    kept: int
    """Activations that wait for their backward pass."""
    working: int = 0
    """What the op at hand makes and reads, its gradients included."""
    loss: int = 0
    """Logits of a chunk, gradients of the output projection and of its input."""
    unsharded: int = 0
    """Weights gathered and gradients not yet scattered (FSDP)."""
    communication: int = 0
    """Buffers of gathering along the sequence, and what ring attention sends and receives."""
    gradients: int = 0
    """This rank's shards of the gradients that are there by then (FSDP makes them within the step)."""

    @property
    def total(self) -> int:
        return self.kept + self.working + self.loss + self.unsharded + self.communication + self.gradients


@dataclass(frozen=True)
class _Rank:
    """A rank's sizes: tokens, and bytes of the tensors that every op speaks of."""

    recipe: Recipe
    layout: Layout
    device: str

    @property
    def model(self):
        assert self.recipe.model is not None, "resolved before"
        return self.recipe.model

    @property
    def value(self) -> int:
        return 4 if self.recipe.distributed.precision == "FP32" else 2

    @property
    def tokens(self) -> int:
        """Of a micro-batch, all of the tensor-parallel group's."""
        rows = self.layout.micro_batch_size * self.layout.rows_per_sample
        return rows * self.layout.padded_length // self.layout.context

    @property
    def own_tokens(self) -> int:
        return self.tokens // self.layout.tensor if self.layout.sequence_parallel else self.tokens

    @property
    def x(self) -> int:
        """The residual stream."""
        return self.own_tokens * self.model.hidden_size * self.value

    @property
    def full(self) -> int:
        """The residual stream of all tokens of the tensor-parallel group."""
        return self.tokens * self.model.hidden_size * self.value

    @property
    def q(self) -> int:
        return self.tokens * self.model.num_heads * self.model.head_size // self.layout.tensor * self.value

    @property
    def k(self) -> int:
        return self.tokens * self.model.num_kv_heads * self.model.head_size // self.layout.tensor * self.value

    @property
    def f(self) -> int:
        """One half of what the feed-forward network's first projection makes."""
        return self.tokens * self.model.intermediate_size // self.layout.tensor * self.value

    def gradient(self, name: str) -> int:
        """The largest gradient of a trained weight of this name, before it is added to what gathers it."""
        found = parameters_of(self.recipe, self.layout, Chunk(1, True, True))
        return max((p.elements * self.value for p in found if p.trained and p.name == name), default=0)

    def adapted(self, *projections: str) -> int:
        """How many of these have an adapter."""
        lora = self.recipe.lora
        return len(set(projections) & set(lora.target_modules)) if lora is not None else 0

    def input_kept(self, size: int, *projections: str) -> int:
        """What a projection keeps of an input of `size` bytes that it is the only one to keep, and its adapters."""
        lora = self.recipe.lora
        if lora is None:
            return size
        if not (count := self.adapted(*projections)):
            return 0
        narrow = 2 * count * self.tokens * lora.rank * self.value
        # Dropout makes another input, and keeps its mask of one byte a value.
        return narrow + (size + size // self.value if lora.dropout else size)


def layer_ops(recipe: Recipe, layout: Layout, device: str) -> list[Op]:
    """Return the ops of one layer, in the order of its forward pass."""
    r = _Rank(recipe, layout, device)
    return [*_attention_ops(r), *(_network_ops(r) if recipe.moe is None else _expert_ops(r))]


def _norm(r: _Rank, name: str) -> Op:
    wide, scale = 4 * r.own_tokens * r.model.hidden_size, 4 * r.own_tokens
    if r.device == "cuda":
        return Op(name, r.x + scale, r.x, r.x, beside=r.x)
    # On a CPU torch takes it apart: the input (in fp32) and the normalised one are kept.
    return Op(name, 2 * wide + scale, r.x, wide, extra=2 * wide, beside=r.x)


def _attention_ops(r: _Rank) -> Iterator[Op]:
    lse = 4 * r.tokens * r.model.num_heads // r.layout.tensor
    angles = 4 * (r.layout.padded_length // r.layout.context) * r.model.head_size * r.value
    stacked = r.q + 2 * r.k
    yield _norm(r, "norm")
    kept = r.input_kept(r.x, "q_proj", "k_proj", "v_proj")
    yield Op("qkv", kept, stacked, r.full, r.gradient("qkv"), beside=r.x)
    yield Op("rotary", angles, stacked, stacked, r.q, beside=r.x)
    # The values are a view of the stacked projections' output, which stays for their sake.
    own_values = r.k if r.layout.context > 1 else 0
    # Ring attention sums the gradients of its blocks in fp32.
    sums = 4 * stacked // r.value if r.layout.context > 1 else 0
    yield Op("attention", r.q + r.k + stacked + own_values + r.q + lse, r.q, stacked, sums, beside=r.x)
    adapters = r.input_kept(r.q, "o_proj") - (r.q if r.recipe.lora is None or r.adapted("o_proj") else 0)
    yield Op("proj", adapters, r.x, r.q, r.gradient("proj"))


def _network_ops(r: _Rank) -> Iterator[Op]:
    yield _norm(r, "norm")
    yield Op("fc1", r.input_kept(r.x, "gate_proj", "up_proj"), 2 * r.f, r.full, r.gradient("fc1"), beside=r.x)
    product = r.input_kept(r.f, "down_proj")
    yield Op("swiglu", 2 * r.f + (2 * r.f if r.device == "cpu" else 0), r.f, 2 * r.f, beside=r.x)
    yield Op("fc2", product, r.x, r.f, r.gradient("fc2"))


def _expert_ops(r: _Rank) -> Iterator[Op]:
    moe = r.recipe.moe
    assert moe is not None
    # Of the experts' own tokens each rank works on as many as it sent, when they are balanced.
    sent = moe.num_experts_per_tok * r.x
    f = moe.num_experts_per_tok * r.own_tokens * r.model.intermediate_size * r.value
    scores = 3 * 4 * r.own_tokens * moe.num_experts
    yield _norm(r, "norm")
    # Sorted by expert before they are sent and after they have come: each order keeps its places, not its tokens.
    places = 2 * 8 * moe.num_experts_per_tok * r.own_tokens
    yield Op("router", r.x + scores + places, sent, r.x, sent, beside=r.x)
    yield Op("expert_fc1", sent, 2 * f, sent, r.gradient("expert_fc1"), beside=r.x)
    yield Op("swiglu", 2 * f + (2 * f if r.device == "cpu" else 0), f, 2 * f, beside=r.x)
    # Its output is kept for the gradient of the probabilities that it is weighted with.
    yield Op("expert_fc2", f + sent, sent, f, r.gradient("expert_fc2") + sent, beside=r.x)


_SCATTERED = "last gradients scattered"
_NETWORK = {"fc1", "fc2", "swiglu", "router", "expert_fc1", "expert_fc2"}


def kept_by_layer(recipe: Recipe, layout: Layout, device: str) -> int:
    """Bytes that a layer keeps from its forward pass to its backward pass, as `layout.recompute` says."""
    r, ops = _Rank(recipe, layout, device), layer_ops(recipe, layout, device)
    if layout.recompute == "full":
        # Ring attention's result is kept, and not computed again.
        ring = r.q + 4 * r.tokens * r.model.num_heads // layout.tensor if layout.context > 1 else 0
        return r.x + ring
    if layout.recompute == "selective":
        return sum(op.kept for op in ops if op.name not in _NETWORK) + r.x
    return sum(op.kept for op in ops)


def peak(recipe: Recipe, layout: Layout, stage: int, device: str) -> Peak:
    """Play a step of pipeline rank `stage` through and return its largest moment."""
    moments = _moments(recipe, layout, stage, device)
    if layout.strategy == "FSDP":
        shards = held(recipe, layout, stage, device=device).gradients
        late = ("embedding, backward", _SCATTERED)
        # From the second micro-batch on all shards are there; within the first one only at its end.
        moments = (
            replace(m, gradients=shards if layout.num_microbatches > 1 or m.moment in late else 0) for m in moments
        )
    return max(moments, key=lambda moment: moment.total)


def in_flight(layout: Layout, stage: int) -> float:
    """Micro-batches (of a chunk, with virtual stages) whose activations pipeline rank `stage` holds at once."""
    chunks = layout.virtual_pipeline
    total = layout.num_microbatches * chunks
    if layout.pipeline == 1:
        return 1
    if chunks == 1:
        return min(total, layout.pipeline - stage)
    return min(total, 2 * (layout.pipeline - stage - 1) + (chunks - 1) * layout.pipeline + 1)


def _moments(recipe: Recipe, layout: Layout, stage: int, device: str) -> Iterator[Peak]:
    r, ops = _Rank(recipe, layout, device), layer_ops(recipe, layout, device)
    own = chunks_of(layout, r.model.num_layers, stage)
    waiting, layers = in_flight(layout, stage), own[0].layers
    first, last = own[0].first, own[-1].last
    kept = kept_by_layer(recipe, layout, device)
    batch = BATCH_BYTES * r.tokens * (layout.virtual_pipeline if layout.virtual_pipeline > 1 else 1)
    # A pipeline rank also keeps what it was sent, and on a CPU what it has sent on.
    between = (0 if first else r.x) + (0 if last or device == "cuda" else r.x) if layout.pipeline > 1 else 0
    # Micro-batches that wait as a whole, and the layers below of the one at hand.
    base = round((waiting - 1) * (layers * kept + between)) + between + batch
    communication = _communication(r)
    sharded = _Sharded(recipe, layout, r.value) if layout.strategy == "FSDP" else None
    gathered = sharded.in_backward if sharded else 0
    head = Peak("", 0)
    if last:
        norm = _norm(r, "norm")
        vocabulary = -(-r.model.vocab_size // layout.tensor) * r.model.hidden_size
        chunk = min(LOSS_CHUNK_TOKENS[device], r.tokens)
        logits = chunk * -(-r.model.vocab_size // layout.tensor) * r.value
        trained = recipe.lora is None and recipe.dpo is None
        hidden = r.full if layout.sequence_parallel and layout.tensor > 1 else 0
        forward = r.full + (4 * vocabulary if trained else 0) + logits
        if trained and r.value == 2:
            # A chunk's part in bf16; a CPU adds it to the fp32 sum by way of an fp32 copy.
            forward += vocabulary * (r.value + (4 if device == "cpu" else 0))
        keeps = r.full + (vocabulary * r.value if trained else 0)
        top = base + layers * kept + norm.kept
        yield Peak("loss", top, r.x + hidden, forward, sharded.in_forward if sharded else 0, communication)
        # Scaled gradients are new tensors on a GPU; on a CPU nothing is scaled.
        scaled = keeps if device == "cuda" else 0
        yield Peak("loss, backward", top, hidden, keeps + scaled, gathered, communication)
        # FSDP holds the gradient of its outermost unit until the end of the backward pass.
        output = vocabulary * r.value if trained and sharded else 0
        head = Peak("", 0, 0, output)
        yield Peak("final norm, backward", top, norm.given + norm.made + norm.extra, output, gathered, communication)
    yield from _backward(r, ops, base + (layers - 1) * kept, gathered, communication, head.loss)
    if first:
        embedding = r.gradient("embedding")
        yield Peak("embedding, backward", base, r.x + embedding, head.loss, gathered, communication)
    if sharded:
        yield Peak(_SCATTERED, batch, 0, 0, sharded.at_end, communication)


def _backward(r: _Rank, ops: list[Op], below: int, gathered: int, communication: int, loss: int) -> Iterator[Peak]:
    """The backward pass of the topmost layer, op by op; where it is computed again, with all that makes."""
    kept_already = 0
    if r.layout.recompute == "full":
        # Its input has been kept, and with ring attention its result; a norm on a CPU takes an fp32 copy of bf16.
        kept_already = kept_by_layer(r.recipe, r.layout, r.device)
        kept_already -= r.x if ops[0].kept >= r.x and not (r.device == "cpu" and r.value == 2) else 0
    for index, op in enumerate(ops):
        again = 0
        if r.layout.recompute == "full":
            again = r.x  # its output, made again
        elif r.layout.recompute == "selective" and op.name in _NETWORK:
            again = 2 * r.x  # the network's input, kept by itself, and its output, made again
        kept = below + kept_already + sum(earlier.kept for earlier in ops[: index + 1])
        working = op.given + op.made + op.extra + op.beside + again
        sent = _ring_messages(r) if op.name == "attention" else 0
        yield Peak(f"{op.name}, backward", kept, working, loss, gathered, communication + sent)


def _communication(r: _Rank) -> int:
    """The one buffer that megatron-core keeps to gather a sequence into."""
    return r.full if r.layout.sequence_parallel and r.layout.tensor > 1 else 0


def _ring_messages(r: _Rank) -> int:
    """Keys and values that are sent and those that arrive meanwhile; all of them where they are gathered."""
    if r.layout.context == 1:
        return 0
    return 2 * r.k * (r.layout.context if r.layout.context_schedule == "allgather" else 2)


class _Sharded:
    """What `fully_shard` gathers: a layer and the one to come, and the outermost unit all the time."""

    def __init__(self, recipe: Recipe, layout: Layout, value: int):
        assert recipe.model is not None
        every = parameters_of(recipe, layout, Chunk(1, True, True))
        root = {"embedding", "final_norm", "output"}
        outer = sum(p.elements for p in every if p.name in root)
        layer = sum(p.elements for p in every if p.name not in root)
        trained = sum(p.elements for p in every if p.name not in root and p.trained)
        outer_trained = sum(p.elements for p in every if p.name in root and p.trained)
        # Gathered flat, then copied out; the next layer's arrive meanwhile.
        self.in_forward = outer * value + layer * value
        self.in_backward = (outer + 2 * layer) * value + trained * (value + 4)
        self.at_end = outer * value + outer_trained * (value + 4)
