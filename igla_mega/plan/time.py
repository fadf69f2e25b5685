"""How long a step takes: work by kind of kernel, bytes by collective and link, and what waits for what."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from igla_mega.config.schema import Recipe
from igla_mega.layout.hardware import Hardware
from igla_mega.layout.layout import Layout
from igla_mega.plan.attention import ring_cost
from igla_mega.plan.calibration import Rates
from igla_mega.plan.parameters import Chunk, chunks_of, held, parameters_of, totals

FORWARD_OPS, BACKWARD_OPS = 160, 130
"""Host's time in a layer, in small ops of `Rates.op_seconds`; most of it is Python. Measured on a few tokens: a layer
took 1.1 ms beside its products and attention, an op 3.8 microseconds."""
HOP_SECONDS = 1e-5
"""Least time of one message, assumed (NCCL's small messages: 10 to 30 microseconds)."""
ADAM_BYTES, NORM_BYTES, PULL_BYTES = 30, 12, 24
"""Of one fp32 main weight: AdamW reads four values and writes three and the bf16 copy; the norm reads, clipping reads
and writes; the pull of EWC reads four values and writes, and its norms read."""


@dataclass(frozen=True)
class Traffic:
    """One kind of message of a step on one rank."""

    collective: str
    link: str
    """`link` within a machine, `network` across."""
    bytes: float
    """Sent by a rank in a step."""
    seconds: float
    exposed: float
    """Seconds of these that no compute hides."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step, by what they go to; the sum is the step."""

    gemm: float
    attention: float
    elementwise: float
    loss: float
    recompute: float
    """Of gemm, attention and value-by-value work, what is done a second time."""
    communication: float
    """Exposed."""
    bubble: float
    """Waiting in the pipeline."""
    optimizer: float
    memory: float
    """The pull of Elastic Weight Consolidation."""
    reference: float
    """The forward pass of preference optimization's reference."""
    data: float
    overhead: float
    traffic: tuple[Traffic, ...] = field(default=())

    @property
    def seconds(self) -> float:
        return sum(value for name, value in self.parts().items())

    def parts(self) -> dict[str, float]:
        return {name: value for name, value in self.__dict__.items() if name != "traffic"}


@dataclass(frozen=True)
class _Work:
    """Seconds of one micro-batch on one pipeline rank."""

    gemm: float = 0.0
    attention: float = 0.0
    elementwise: float = 0.0
    loss: float = 0.0
    recompute: float = 0.0

    def __add__(self, other: "_Work") -> "_Work":
        return _Work(*(a + b for a, b in zip(self.__dict__.values(), other.__dict__.values(), strict=True)))

    def times(self, factor: float) -> "_Work":
        return _Work(*(value * factor for value in self.__dict__.values()))

    @property
    def seconds(self) -> float:
        return sum(self.__dict__.values())


def model_flops_per_token(recipe: Recipe, sequence_length: int) -> float:
    """FLOP of training on one token, recomputation not counted, causal attention halved.

    A frozen weight takes part in four of the six products of a trained one.
    """
    model = recipe.model
    assert model is not None, "resolved before"
    attention = 6 * model.num_layers * model.num_heads * model.head_size * sequence_length
    return (6 if recipe.lora is None else 4) * model.matmul_parameters(recipe.moe) + attention


class Clock:
    """The time of a step in one layout on one kind of hardware."""

    def __init__(self, recipe: Recipe, layout: Layout, hardware: Hardware, rates: Rates):
        assert recipe.model is not None, "resolved before"
        self.recipe, self.layout, self.hardware, self.rates, self.model = recipe, layout, hardware, rates, recipe.model
        self.value = 4 if recipe.distributed.precision == "FP32" else 2
        # The ranks of a CPU share its cores.
        self.share = 1 / layout.world_size if hardware.is_cpu else 1.0
        self.peak = hardware.peak(recipe.distributed.precision) * self.share
        self.bandwidth = hardware.bandwidth * self.share
        rows = layout.micro_batch_size * layout.rows_per_sample
        self.tokens = rows * layout.padded_length // layout.context
        self.own_tokens = self.tokens // layout.tensor if layout.sequence_parallel else self.tokens

    def step(self) -> StepTime:
        """Return the time of one optimizer step, the slowest pipeline rank's."""
        layout, rates = self.layout, self.rates
        stages = sorted({0, layout.pipeline - 1})
        work, traffic = max(
            ((self._micro_batch(stage), self._micro_traffic(stage)) for stage in stages),
            key=lambda both: both[0].seconds + sum(message.exposed for message in both[1]),
        )
        count = layout.num_microbatches
        stage = stages[-1]
        own = held(self.recipe, layout, stage, device="cpu" if self.hardware.is_cpu else "cuda")
        passing = sum(message.exposed for message in traffic)
        micro = work.seconds + passing
        bubble = (layout.pipeline - 1) / layout.virtual_pipeline * micro
        messages = [
            replace(m, bytes=m.bytes * count, seconds=m.seconds * count, exposed=m.exposed * count) for m in traffic
        ]
        messages += self._gradient_traffic(stage, work.seconds)
        memory = self.bandwidth * rates.optimizer.value
        updated = own.updated
        # Every rank adds the gradients of a micro-batch to those before.
        added = own.trained * (self.value + 8) * count / (self.bandwidth * rates.memory.value)
        reads = layout.data * (self.share if self.hardware.is_cpu else 1)
        tokens = self.layout.global_batch * layout.rows_per_sample * layout.sequence_length
        held_back = self.recipe.memory is not None and self.recipe.memory.ewc_lambda > 0
        return StepTime(
            gemm=work.gemm * count,
            attention=work.attention * count,
            elementwise=work.elementwise * count + added,
            loss=work.loss * count,
            recompute=work.recompute * count,
            communication=sum(message.exposed for message in messages),
            bubble=bubble,
            optimizer=updated * (ADAM_BYTES + NORM_BYTES) / memory,
            memory=updated * PULL_BYTES / memory if held_back else 0.0,
            reference=self._reference(count),
            data=tokens * rates.data_seconds.value / max(1, reads if self.hardware.is_cpu else layout.data),
            overhead=rates.step_seconds.value,
            traffic=tuple(messages),
        )

    def forward_seconds(self) -> float:
        """Time of a micro-batch's forward pass through the whole model, as an evaluation takes it."""
        layers = self._layer_forward().times(self.model.num_layers / self.layout.pipeline)
        return layers.seconds + self._head(backward=False).seconds

    def _gemm(self, rows: float, inputs: float, outputs: float, *, in_layer: bool = True) -> float:
        flops = 2 * rows * inputs * outputs
        if in_layer and self.recipe.distributed.precision == "FP8":
            return flops / (self.hardware.fp8_flops * self.rates.gemm_fp8.value)
        share = self.rates.gemm_share(flops)
        return flops / (self.peak * share) if flops else 0.0

    def _linears(self) -> Iterator[tuple[float, float, float, bool, float]]:
        """Rows, inputs, outputs of each product of a layer on one rank, whether its weight trains, how many times."""
        frozen = self.recipe.lora is not None
        for parameter in parameters_of(self.recipe, self.layout, Chunk(1, False, False)):
            if len(parameter.shape) == 1:
                continue
            outputs, inputs = parameter.shape
            if parameter.name in ("expert_fc1", "expert_fc2"):
                continue
            own = self.own_tokens if parameter.name == "router" else self.tokens
            yield own, inputs, outputs, parameter.trained, 1.0
        if (moe := self.recipe.moe) is not None:
            # Balanced: each expert of a rank works on its share of what all ranks of the group send.
            experts = moe.num_experts // self.layout.expert
            rows = self.own_tokens * moe.num_experts_per_tok / experts
            f, h = self.model.intermediate_size, self.model.hidden_size
            yield rows, h, 2 * f, not frozen, experts
            yield rows, f, h, not frozen, experts

    def _layer_forward(self) -> _Work:
        gemm = sum(self._gemm(rows, a, b) * times for rows, a, b, _, times in self._linears())
        if self.recipe.quantization is not None:
            gemm += self._unpacked()
        return self._at_least(
            _Work(gemm, self._attention(1.0, self.rates.attention_forward.value), self._values(backward=False)),
            FORWARD_OPS,
        )

    def _layer_backward(self) -> _Work:
        gemm = sum(
            self._gemm(rows, a, b) * times * (2 if trained else 1) for rows, a, b, trained, times in self._linears()
        )
        if self.recipe.quantization is not None:
            gemm += self._unpacked()
        return self._at_least(
            _Work(gemm, self._attention(2.5, self.rates.attention_backward.value), self._values(backward=True)),
            BACKWARD_OPS,
        )

    def _unpacked(self) -> float:
        """Making the weights of a layer from their codes: half a byte is read, a value written and read."""
        found = parameters_of(self.recipe, self.layout, Chunk(1, False, False))
        elements = sum(sum(parameter.codes) for parameter in found)
        return elements * (0.5 + 2 * self.value) / (self.bandwidth * self.rates.memory.value)

    def _at_least(self, work: _Work, ops: int) -> _Work:
        """On a CPU the host's time comes on top; on a GPU the queue runs dry when kernels, not recorded, are short."""
        least = (1 if self.recipe.distributed.cuda_graphs else ops) * self.rates.op_seconds.value
        if self.hardware.is_cpu:
            return replace(work, elementwise=work.elementwise + least)
        return replace(work, elementwise=work.elementwise + max(0.0, least - work.seconds))

    def _attention(self, factor: float, share: float) -> float:
        rows = self.layout.micro_batch_size * self.layout.rows_per_sample
        length, heads = self.layout.padded_length, self.model.num_heads // self.layout.tensor
        flops = 2 * rows * length**2 / self.layout.context * heads * self.model.head_size
        return factor * flops / (self.peak * share)

    def _values(self, *, backward: bool) -> float:
        """Seconds of what a layer does value by value."""
        return value_bytes(self, backward=backward) / (self.bandwidth * self.rates.memory.value)

    def _head(self, *, backward: bool = True) -> _Work:
        model, tensor = self.model, self.layout.tensor
        vocabulary = math.ceil(model.vocab_size / tensor)
        chunk = min(self.tokens, 256 if self.hardware.is_cpu else 4096)
        times = self.tokens / chunk
        trained = self.recipe.lora is None
        products = 1 if not backward else 3 if trained else 2
        gemm = products * times * self._gemm(chunk, model.hidden_size, vocabulary, in_layer=False)
        passes = 3.0 * self.tokens * vocabulary * self.value
        if backward and trained:
            passes += times * vocabulary * model.hidden_size * (8 + (0 if self.value == 4 else 4))
        return _Work(gemm=gemm, loss=passes / (self.bandwidth * self.rates.loss.value))

    def _micro_batch(self, stage: int) -> _Work:
        own = chunks_of(self.layout, self.model.num_layers, stage)
        layers = sum(chunk.layers for chunk in own)
        forward, backward = self._layer_forward(), self._layer_backward()
        again = 0.0
        if self.layout.recompute == "full":
            # Ring attention keeps its result; what else a layer does is done again.
            again = forward.seconds - (forward.attention if self.layout.context > 1 else 0.0)
        elif self.layout.recompute == "selective":
            again = self._network_again()
        work = (forward + backward).times(layers) + _Work(recompute=again * layers)
        if own[-1].last:
            work = work + self._head()
        if own[0].first:
            rows = self.own_tokens * self.model.hidden_size * self.value
            work = work + _Work(elementwise=4 * rows / (self.bandwidth * self.rates.memory.value))
        return work

    def _network_again(self) -> float:
        linears = list(self._linears())
        names = [p.name for p in parameters_of(self.recipe, self.layout, Chunk(1, False, False)) if len(p.shape) > 1]
        if self.recipe.moe is not None:
            return sum(self._gemm(rows, a, b) * times for rows, a, b, _, times in linears[-2:])
        dense = [self._gemm(r, a, b) for (r, a, b, _, _), n in zip(linears, names, strict=False) if n[:3] == "fc1"]
        dense += [self._gemm(r, a, b) for (r, a, b, _, _), n in zip(linears, names, strict=False) if n[:3] == "fc2"]
        swiglu = (7 if self.hardware.is_cpu else 3) * self.tokens * self.model.intermediate_size / self.layout.tensor
        return sum(dense) + swiglu * self.value / (self.bandwidth * self.rates.memory.value)

    def _reference(self, count: int) -> float:
        dpo = self.recipe.dpo
        if dpo is None or dpo.reference_free:
            return 0.0
        # A cached reference is one pass over the pairs: as much, once an epoch is trained; later ones are free.
        return count * self.forward_seconds() * self.layout.pipeline

    # What travels.

    def _rate(self, size: int, stride: int) -> tuple[str, float]:
        """The link that a group's collectives wait for, and its bytes a second for one rank.

        Args:
            stride: distance of neighbours in the group, in ranks.
        """
        members = max(1, min(size, self.hardware.node_size // stride))
        inside = self.hardware.link * self.rates.link.value
        if members >= size:
            return "link", inside
        # The groups of a machine share its adapters: as many for each as it has members there.
        return "network", min(
            inside if members > 1 else math.inf, members * self.hardware.network * self.rates.network.value
        )

    def _message(
        self, collective: str, payload: float, size: int, stride: int, *, times: float = 1.0, hidden: float = 0.0
    ) -> Traffic:
        """Count a collective.

        Args:
            payload: bytes of the whole tensor that is gathered, scattered, reduced or exchanged.
            hidden: seconds of compute that run beside it.
        """
        link, rate = self._rate(size, stride)
        if collective == "all-to-all" and link == "network":
            rate = self.hardware.network * self.rates.network.value
        share = (size - 1) / size * (2 if collective == "all-reduce" else 1)
        sent = payload if collective == "send" else share * payload
        seconds = (sent / rate + HOP_SECONDS * math.ceil(math.log2(max(2, size)))) * times
        exposed = max(0.0, seconds - hidden * self.rates.overlap.value)
        return Traffic(collective, link, sent * times, seconds, exposed)

    def _micro_traffic(self, stage: int) -> list[Traffic]:
        """Messages of one micro-batch."""
        layout, model = self.layout, self.model
        own = chunks_of(layout, model.num_layers, stage)
        layers = sum(chunk.layers for chunk in own)
        passes = 2 + (1 if layout.recompute == "full" else 0)
        full = self.tokens * model.hidden_size * self.value
        found = []
        if layout.tensor > 1:
            # Two a layer and pass; with sequence parallelism each is a gathering and a scattering of the same bytes.
            experts = 1 if self.recipe.moe is not None else 2
            found.append(self._message("all-reduce", full, layout.tensor, 1, times=experts * passes * layers))
        if layout.pipeline > 1:
            stride = layout.tensor * layout.context * layout.data
            sent = self.own_tokens * model.hidden_size * self.value
            found.append(self._message("send", sent, 2, stride, times=2 * layout.virtual_pipeline))
        if layout.context > 1:
            found += self._context_traffic(layers)
        if self.recipe.moe is not None and layout.expert > 1:
            sent = self.recipe.moe.num_experts_per_tok * self.own_tokens * model.hidden_size * self.value
            found.append(
                self._message(
                    "all-to-all", sent, layout.expert, layout.tensor * layout.context, times=2 * passes * layers
                )
            )
        if layout.strategy == "FSDP":
            found += self._sharded_traffic(stage, layers)
        return found

    def _context_traffic(self, layers: int) -> list[Traffic]:
        layout, node = self.layout, max(1, self.hardware.node_size // self.layout.tensor)
        heads = self.model.num_kv_heads // layout.tensor
        schedule, inner = resolved_schedule(layout, heads, node)
        cost = ring_cost(self.model, layout, schedule, bytes_per_value=self.value, inner_size=inner)
        link, rate = self._rate(layout.context, layout.tensor)
        if schedule in ("p2p", "a2a+p2p") and link == "network":
            rate = self.hardware.network * self.rates.network.value * (inner if schedule == "a2a+p2p" else 1)
        found = []
        for sent, flops, share in (
            (cost.forward_bytes, cost.forward_flops, self.rates.attention_forward.value),
            (cost.backward_bytes, cost.backward_flops, self.rates.attention_backward.value),
        ):
            beside = flops / (self.peak * share) * self.rates.overlap.value if cost.num_steps > 1 else 0.0
            seconds = sent / rate + HOP_SECONDS
            times = layers * cost.num_steps
            found.append(Traffic(schedule, link, sent * times, seconds * times, max(0.0, seconds - beside) * times))
        return found

    def _sharded_traffic(self, stage: int, layers: int) -> list[Traffic]:
        """Weights are gathered for the forward and for the backward pass, gradients scattered in fp32 behind it."""
        replicas = self.layout.data * self.layout.context
        own = totals(self.recipe, self.layout, stage)
        weights, trained = own.elements, own.trained + own.expert
        work = self._micro_batch(stage).seconds
        stride, units = self.layout.tensor, layers + 1
        gathered = self._message("all-gather", 2 * weights * self.value / units, replicas, stride, times=units)
        scattered = self._message("reduce-scatter", 4 * trained / units, replicas, stride, times=units)
        total = gathered.seconds + scattered.seconds
        # The first gathering and the last scattering have nothing to hide behind.
        bare = total / units
        exposed = bare + max(0.0, total - bare - work * self.rates.overlap.value)
        return [replace(m, exposed=exposed * m.seconds / total) for m in (gathered, scattered)]

    def _gradient_traffic(self, stage: int, micro_seconds: float) -> list[Traffic]:
        """Once a step: gradients over the data and context ranks, and the weights back."""
        layout, replicas = self.layout, self.layout.data * self.layout.context
        found = []
        beside = 0.0
        if self.recipe.distributed.overlap_communication and not self.hardware.is_cpu:
            beside = micro_seconds
        own = totals(self.recipe, layout, stage)
        if layout.strategy != "FSDP" and replicas > 1:
            for expert in (False, True):
                elements = own.expert if expert else own.trained
                ranks = replicas * layout.tensor // layout.expert if expert else replicas
                stride = layout.tensor * layout.context * layout.expert if expert else layout.tensor
                if not elements or ranks < 2:
                    continue
                if layout.distributed_optimizer:
                    # Gradients leave in the last micro-batch's backward pass, weights come in the next forward one.
                    found.append(self._message("reduce-scatter", 4 * elements, ranks, stride, hidden=beside * 2 / 3))
                    found.append(self._message("all-gather", self.value * elements, ranks, stride, hidden=beside / 3))
                else:
                    found.append(self._message("all-reduce", 4 * elements, ranks, stride, hidden=beside * 2 / 3))
        if self.model.tie_embeddings and layout.pipeline > 1:
            vocabulary = 4 * math.ceil(self.model.vocab_size / layout.tensor) * self.model.hidden_size
            found.append(self._message("all-reduce", vocabulary, 2, layout.world_size // layout.pipeline))
        return found


def value_bytes(clock: Clock, *, backward: bool) -> float:
    """Bytes that a layer reads and writes value by value, as its kernels stand: a CPU's are not fused."""
    model, tensor, on_cpu = clock.model, clock.layout.tensor, clock.hardware.is_cpu
    hidden = clock.own_tokens * model.hidden_size
    heads = clock.tokens * (model.num_heads + model.num_kv_heads) * model.head_size / tensor
    stacked = clock.tokens * (model.num_heads + 2 * model.num_kv_heads) * model.head_size / tensor
    width = clock.tokens * model.intermediate_size / tensor
    if clock.recipe.moe is not None:
        routed = clock.recipe.moe.num_experts_per_tok
        width = clock.own_tokens * routed * model.intermediate_size
        hidden *= 1 + routed  # sorted, weighted and summed
    return clock.value * layer_values(hidden, heads, stacked, width, on_cpu=on_cpu, backward=backward)


def layer_values(hidden: float, heads: float, stacked: float, width: float, *, on_cpu: bool, backward: bool) -> float:
    """Values read and written by a layer's norms, residuals, rotation and activation.

    Args:
        hidden, heads, stacked, width: values of the residual stream, of queries and keys, of the stacked projections'
            output, and of one half of the feed-forward network's.
    """
    if on_cpu:
        norms, swiglu = (16, 7) if not backward else (32, 13)
    else:
        norms, swiglu = (4, 3) if not backward else (8, 5)
    return hidden * (norms + 6) + 9 * heads + 2 * stacked + swiglu * width


def resolved_schedule(layout: Layout, kv_heads: int, node: int) -> tuple[str, int]:
    """The schedule of ring attention and the ranks of its a2a groups, as `ops.ring_attention` chooses them."""
    size = layout.context
    inner = max(n for n in range(1, min(size, node) + 1) if size % n == 0 and kv_heads % n == 0)
    if layout.context_schedule != "auto":
        return layout.context_schedule, inner
    if size <= node:
        return ("a2a" if kv_heads % size == 0 else "p2p"), inner
    return ("a2a+p2p" if inner > 1 else "p2p"), inner
