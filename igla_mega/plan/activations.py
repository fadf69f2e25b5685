"""Peak of the temporary memory of a rank within a step: tensors saved by autograd, and working memory.

A layer is a list of ops, each with the bytes it saves for its backward pass and the bytes that pass allocates. A step
is simulated over them in the order of the engine, and the largest sum is the peak. It agrees with the peak of the
allocator in real steps on a CPU within 5 % (`tests/plan/test_activations.py`, `tools/bench/memory.py`).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from igla_mega.config.schema import Recipe
from igla_mega.layout.layout import Layout
from igla_mega.plan.parameters import Chunk, Parameter, chunks_of, held, parameters_of

LOSS_CHUNK_TOKENS = {"cpu": 256, "cuda": 4096}
"""Number of tokens whose logits are computed at once, as in `ops.linear_cross_entropy`."""
BATCH_BYTES = 28
"""Bytes per token of a batch: three int64 and one fp32."""


@dataclass(frozen=True)
class Op:
    """One op of a layer on one rank, in bytes."""

    name: str
    kept: int
    """Tensors saved from the forward pass to the backward pass."""
    given: int
    """Incoming gradient of the backward pass."""
    made: int
    """Activation gradients that the backward pass computes."""
    extra: int = 0
    """Other memory of the backward pass: the weight gradient, copies."""
    residual: int = 0
    """Gradient of the residual stream, kept during the op."""


@dataclass(frozen=True)
class Peak:
    """Temporary memory of one rank at one moment of a step in bytes, by purpose."""

    moment: str
    kept: int
    """Activations saved for the backward pass."""
    working: int = 0
    """Inputs, outputs and gradients of the current op."""
    loss: int = 0
    """Logits of a chunk, gradients of the output projection and of its input."""
    unsharded: int = 0
    """Weights gathered and gradients not yet scattered (FSDP)."""
    communication: int = 0
    """Buffers of the all-gather along the sequence, and messages of ring attention."""
    gradients: int = 0
    """Gradient shards allocated so far; FSDP allocates them within the step."""

    @property
    def total(self) -> int:
        return self.kept + self.working + self.loss + self.unsharded + self.communication + self.gradients


@dataclass(frozen=True)
class _Rank:
    """Sizes on a rank: tokens, and bytes of the tensors that ops share."""

    recipe: Recipe
    layout: Layout
    device: str

    @property
    def model(self):
        assert self.recipe.model is not None, "resolved before"
        return self.recipe.model

    @property
    def value(self) -> int:
        """Bytes per activation value."""
        return 4 if self.recipe.distributed.precision == "FP32" else 2

    @property
    def tokens(self) -> int:
        """Number of tokens of a micro-batch in the tensor-parallel group."""
        rows = self.layout.micro_batch_size * self.layout.rows_per_sample
        return rows * self.layout.padded_length // self.layout.context

    @property
    def own_tokens(self) -> int:
        """Number of tokens of the residual stream on this rank."""
        return self.tokens // self.layout.tensor if self.layout.sequence_parallel else self.tokens

    @property
    def x(self) -> int:
        """Bytes of the residual stream on this rank."""
        return self.own_tokens * self.model.hidden_size * self.value

    @property
    def full(self) -> int:
        """Bytes of the residual stream of all tokens of the tensor-parallel group."""
        return self.tokens * self.model.hidden_size * self.value

    @property
    def q(self) -> int:
        """Bytes of the queries."""
        return self.tokens * self.model.num_heads * self.model.head_size // self.layout.tensor * self.value

    @property
    def k(self) -> int:
        """Bytes of the keys."""
        return self.tokens * self.model.num_kv_heads * self.model.head_size // self.layout.tensor * self.value

    @property
    def f(self) -> int:
        """Bytes of one half of the output of the first feed-forward projection."""
        return self.tokens * self.model.intermediate_size // self.layout.tensor * self.value

    def gradient(self, name: str) -> int:
        """Return the bytes of the largest gradient of a trained weight with a name, before accumulation."""
        found = parameters_of(self.recipe, self.layout, Chunk(1, True, True))
        return max((p.elements * self.value for p in found if p.trained and p.name == name), default=0)

    def adapted(self, *projections: str) -> int:
        """Return the number of these projections with an adapter."""
        lora = self.recipe.lora
        return len(set(projections) & set(lora.target_modules)) if lora is not None else 0

    def input_kept(self, size: int, *projections: str) -> int:
        """Return the bytes that projections and their adapters save of an input of `size` bytes that no other op
        saves."""
        lora = self.recipe.lora
        if lora is None:
            return size
        if not (count := self.adapted(*projections)):
            return 0
        narrow = count * self.tokens * lora.rank * self.value
        # Dropout creates another input, and saves its mask of one byte per value.
        return narrow + (size + size // self.value if lora.dropout else size)


def layer_ops(recipe: Recipe, layout: Layout, device: str) -> list[Op]:
    """Return the ops of one layer, in the order of its forward pass."""
    r = _Rank(recipe, layout, device)
    return [*_attention_ops(r), *(_network_ops(r) if recipe.moe is None else _expert_ops(r))]


def _norm(r: _Rank, name: str) -> Op:
    """Return a norm as an op."""
    wide, scale = 4 * r.own_tokens * r.model.hidden_size, 4 * r.own_tokens
    if r.device == "cuda" or r.recipe.distributed.fused_layers:
        return Op(name, r.x + scale, r.x, r.x, residual=r.x)
    # On a CPU torch decomposes it: the fp32 input is saved, and the normalized input for the weight gradient.
    return Op(name, (2 if r.recipe.lora is None else 1) * wide + scale, r.x, wide, extra=2 * wide, residual=r.x)


def _swiglu_kept(r: _Rank, f: int) -> int:
    """Return the bytes that SwiGLU saves: its input of 2 x `f` bytes, and unless fused also the intermediates of
    torch."""
    return 2 * f if r.recipe.distributed.fused_layers else 4 * f


def _attention_ops(r: _Rank) -> Iterator[Op]:
    """Yield the ops of the attention block."""
    lse = 4 * r.tokens * r.model.num_heads // r.layout.tensor
    # Cosines and sines of half a head in fp32, for queries and for keys.
    angles = 8 * (r.layout.padded_length // r.layout.context) * r.model.head_size
    stacked = r.q + 2 * r.k
    yield _norm(r, "norm")
    kept = r.input_kept(r.x, "q_proj", "k_proj", "v_proj")
    yield Op("qkv", kept, stacked, r.full, r.gradient("qkv"), residual=r.x)
    yield Op("rotary", angles, stacked, stacked, r.q, residual=r.x)
    # The values are a view of the stacked QKV output, which therefore stays allocated.
    own_values = r.k if r.layout.context > 1 else 0
    # Ring attention sums the gradients of its blocks in fp32.
    sums = 4 * stacked // r.value if r.layout.context > 1 else 0
    yield Op("attention", r.q + r.k + stacked + own_values + r.q + lse, r.q, stacked, sums, residual=r.x)
    adapters = r.input_kept(r.q, "o_proj")
    if r.recipe.lora is None or (r.adapted("o_proj") and not r.recipe.lora.dropout):
        adapters -= r.q  # already saved by attention
    yield Op("proj", adapters, r.x, r.q, r.gradient("proj"))


def _network_ops(r: _Rank) -> Iterator[Op]:
    """Yield the ops of a dense feed-forward network."""
    yield _norm(r, "norm")
    yield Op("fc1", r.input_kept(r.x, "gate_proj", "up_proj"), 2 * r.f, r.full, r.gradient("fc1"), residual=r.x)
    product = r.input_kept(r.f, "down_proj")
    yield Op("swiglu", _swiglu_kept(r, r.f), r.f, 2 * r.f, residual=r.x)
    yield Op("fc2", product, r.x, r.f, r.gradient("fc2"))


def _expert_ops(r: _Rank) -> Iterator[Op]:
    """Yield the ops of a mixture of experts with a balanced load."""
    moe = r.recipe.moe
    assert moe is not None
    on_cpu, name = r.device == "cpu", "expert_fc"
    # A GPU computes the products of all experts at once, with stacked weights; a CPU one after another.
    grouped = not on_cpu and r.value == 2 and r.recipe.lora is None
    experts = 1 if grouped else max(1, moe.num_experts // r.layout.expert)
    first, second = (r.gradient(f"{name}{n}") for n in (1, 2))
    stacks = [gradient * (moe.num_experts // r.layout.expert) if grouped else 0 for gradient in (first, second)]
    # With a balanced load each rank receives as many tokens for its experts as it sends.
    sent = moe.num_experts_per_tok * r.x
    f = moe.num_experts_per_tok * r.own_tokens * r.model.intermediate_size * r.value
    one, one_sent = f // experts, sent // experts
    scores = 3 * 4 * r.own_tokens * moe.num_experts
    yield _norm(r, "norm")
    # Tokens are sorted by expert before sending and after receiving; each sort saves its indices, not its tokens.
    places = 2 * 8 * moe.num_experts_per_tok * r.own_tokens
    yield Op("router", r.x + scores + places, sent, r.x, sent, residual=r.x)
    yield Op("expert_fc1", sent + stacks[0], 2 * one, sent, first + stacks[0], residual=r.x)
    # Its result is saved twice: weighted for the next op, and unweighted for the gradient of the weights.
    yield Op("expert_swiglu", _swiglu_kept(r, f) + f, 2 * one, 2 * one, residual=r.x + sent)
    yield Op("expert_fc2", f + stacks[1], one_sent, one, second + stacks[1], residual=r.x + sent)
    if r.value == 2:
        # Weighting is in fp32: the incoming gradient, that of the product, and that of the weights.
        yield Op("expert_weight", 0, 2 * one, 4 * one, residual=r.x + sent)


_EXPERTS = {"expert_fc1", "expert_swiglu", "expert_fc2", "expert_weight"}
_NETWORK = {"fc1", "fc2", "swiglu", "router", *_EXPERTS}


def kept_by_layer(recipe: Recipe, layout: Layout, device: str) -> int:
    """Return the bytes that a layer saves from the forward to the backward pass with `layout.recompute`."""
    r, ops = _Rank(recipe, layout, device), layer_ops(recipe, layout, device)
    if layout.recompute == "full":
        # The result of ring attention is saved, not recomputed.
        ring = r.q + 4 * r.tokens * r.model.num_heads // layout.tensor if layout.context > 1 else 0
        return r.x + ring
    if layout.recompute == "selective":
        return sum(op.kept for op in ops if op.name not in _NETWORK) + r.x
    return sum(op.kept for op in ops)


def peak(recipe: Recipe, layout: Layout, stage: int, device: str) -> Peak:
    """Simulate a step of pipeline stage `stage` and return its peak."""
    return max(_moments(recipe, layout, stage, device), key=lambda moment: moment.total)


def in_flight(layout: Layout, stage: int) -> float:
    """Return the number of micro-batches (per chunk, with virtual stages) whose activations a stage holds at once.

    The 1F1B schedule of megatron-core; interleaved after Narayanan et al. 2021 (arXiv:2104.04473, section 2.2).
    """
    chunks = layout.virtual_pipeline
    total = layout.num_microbatches * chunks
    if layout.pipeline == 1:
        return 1
    if chunks == 1:
        return min(total, layout.pipeline - stage)
    return min(total, 2 * (layout.pipeline - stage - 1) + (chunks - 1) * layout.pipeline + 1)


def _moments(recipe: Recipe, layout: Layout, stage: int, device: str) -> Iterator[Peak]:
    """Yield the moments of a step that may be its peak: loss, backward passes of layers, embedding, end."""
    r, ops = _Rank(recipe, layout, device), layer_ops(recipe, layout, device)
    own = chunks_of(layout, r.model.num_layers, stage)
    waiting, layers = in_flight(layout, stage), own[0].layers
    first, last = own[0].first, own[-1].last
    kept = kept_by_layer(recipe, layout, device)
    batch = BATCH_BYTES * r.tokens * (layout.virtual_pipeline if layout.virtual_pipeline > 1 else 1)
    # A pipeline rank also keeps the received activations, and on a CPU those that it sent.
    between = (0 if first else r.x) + (0 if last or device == "cuda" else r.x) if layout.pipeline > 1 else 0
    # Micro-batches in flight other than the current one, all their layers.
    base = round((waiting - 1) * (layers * kept + between)) + between + batch
    communication = _communication(r)
    sharded = _Sharded(recipe, layout, stage, device) if layout.strategy == "FSDP" else None
    shards = sharded.before if sharded else 0
    output = 0
    if last:
        norm = _norm(r, "norm")
        vocabulary = -(-r.model.vocab_size // layout.tensor) * r.model.hidden_size
        configured = recipe.distributed.loss_chunk
        chunk = min(LOSS_CHUNK_TOKENS[device] if configured == "auto" else configured, r.tokens)
        logits = chunk * -(-r.model.vocab_size // layout.tensor) * r.value
        trained = recipe.lora is None and recipe.dpo is None
        hidden = r.full if layout.sequence_parallel and layout.tensor > 1 else 0
        # With DDP on a CPU the weight gradient is added directly to the gradient buffer.
        own_sum = trained and not (device == "cpu" and layout.strategy == "DDP")
        forward = r.full + (4 * vocabulary if own_sum else 0) + logits
        if trained and r.value == 2:
            forward += vocabulary * r.value  # gradient of one chunk, before it is added to the fp32 sum
        keeps = r.full + (vocabulary * r.value if own_sum else 0)
        top = base + layers * kept + norm.kept
        gathered = sharded.at_loss if sharded else 0
        yield Peak("loss", top, r.x + hidden, forward, gathered, communication, shards)
        # Scaling of gradients allocates new tensors on a GPU; on a CPU nothing is scaled.
        scaled = keeps if device == "cuda" else 0
        gathered = sharded.outer if sharded else 0
        yield Peak("loss, backward", top, hidden, keeps + scaled, gathered, communication, shards)
        # FSDP holds the gradient of its outermost unit until the end of the backward pass.
        output = vocabulary * r.value if trained and sharded else 0
        made = norm.given + norm.made + norm.extra
        yield Peak("final norm, backward", top, made, output, gathered, communication, shards)
    # Without FSDP the peak is at the last layer, when all activations are saved; with FSDP earlier layers have fewer
    # activations but more gradient shards, so several depths are tried.
    for depth in sorted({0, 1, layers - 2, layers - 1} & set(range(layers))) if sharded else (0,):
        below = base + (layers - 1 - depth) * kept
        unit = sharded.layer(depth, layers) if sharded else None
        yield from _backward(r, ops, below, communication, output, unit)
    if first:
        made = r.x + r.gradient("embedding")
        gathered, shards = (sharded.outer + sharded.buffer, sharded.after) if sharded else (0, 0)
        yield Peak("embedding, backward", base, made, output, gathered, communication, shards)
    if sharded:
        yield Peak("last gradients scattered", batch, 0, 0, sharded.at_end, communication, sharded.after)


def _backward(
    r: _Rank, ops: list[Op], below: int, communication: int, loss: int, unit: "_ShardedLayer | None"
) -> Iterator[Peak]:
    """Yield the moments of the backward pass of a layer, op by op, including recomputed activations."""
    kept_already = 0
    if r.layout.recompute == "full":
        # The input of the layer is already saved, and the result of ring attention. The first norm saves that input
        # itself, unless torch copies it from bf16 to fp32 (unfused on a CPU).
        kept_already = kept_by_layer(r.recipe, r.layout, r.device)
        copied = r.device == "cpu" and r.value == 2 and not r.recipe.distributed.fused_layers
        kept_already -= r.x if ops[0].kept >= r.x and not copied else 0
    for index, op in enumerate(ops):
        again = 0
        if r.layout.recompute == "full":
            # The recomputed output of the layer; with experts also their outputs, sorted back and summed.
            again = r.x if r.recipe.moe is None else 3 * r.x
        elif r.layout.recompute == "selective" and op.name in _NETWORK:
            again = 2 * r.x  # the saved input of the network and its recomputed output
        kept = below + kept_already + sum(earlier.kept for earlier in ops[: index + 1])
        working = op.given + op.made + op.extra + op.residual + again
        sent = _ring_messages(r) if op.name == "attention" else 0
        unsharded = unit.during(op.name, [later.name for later in ops[index + 1 :]]) if unit else 0
        shards = unit.shards if unit else 0
        yield Peak(f"{op.name}, backward", kept, working, loss, unsharded, communication + sent, shards)
    lora = r.recipe.lora
    if lora is not None and lora.dropout and r.adapted("down_proj"):
        # In the forward pass: the input of dropout (on a CPU also the mask in its dtype), and input and output of the
        # layer.
        whole = below + kept_already + sum(op.kept for op in ops)
        dropped = r.f * (2 if r.device == "cpu" else 1)
        if r.layout.recompute == "full":
            dropped += 2 * r.x  # the incoming gradient, and the output of the layer
        unsharded = unit.during("fc2", []) if unit else 0
        shards = unit.shards if unit else 0
        yield Peak("an adapter's dropout", whole, dropped + 2 * r.x, 0, unsharded, communication, shards)
    if unit and not unit.lowest:
        # The weights of the next layer are gathered before the first gradient of this one.
        whole = below + kept_already + sum(op.kept for op in ops)
        yield Peak("next layer gathered", whole, 2 * r.x, loss, unit.arriving, communication, unit.shards)
    if unit:
        yield Peak("layer's gradients, scattered", below, r.x, loss, unit.scattered, communication, unit.shards)


def _communication(r: _Rank) -> int:
    """Return the bytes of the global buffer of megatron-core for the all-gather along the sequence."""
    return r.full if r.layout.sequence_parallel and r.layout.tensor > 1 else 0


def _ring_messages(r: _Rank) -> int:
    """Return the bytes of keys and values in messages: those sent and received, or all of them with allgather."""
    if r.layout.context == 1:
        return 0
    return 2 * r.k * (r.layout.context if r.layout.context_schedule == "allgather" else 2)


class _Sharded:
    """Memory of `fully_shard` in addition to the weight shards.

    The root unit (embedding, final norm, output projection) is gathered from the first layer to the last gradient, a
    layer only during its own passes, while the next layer is already gathered into a flat buffer. The gradients of a
    unit stay in the dtype of the weights until its backward pass is done; then they are copied to an fp32 buffer, which
    lives until the next unit needs one, and are reduced to shards.
    """

    def __init__(self, recipe: Recipe, layout: Layout, stage: int, device: str):
        assert recipe.model is not None
        self.value = value = 4 if recipe.distributed.precision == "FP32" else 2
        self.on_cpu, self.ranks = device == "cpu", layout.data * layout.context
        # 4-bit weights are not sharded.
        every = [p for p in parameters_of(recipe, layout, Chunk(1, True, True)) if p.trained or not p.codes]
        root = [p for p in every if p.name in _ROOT]
        layer = [p for p in every if p.name not in _ROOT]
        self.outer = value * _elements(root)
        self.rest = value * _elements(p for p in layer if not p.expert)
        self.experts = value * _elements(p for p in layer if p.expert)
        self.num_experts = sum(p.name == "expert_fc1" for p in layer)
        self.trained = {name: _elements(p for p in layer if p.trained and _op(p) == name) for name in map(_op, layer)}
        self.rest_trained = _elements(p for p in layer if p.trained and not p.expert)
        self.experts_trained = _elements(p for p in layer if p.trained and p.expert)
        outer_trained = _elements(p for p in root if p.trained)
        self.after = held(recipe, layout, stage, device=device).gradients
        """Bytes of the shards of all gradients on this rank."""
        in_layer = self.rest_trained + self.experts_trained
        self.of_layer = round(self.after * in_layer / max(1, recipe.model.num_layers * in_layer + outer_trained))
        # From the second micro-batch on all gradient shards exist, and those of a unit are allocated once more before
        # they are accumulated.
        self.added = layout.num_microbatches > 1
        self.before = self.after if self.added else 0
        self.at_loss = self.outer + self.rest
        self.buffer = 4 * self.rest_trained
        end = 4 * outer_trained // self.ranks if self.added else 0
        self.at_end = outer_trained * (value + 4) + end

    def layer(self, depth: int, layers: int) -> "_ShardedLayer":
        """Return the layer `depth` layers below the last one, of `layers`."""
        return _ShardedLayer(self, depth, depth == layers - 1)


@dataclass(frozen=True)
class _ShardedLayer:
    """FSDP memory during the backward pass of the layer `depth` layers below the last one."""

    all: _Sharded
    depth: int
    lowest: bool

    @property
    def shards(self) -> int:
        """Bytes of gradient shards at this time."""
        return self.all.after if self.all.added else self.depth * self.all.of_layer

    @property
    def scattered(self) -> int:
        """Bytes after its backward pass: its gradients, their buffer and their shards."""
        a = self.all
        return a.outer + (0 if self.lowest else a.rest) + a.rest_trained * (a.value + 4) + a.of_layer

    @property
    def arriving(self) -> int:
        """Bytes while the next layer is gathered, from a copy in the dtype of the weights; on a CPU with a further
        copy."""
        a = self.all
        copy = a.rest // a.ranks if a.value == 2 else 0
        return a.outer + 2 * a.rest + a.experts + copy + (a.rest if a.on_cpu else 0) + (a.buffer if self.depth else 0)

    def during(self, op: str, done: list[str]) -> int:
        """Return the bytes of gathered weights, waiting gradients, and the buffer of the last reduce-scatter.

        Args:
            op: current op.
            done: ops whose backward pass is done.
        """
        a = self.all
        gathered = a.outer + a.rest + (0 if self.lowest else a.rest)
        buffer = a.buffer if self.depth else 0
        if a.experts and op in _EXPERTS:
            # The experts are a separate unit; count the moment of the last of them.
            waiting = a.experts_trained - a.trained.get(op, 0) // max(1, a.num_experts)
            return gathered + a.experts + waiting * a.value + buffer
        if a.experts:
            buffer = 4 * a.experts_trained or buffer
        return gathered + a.value * sum(a.trained.get(name, 0) for name in set(done) - _EXPERTS) + buffer


_ROOT = {"embedding", "final_norm", "output"}


def _elements(parameters: Iterable[Parameter]) -> int:
    """Return the total number of elements."""
    return sum(parameter.elements for parameter in parameters)


def _op(parameter: Parameter) -> str:
    """Return the name of the op of a parameter, also of an adapter."""
    return parameter.name.partition(".")[0]
