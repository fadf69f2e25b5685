"""Router of a mixture of experts: choice and weights of the experts of each token, capacity, and load balancing.

Capacity and balance refer to the tokens that a setting names (a sequence, a micro-batch), whichever ranks hold them:
tensor- and context-parallel ranks add up their counts. Tokens after a row's last target are padding: they are sent to
experts like all others, but take no place from another token and are not counted.

Shapes: S tokens per sequence on this rank, B rows, T = S * B tokens, H hidden size, E experts, k experts per token.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from igla_mega.config.features import Moe
from igla_mega.data.micro_batch import Routing
from igla_mega.distributed.mesh import Mesh
from igla_mega.model.shards import ParameterState, Shard
from igla_mega.ops.zigzag import zigzag_join, zigzag_split


class RouterContext:
    """State that all routers of one model chunk share."""

    def __init__(self) -> None:
        self.routing = Routing()
        """Row weights and padding mask of the micro-batch in its forward pass; set by `CausalLM.forward`."""
        self.counts = True
        """False while a Fisher is estimated: tokens are then neither counted nor balanced."""


class Router(MegatronModule):
    """Sends each token to the `num_experts_per_tok` experts with the highest logits, computed in fp32.

    As Mixtral: Jiang et al. 2024, arXiv:2401.04088, section 2.1.
    """

    shared: RouterContext
    """One object for all routers of a chunk, set by `model.experts.connect`."""

    def __init__(self, config: TransformerConfig, pg_collection: ProcessGroupCollection, *, moe: Moe):
        super().__init__(config=config)
        self.moe, self.layer_number = moe, 0
        self.weight = nn.Parameter(torch.empty(moe.num_experts, config.hidden_size, dtype=config.params_dtype))
        # With sequence parallelism each rank routes only its own tokens, so the gradient is a partial sum: this mark
        # makes mcore sum it over the tensor-parallel ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        if moe.bias_update_rate > 0:
            # Always fp32: steps of 1e-3 would be lost in bf16. `move_biases` updates it, no
            # gradient does.
            self.expert_bias = nn.Parameter(torch.empty(moe.num_experts, dtype=torch.float32), requires_grad=False)
        self._groups = pg_collection
        self._tally: Tensor | None = None
        self._to_recompute: deque[Routing] = deque()

    def set_layer_number(self, layer_number: int) -> None:
        """Store the layer's number, counted from 1 over all pipeline stages; megatron-core calls it."""
        self.layer_number = layer_number

    def forward(self, hidden: Tensor, *_) -> tuple[Tensor, Tensor]:
        """Route tokens.

        Args:
            hidden: [S, B, H], this rank's tokens.

        Returns:
            Weights of the experts' outputs, [T, E] fp32, 0 for experts not chosen; and the routing map, [T, E] bool,
            True where a token is sent to an expert.
        """
        routing, moe = self._routing(), self.moe
        length, rows = hidden.shape[:2]
        logits = _Logits.apply(hidden.flatten(0, 1), self.weight)  # [T, E]
        probabilities = logits.softmax(-1)
        chosen = self._choose(logits)  # [T, k]
        weights = (probabilities.gather(1, chosen)) if moe.pre_softmax else logits.gather(1, chosen).softmax(-1)
        # Dense again: the dispatchers of megatron-core take a weight and a mark for every expert.
        weights = torch.zeros_like(logits).scatter(1, chosen, weights)  # [T, E]
        routing_map = torch.zeros_like(logits, dtype=torch.bool).scatter(1, chosen, True)
        real = routing.real
        # In evaluation the mask may be that of the last training batch, of another shape.
        if real is None or not self.training:
            real = torch.ones(length, rows, dtype=torch.bool, device=hidden.device)  # [S, B]
        kept = routing_map
        if self.training and self.config.moe_expert_capacity_factor is not None:
            kept = self._within_capacity(weights.detach(), routing_map, real)
        # A recomputed layer runs twice, first without gradients: it is counted only once, in the second run.
        if self.training and torch.is_grad_enabled() and self.shared.counts:
            balance = self._balance(probabilities, routing_map, real, routing.weights)
            if moe.router_aux_loss_coef > 0:
                weights = _WithLoss.apply(weights, balance * moe.router_aux_loss_coef)
            self._count(probabilities.detach(), routing_map, kept, real, balance.detach())
        if kept is not routing_map:
            weights = weights * kept
        return (weights if moe.scaling_factor == 1.0 else weights * moe.scaling_factor), kept

    def _routing(self) -> Routing:
        """Return the facts about the micro-batch whose tokens are being routed.

        megatron-core runs a checkpointed layer first without gradients, then again with them, in the same order. Other
        micro-batches may have passed through the chunk in between (pipeline stages), so `shared` then describes a
        later one: the facts are queued in the first run and taken from the queue in the second.
        """
        if self.training and not torch.is_grad_enabled():
            self._to_recompute.append(self.shared.routing)
        elif self.training and self._to_recompute:
            return self._to_recompute.popleft()
        return self.shared.routing

    @torch.no_grad()
    def _choose(self, logits: Tensor) -> Tensor:
        """Return the numbers of each token's experts, [T, k], from logits [T, E]."""
        moe = self.moe
        if moe.force_balanced:
            routing_map = torch.arange(len(logits) * moe.num_experts_per_tok, device=logits.device) % moe.num_experts
            return routing_map.view(len(logits), moe.num_experts_per_tok)
        # The bias decides on the choice alone, not on the weights: it distorts no output (Wang et al. 2024).
        scores = logits + self.expert_bias if moe.bias_update_rate > 0 else logits
        return scores.topk(moe.num_experts_per_tok, dim=1).indices

    @torch.no_grad()
    def _within_capacity(self, weights: Tensor, routing_map: Tensor, real: Tensor) -> Tensor:
        """Return the part of the routing map [T, E] within the experts' capacity: the highest weights, padding last.

        Args:
            weights: [T, E] fp32, in 0 to 1.
            real: [S, B], False for padding.
        """
        length, rows = real.shape
        # Weights are at most 1: chosen real tokens get 1 to 2, chosen padding 0 to 1, and what was not chosen less
        # than 0 (its weight is 0), which only `pad_to_capacity` can reach.
        scores = torch.where(routing_map, weights + real.reshape(-1, 1), weights - 1.0).view(length, rows, -1)
        over = self.moe.capacity_over
        if over == "sequence":
            scores, wide = self._whole_sequences(scores), self._whole_sequences(real[..., None])
            # scores: [whole S, B, E], wide: [whole S, B, 1]
            room = self._capacity(wide.sum(0))  # [B, 1]
            return (self._own_tokens(_ranks(scores, 0) < room) & routing_map.view(length, rows, -1)).flatten(0, 1)
        if over == "global":
            group = self._groups.tp_dp_cp
            everyones = _gather(scores.flatten(0, 1), group)  # [ranks, T, E]
            num_real = _gather(real.sum().view(1), group).sum()
            ranks = _ranks(everyones.flatten(0, 1), 0).view_as(everyones)[group.rank()]
            return (ranks < self._capacity(num_real)) & routing_map
        ranks = _ranks(scores.flatten(0, 1), 0)  # [T, E]
        # Padding counts, as in megatron-core: the size of the experts' batches must not depend on the data.
        kept = ranks < self._capacity(torch.tensor(length * rows, device=ranks.device))
        return kept if self.moe.pad_to_capacity else kept & routing_map

    def _capacity(self, num_tokens: Tensor) -> Tensor:
        """Return how many of `num_tokens` tokens an expert accepts: the fair share times the capacity factor."""
        share = num_tokens.double() * self.moe.num_experts_per_tok / self.moe.num_experts
        # 1.1 * 50 is 55.00000000000001 in fp64, and must not become 56.
        return (share * self.config.moe_expert_capacity_factor - 1e-9).ceil()

    def _whole_sequences(self, own: Tensor) -> Tensor:
        """Gather the values of whole sequences, [whole S, B, ...], from those of each rank's tokens, [S, B, ...]."""
        tensor, context = self._sequence_ranks()
        if tensor * context == 1:
            return own
        # Ranks of the group are ordered with the tensor axis innermost: [context * tensor, S, B, ...] becomes
        # [context, tensor * S, B, ...], the zig-zag shards.
        parts = _gather(own, self._groups.tp_cp).unflatten(0, (context, tensor)).flatten(1, 2)
        return zigzag_join(list(parts), 0) if context > 1 else parts[0]

    def _own_tokens(self, whole: Tensor) -> Tensor:
        """Return this rank's part, [S, B, ...], of values of whole sequences: the inverse of `_whole_sequences`."""
        tensor, context = self._sequence_ranks()
        own = zigzag_split(whole, context, 0)[self._groups.cp.rank()] if context > 1 else whole
        return own.chunk(tensor)[self._groups.tp.rank()] if tensor > 1 else own

    def _sequence_ranks(self) -> tuple[int, int]:
        """Return how many tensor-parallel and how many context-parallel ranks share the tokens of a sequence."""
        return self._groups.tp.size() if self.config.sequence_parallel else 1, self._groups.cp.size()

    def _balance(self, probabilities: Tensor, routing_map: Tensor, real: Tensor, weights: Tensor | None) -> Tensor:
        """Return this rank's addend of the balancing loss, E * sum over experts e of f_e * P_e.

        f_e is the share of routed tokens that expert e receives, over all tokens that are balanced together, and
        constant for the gradient; P_e is the mean probability of e, of which each rank contributes its own tokens. The
        sum of the addends over the ranks is the loss (Fedus et al. 2021, arXiv:2101.03961, eq. 4). Tokens dropped
        later for lack of capacity count like all others.

        Args:
            probabilities: [T, E] fp32.
            real: [S, B], False for padding.
            weights: [B], number of targets of each row, by which the losses are multiplied, since megatron-core
                divides all gradients by the number of targets of the global batch; None gives 0.
        """
        moe = self.moe
        groups = real.size(1) if moe.balance_over == "sequence" else 1  # G: tokens of one group are balanced together
        place = real.reshape(-1, groups, 1)  # [T / G, G, 1]
        # The number of tokens is the last column, so that one all-reduce sums both.
        counted = torch.cat([routing_map.view(-1, groups, moe.num_experts) & place, place], -1).sum(0)
        counted = counted.to(torch.float32)  # [G, E + 1]
        if math.prod(self._sequence_ranks()) > 1:
            dist.all_reduce(counted, group=self._groups.tp_cp)
        visited, num_tokens = counted[:, :-1], counted[:, -1:].clamp(min=1)
        share = visited / (num_tokens * moe.num_experts_per_tok)
        mean = (probabilities.view(-1, groups, moe.num_experts) * place).sum(0) / num_tokens  # [G, E]
        losses = moe.num_experts * (share * mean).sum(1)  # [G]
        if weights is None:
            return losses.new_zeros(())
        return (losses * (weights if moe.balance_over == "sequence" else weights.sum())).sum()

    @torch.no_grad()
    def _count(self, probabilities: Tensor, routing_map: Tensor, kept: Tensor, real: Tensor, balance: Tensor) -> None:
        """Add a micro-batch to this router's tally, [2E + 3] fp64.

        Its entries: tokens routed to each expert, those of them within capacity, tokens, summed entropy, summed
        balancing loss. They stay on the device: a copy per layer and micro-batch would wait for it each time.
        """
        rows = real.reshape(-1, 1)
        entropy = -(torch.xlogy(probabilities, probabilities).sum(-1) * rows[:, 0]).sum(dtype=torch.float64)
        sums = [(routing_map & rows).sum(0), (kept & routing_map & rows).sum(0), rows.sum().view(1)]
        tally = torch.cat([*(values.double() for values in sums), entropy.view(1), balance.double().view(1)])
        self._tally = tally if self._tally is None else self._tally + tally

    def take_tally(self) -> Tensor | None:
        """Return and clear what was counted since the last call, [2E + 3] fp64 as in `_count`; None if nothing."""
        tally, self._tally = self._tally, None
        return tally


@dataclass(frozen=True)
class Load:
    """Load of the experts of every layer in a step, over the global batch. Padding is not counted."""

    tokens_per_expert: list[list[float]]
    """For each layer, each expert's share of all routed tokens, before any is dropped. The fair share is 1 / E."""
    drop_rate: list[float]
    """For each layer, the share of routed tokens that exceeded their expert's capacity."""
    entropy: list[float]
    """For each layer, entropy of the router's probabilities, mean over tokens, in nats; at most ln E."""
    balance: list[float]
    """For each layer, the balancing loss before its coefficient, mean over micro-batches weighted by their targets."""

    @property
    def max_violation(self) -> list[float]:
        """For each layer, excess of the busiest expert over its fair share, as a multiple of the fair share.

        Wang et al. 2024, arXiv:2408.15664, eq. 4.
        """
        return [max(layer) * len(layer) - 1 for layer in self.tokens_per_expert]

    def starving(self, bound: float) -> list[tuple[int, int]]:
        """Return layer and number of the experts with less than `bound` times their fair share."""
        shares = (
            (layer, e, share * len(own))
            for layer, own in enumerate(self.tokens_per_expert)
            for e, share in enumerate(own)
        )
        return [(layer, expert) for layer, expert, share in shares if share < bound]

    def dropping(self, bound: float) -> list[int]:
        """Return the layers that drop more than the share `bound` of their routed tokens."""
        return [layer for layer, rate in enumerate(self.drop_rate) if rate > bound]


def routers_of(chunks: Iterable[nn.Module]) -> Iterator[Router]:
    """Yield the routers of model chunks, wrapped for data parallelism or not."""
    for chunk in chunks:
        yield from (module for module in chunk.modules() if isinstance(module, Router))


def bias_states(chunks: Iterable[nn.Module], mesh: Mesh) -> Iterator[ParameterState]:
    """Yield the routers' biases as a checkpoint stores them; they get no gradient, so no optimizer holds them."""
    for router in routers_of(chunks):
        if router.moe.bias_update_rate > 0:
            name, shape = f"decoder.layers.{router.layer_number - 1}.mlp.router.expert_bias", (router.moe.num_experts,)
            shard = Shard(name, shape, shape, None, mesh.tensor.rank, mesh.tensor.size, 1, sequence_parallel=False)
            yield ParameterState(shard, 0, {"master": router.expert_bias.detach()}, replicated=True)


def router_context(chunk: nn.Module) -> RouterContext | None:
    """Return the state shared by the routers of a model chunk; None for a dense model."""
    return next((router.shared for router in routers_of([chunk])), None)


def collect(chunks: Sequence[nn.Module], weight: float) -> Load | None:
    """Sum the routers' tallies since the last call over all ranks. Every rank calls it.

    Args:
        weight: sum of `Routing.weights` over the global batch, that is its number of targets.

    Returns:
        The load of the experts; None for a dense model.
    """
    routers = list(routers_of(chunks))
    if not routers:
        return None
    experts, num_layers = routers[0].moe.num_experts, routers[0].config.num_layers
    # Rows for the layers of all pipeline stages: one all-reduce over all ranks then joins stages and data ranks.
    sums = torch.zeros(num_layers, 2 * experts + 3, dtype=torch.float64, device=routers[0].weight.device)
    for router in routers:
        if (tally := router.take_tally()) is not None:
            sums[router.layer_number - 1] += tally
    dist.all_reduce(sums)
    tokens_per_expert, kept, rest = sums.cpu().split([experts, experts, 3], dim=1)
    total = tokens_per_expert.sum(1, keepdim=True).clamp(min=1)
    return Load(
        tokens_per_expert=(tokens_per_expert / total).tolist(),
        drop_rate=(1 - kept.sum(1) / total[:, 0]).tolist(),
        entropy=(rest[:, 1] / rest[:, 0].clamp(min=1)).tolist(),
        balance=(rest[:, 2] / max(weight, 1.0)).tolist(),
    )


@torch.no_grad()
def move_biases(chunks: Sequence[nn.Module], load: Load) -> None:
    """Raise the biases of experts with less than their fair share in the last step, and lower those of the others.

    Wang et al. 2024, arXiv:2408.15664, algorithm 1: by a constant step, the sign of the deviation alone.
    """
    for router in routers_of(chunks):
        if router.moe.bias_update_rate > 0:
            tokens_per_expert = torch.tensor(
                load.tokens_per_expert[router.layer_number - 1], device=router.expert_bias.device
            )
            router.expert_bias.add_(
                (tokens_per_expert.mean() - tokens_per_expert).sign(), alpha=router.moe.bias_update_rate
            )


def _ranks(scores: Tensor, dim: int) -> Tensor:
    """Return the rank of each score along `dim`: 0 for the highest; of equal scores the first one comes first."""
    # Stable, so that ties, of which padding has many, are broken in the same way on every device.
    order = scores.argsort(dim=dim, descending=True, stable=True)
    shape = [1] * scores.dim()
    shape[dim] = -1
    places = torch.arange(scores.size(dim), device=scores.device).view(shape).expand_as(order)
    return torch.empty_like(order).scatter_(dim, order, places)


def _gather(own: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return every rank's tensor, stacked to [ranks, ...]."""
    parts = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(parts, own.contiguous(), group=group)
    return torch.stack(parts)


class _Logits(torch.autograd.Function):
    """Product of hidden [T, H] and transposed weight [E, H] in fp32, which saves hidden in its own dtype.

    Autograd would save the fp32 copy, twice the memory of bf16, for every layer.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return hidden.float() @ weight.float().t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        hidden, weight = ctx.saved_tensors
        return (grad @ weight.float()).to(hidden.dtype), (grad.t() @ hidden.float()).to(weight.dtype)


class _WithLoss(torch.autograd.Function):
    """Returns a tensor unchanged, and adds a scalar to the loss: its gradient is 1 when the tensor's backward runs.

    The scalar needs no path to the last pipeline stage, where the loss is computed.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.ones_like(ctx.saved_tensors[0])
