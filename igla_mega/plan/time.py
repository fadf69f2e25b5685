"""Time of a step: compute by kind of kernel, bytes by collective and link, and what overlaps."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from igla_mega.config.schema import Recipe
from igla_mega.layout.attention import ring_cost
from igla_mega.layout.hardware import Hardware
from igla_mega.layout.layout import Layout
from igla_mega.plan.calibration import Rates
from igla_mega.plan.parameters import Chunk, chunks_of, held, parameters_of, totals

FORWARD_OPS, BACKWARD_OPS = 160, 130
"""Host time of a layer in units of `Rates.op_seconds`; most of it is Python. Measured with few tokens: a layer took
1.1 ms in addition to its products and attention, and an op 3.8 microseconds."""
HOP_SECONDS = 1e-5
"""Minimum time of one message in seconds. Assumed: small messages of NCCL take 10 to 30 microseconds."""
ADAM_BYTES, NORM_BYTES, PULL_BYTES = 30, 12, 24
"""Memory traffic per fp32 main weight, in bytes: AdamW reads four values and writes three and the bf16 copy; the norm
reads, clipping reads and writes; the EWC pull reads four values and writes one, and its norms read."""


@dataclass(frozen=True)
class Traffic:
    """One kind of message in a step on one rank."""

    collective: str
    link: str
    """`link` within a machine, `network` between machines."""
    bytes: float
    """Bytes sent by a rank per step."""
    seconds: float
    exposed: float
    """Part of `seconds` that is not overlapped with compute."""


@dataclass(frozen=True)
class StepTime:
    """Time of an optimizer step in seconds, by cause; the sum is the step."""

    gemm: float
    attention: float
    elementwise: float
    loss: float
    recompute: float
    """Repeated gemm, attention and elementwise work."""
    communication: float
    """Communication that is not overlapped with compute."""
    bubble: float
    """Idle time of the pipeline."""
    optimizer: float
    memory: float
    """Pull of Elastic Weight Consolidation."""
    reference: float
    """Forward pass of the reference model in preference optimization."""
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
    """Time of one micro-batch on one pipeline rank, in seconds."""

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
    """Return the FLOP of training on one token, without recomputation and with causal attention halved.

    A trained weight takes part in three products of 2 FLOP each: forward, input gradient and weight gradient. A frozen
    weight has no weight gradient.
    """
    model = recipe.model
    assert model is not None, "resolved before"
    attention = 6 * model.num_layers * model.num_heads * model.head_size * sequence_length
    return (6 if recipe.lora is None else 4) * model.matmul_parameters(recipe.moe) + attention


class Clock:
    """Time of a step in one layout on one kind of hardware."""

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
        """Return the time of one optimizer step on the slowest pipeline rank."""
        layout, rates = self.layout, self.rates
        # Inner stages have neither embedding nor output projection, so the slowest one is at an end.
        stages = sorted({0, layout.pipeline - 1})
        work, traffic = max(
            ((self._micro_batch(stage), self._micro_traffic(stage)) for stage in stages),
            key=lambda both: both[0].seconds + sum(message.exposed for message in both[1]),
        )
        count = layout.num_microbatches
        stage = stages[-1]
        own = held(self.recipe, layout, stage, device="cpu" if self.hardware.is_cpu else "cuda")
        exposed = sum(message.exposed for message in traffic)
        micro = work.seconds + exposed
        # Narayanan et al. 2021 (arXiv:2104.04473, section 2.2): p - 1 idle micro-batches, divided by the model chunks.
        bubble = (layout.pipeline - 1) / layout.virtual_pipeline * micro
        messages = [
            replace(m, bytes=m.bytes * count, seconds=m.seconds * count, exposed=m.exposed * count) for m in traffic
        ]
        messages += self._gradient_traffic(stage, work.seconds)
        memory = self.bandwidth * rates.optimizer.value
        updated = own.updated
        # Every rank accumulates the gradients of a micro-batch: reads them, reads and writes the fp32 sum.
        added = own.trained * (self.value + 8) * count / (self.bandwidth * rates.memory.value)
        reads = layout.data * (self.share if self.hardware.is_cpu else 1)
        tokens = self.layout.global_batch * layout.rows_per_sample * layout.sequence_length
        return StepTime(
            gemm=work.gemm * count,
            attention=work.attention * count,
            elementwise=work.elementwise * count + added,
            loss=work.loss * count,
            recompute=work.recompute * count,
            communication=sum(message.exposed for message in messages),
            bubble=bubble,
            optimizer=updated * (ADAM_BYTES + NORM_BYTES) / memory,
            memory=updated * PULL_BYTES / memory if self.recipe.uses_ewc else 0.0,
            reference=self._reference(count),
            data=tokens * rates.data_seconds.value / max(1, reads if self.hardware.is_cpu else layout.data),
            overhead=rates.step_seconds.value,
            traffic=tuple(messages),
        )

    def forward_seconds(self) -> float:
        """Return the time of the forward pass of a micro-batch through the whole model, as in an evaluation."""
        layers = self._layer_forward().times(self.model.num_layers / self.layout.pipeline)
        return layers.seconds + self._head(backward=False).seconds

    def _gemm(self, rows: float, inputs: float, outputs: float, *, in_layer: bool = True) -> float:
        """Return the time of a product [rows, inputs] x [inputs, outputs]; FP8 applies only within layers."""
        flops = 2 * rows * inputs * outputs
        if in_layer and self.recipe.distributed.precision == "FP8":
            return flops / (self.hardware.fp8_flops * self.rates.gemm_fp8.value)
        if not flops:
            return 0.0
        # Not the output projection: it runs in chunks of tokens, each with an fp32 sum of its gradient.
        share = self.rates.gemm_share(flops, math.sqrt(inputs * outputs)) if in_layer else self.rates.gemm_share(flops)
        return flops / (self.peak * share)

    def _linears(self) -> Iterator[tuple[float, float, float, bool, float]]:
        """Yield rows, inputs, outputs, True if the weight is trained, and the count of each product of a layer on a
        rank."""
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
            # With a balanced load each expert of a rank gets its share of the tokens of all ranks of the group.
            experts = moe.num_experts // self.layout.expert
            rows = self.own_tokens * moe.num_experts_per_tok / experts
            f, h = self.model.intermediate_size, self.model.hidden_size
            yield rows, h, 2 * f, not frozen, experts
            yield rows, f, h, not frozen, experts

    def _layer_forward(self) -> _Work:
        """Return the forward time of one layer."""
        gemm = sum(self._gemm(rows, a, b) * times for rows, a, b, _, times in self._linears())
        if self.recipe.quantization is not None:
            gemm += self._unpacked()
        return self._at_least(
            _Work(gemm, self._attention(1.0, self.rates.attention_forward.value), self._values(backward=False)),
            FORWARD_OPS,
        )

    def _layer_backward(self) -> _Work:
        """Return the backward time of one layer: two products per trained weight, one per frozen weight."""
        gemm = sum(
            self._gemm(rows, a, b) * times * (2 if trained else 1) for rows, a, b, trained, times in self._linears()
        )
        if self.recipe.quantization is not None:
            gemm += self._unpacked()
        return self._at_least(
            # 2.5: see `attention.BACKWARD_WORK`.
            _Work(gemm, self._attention(2.5, self.rates.attention_backward.value), self._values(backward=True)),
            BACKWARD_OPS,
        )

    def _unpacked(self) -> float:
        """Return the time to dequantize the 4-bit weights of a layer: half a byte is read, a value written and read."""
        found = parameters_of(self.recipe, self.layout, Chunk(1, False, False))
        elements = sum(sum(parameter.codes) for parameter in found)
        return elements * (0.5 + 2 * self.value) / (self.bandwidth * self.rates.memory.value)

    def _at_least(self, work: _Work, ops: int) -> _Work:
        """Add host time: on a CPU to the compute time; on a GPU only where short kernels leave the queue empty."""
        # A recorded layer is a single launch.
        least = (1 if self.recipe.distributed.cuda_graphs else ops) * self.rates.op_seconds.value
        if self.hardware.is_cpu:
            return replace(work, elementwise=work.elementwise + least)
        return replace(work, elementwise=work.elementwise + max(0.0, least - work.seconds))

    def _attention(self, factor: float, share: float) -> float:
        """Return the time of causal attention of a layer: `factor` times the forward FLOP at `share` of the peak."""
        rows = self.layout.micro_batch_size * self.layout.rows_per_sample
        length, heads = self.layout.padded_length, self.model.num_heads // self.layout.tensor
        flops = 2 * rows * length**2 / self.layout.context * heads * self.model.head_size
        return factor * flops / (self.peak * share)

    def _values(self, *, backward: bool) -> float:
        """Return the time of the elementwise work of a layer."""
        return value_bytes(self, backward=backward) / (self.bandwidth * self.rates.memory.value)

    def _head(self, *, backward: bool = True) -> _Work:
        """Return the time of output projection and loss, in chunks of tokens as in `ops.linear_cross_entropy`."""
        model, tensor = self.model, self.layout.tensor
        vocabulary = math.ceil(model.vocab_size / tensor)
        chunk = min(self.tokens, 256 if self.hardware.is_cpu else 4096)
        times = self.tokens / chunk
        trained = self.recipe.lora is None
        products = 1 if not backward else 3 if trained else 2
        gemm = products * times * self._gemm(chunk, model.hidden_size, vocabulary, in_layer=False)
        # Three passes over the logits; and per chunk the fp32 gradient sum of the projection is read and written.
        passes = 3.0 * self.tokens * vocabulary * self.value
        if backward and trained:
            passes += times * vocabulary * model.hidden_size * (8 + (0 if self.value == 4 else 4))
        return _Work(gemm=gemm, loss=passes / (self.bandwidth * self.rates.loss.value))

    def _micro_batch(self, stage: int) -> _Work:
        """Return the compute time of a micro-batch on one pipeline rank, forward and backward."""
        own = chunks_of(self.layout, self.model.num_layers, stage)
        layers = sum(chunk.layers for chunk in own)
        forward, backward = self._layer_forward(), self._layer_backward()
        again = 0.0
        if self.layout.recompute == "full":
            # The result of ring attention is kept, since recomputing it would communicate again.
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
        """Return the time to recompute the feed-forward network of a layer (selective recomputation)."""
        linears = list(self._linears())
        names = [p.name for p in parameters_of(self.recipe, self.layout, Chunk(1, False, False)) if len(p.shape) > 1]
        if self.recipe.moe is not None:
            return sum(self._gemm(rows, a, b) * times for rows, a, b, _, times in linears[-2:])
        dense = [self._gemm(r, a, b) for (r, a, b, _, _), n in zip(linears, names, strict=False) if n[:3] == "fc1"]
        dense += [self._gemm(r, a, b) for (r, a, b, _, _), n in zip(linears, names, strict=False) if n[:3] == "fc2"]
        swiglu = (7 if self.hardware.is_cpu else 3) * self.tokens * self.model.intermediate_size / self.layout.tensor
        return sum(dense) + swiglu * self.value / (self.bandwidth * self.rates.memory.value)

    def _reference(self, count: int) -> float:
        """Return the time of the reference forward passes of `count` micro-batches (DPO)."""
        dpo = self.recipe.dpo
        if dpo is None or dpo.reference_free:
            return 0.0
        # A cached reference is one pass over all pairs, which costs the same as the reference of one epoch.
        return count * self.forward_seconds() * self.layout.pipeline

    # Communication.

    def _rate(self, size: int, stride: int) -> tuple[str, float]:
        """Return the slowest link of a group and its bandwidth per rank, in bytes per second.

        Args:
            size: number of ranks of the group.
            stride: distance between neighbors in the group, in ranks.
        """
        members = max(1, min(size, self.hardware.node_size // stride))
        inside = self.hardware.link * self.rates.link.value
        if members >= size:
            return "link", inside
        # Each group uses as many network adapters of a machine as it has members there.
        return "network", min(
            inside if members > 1 else math.inf, members * self.hardware.network * self.rates.network.value
        )

    def _message(
        self, collective: str, payload: float, size: int, stride: int, *, times: float = 1.0, hidden: float = 0.0
    ) -> Traffic:
        """Return the bytes and the time of a collective.

        Args:
            payload: size of the whole tensor that is gathered, scattered, reduced or exchanged, in bytes.
            times: number of such collectives.
            hidden: compute time that can overlap with it, in seconds.
        """
        link, rate = self._rate(size, stride)
        # An all-to-all has no ring over several adapters: each rank sends through its own one.
        if collective == "all-to-all" and link == "network":
            rate = self.hardware.network * self.rates.network.value
        # Ring algorithms: a rank sends (n - 1) / n of the tensor, twice for an all-reduce.
        share = (size - 1) / size * (2 if collective == "all-reduce" else 1)
        sent = payload if collective == "send" else share * payload
        seconds = (sent / rate + HOP_SECONDS * math.ceil(math.log2(max(2, size)))) * times
        exposed = max(0.0, seconds - hidden * self.rates.overlap.value)
        return Traffic(collective, link, sent * times, seconds, exposed)

    def _micro_traffic(self, stage: int) -> list[Traffic]:
        """Return the messages of one micro-batch on one pipeline rank."""
        layout, model = self.layout, self.model
        own = chunks_of(layout, model.num_layers, stage)
        layers = sum(chunk.layers for chunk in own)
        passes = 2 + (1 if layout.recompute == "full" else 0)
        full = self.tokens * model.hidden_size * self.value
        found = []
        if layout.tensor > 1:
            # Two per layer and pass; sequence parallelism replaces each by all-gather and reduce-scatter, same bytes.
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
        """Return the messages of ring attention in `layers` layers, forward and backward."""
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
            overlap = flops / (self.peak * share) * self.rates.overlap.value if cost.num_steps > 1 else 0.0
            seconds = sent / rate + HOP_SECONDS
            times = layers * cost.num_steps
            found.append(Traffic(schedule, link, sent * times, seconds * times, max(0.0, seconds - overlap) * times))
        return found

    def _sharded_traffic(self, stage: int, layers: int) -> list[Traffic]:
        """Return the FSDP messages: weights gathered for the forward and backward pass, gradients scattered in fp32."""
        replicas = self.layout.data * self.layout.context
        own = totals(self.recipe, self.layout, stage)
        weights, trained = own.elements, own.trained + own.expert
        work = self._micro_batch(stage).seconds
        stride, units = self.layout.tensor, layers + 1
        gathered = self._message("all-gather", 2 * weights * self.value / units, replicas, stride, times=units)
        scattered = self._message("reduce-scatter", 4 * trained / units, replicas, stride, times=units)
        total = gathered.seconds + scattered.seconds
        # The first all-gather and the last reduce-scatter have no compute to overlap with.
        bare = total / units
        exposed = bare + max(0.0, total - bare - work * self.rates.overlap.value)
        return [replace(m, exposed=exposed * m.seconds / total) for m in (gathered, scattered)]

    def _gradient_traffic(self, stage: int, micro_seconds: float) -> list[Traffic]:
        """Return the messages once per step: gradients reduced over the data and context ranks, weights gathered."""
        layout, replicas = self.layout, self.layout.data * self.layout.context
        found = []
        overlap = 0.0
        if self.recipe.distributed.overlap_communication and not self.hardware.is_cpu:
            overlap = micro_seconds
        own = totals(self.recipe, layout, stage)
        if layout.strategy != "FSDP" and replicas > 1:
            for expert in (False, True):
                elements = own.expert if expert else own.trained
                ranks = replicas * layout.tensor // layout.expert if expert else replicas
                stride = layout.tensor * layout.context * layout.expert if expert else layout.tensor
                if not elements or ranks < 2:
                    continue
                if layout.distributed_optimizer:
                    # Gradients overlap with the last backward pass (two thirds of the work), weights with the next
                    # forward pass (one third).
                    found.append(self._message("reduce-scatter", 4 * elements, ranks, stride, hidden=overlap * 2 / 3))
                    found.append(self._message("all-gather", self.value * elements, ranks, stride, hidden=overlap / 3))
                else:
                    found.append(self._message("all-reduce", 4 * elements, ranks, stride, hidden=overlap * 2 / 3))
        # Tied embeddings exist on the first and the last stage, which sum their gradients.
        if self.model.tie_embeddings and layout.pipeline > 1:
            vocabulary = 4 * math.ceil(self.model.vocab_size / layout.tensor) * self.model.hidden_size
            found.append(self._message("all-reduce", vocabulary, 2, layout.world_size // layout.pipeline))
        return found


def value_bytes(clock: Clock, *, backward: bool) -> float:
    """Return the memory traffic of the elementwise work of a layer in bytes; kernels on a CPU are not fused."""
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
    """Return the number of values read and written by the norms, residuals, rotation and activation of a layer.

    Args:
        hidden: number of values of the residual stream.
        heads: number of values of queries and keys.
        stacked: number of values of the output of the stacked QKV projection.
        width: number of values of one half of the output of the first feed-forward projection.
    """
    # Passes over each tensor, counted from the kernels: two norms per layer, SwiGLU with two inputs and one output.
    if on_cpu:
        norms, swiglu = (16, 7) if not backward else (32, 13)
    else:
        norms, swiglu = (4, 3) if not backward else (8, 5)
    return hidden * (norms + 6) + 9 * heads + 2 * stacked + swiglu * width


def resolved_schedule(layout: Layout, kv_heads: int, node: int) -> tuple[str, int]:
    """Return the schedule of ring attention and the size of its a2a groups, as `ops.ring_attention` chooses them.

    Args:
        kv_heads: key-value heads per tensor-parallel rank.
        node: number of context-parallel ranks per machine.
    """
    size = layout.context
    inner = max(n for n in range(1, min(size, node) + 1) if size % n == 0 and kv_heads % n == 0)
    if layout.context_schedule != "auto":
        return layout.context_schedule, inner
    if size <= node:
        return ("a2a" if kv_heads % size == 0 else "p2p"), inner
    return ("a2a+p2p" if inner > 1 else "p2p"), inner
