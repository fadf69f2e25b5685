"""Which experts a token visits, how much each counts, and what keeps them equally busy.

Everything here is taken over the tokens that a setting names (a sequence, a micro-batch), wherever the ranks hold them:
tensor- and context-parallel ranks add up their counts. Tokens behind a row's last target are padding: they are sent to
experts like all others, but take nobody's place and count for nothing.
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
    """State that the routers of one chunk share."""

    def __init__(self) -> None:
        self.routing = Routing()
        """Facts about the micro-batch whose forward pass runs now; `CausalLM.forward` sets it."""
        self.counts = True
        """False while a Fisher is estimated: tokens are then neither counted nor balanced."""


class Router(MegatronModule):
    """Sends each token to its `num_experts_per_tok` best experts, in fp32 (as Mixtral: Jiang et al. 2024,
    arXiv:2401.04088, section 2.1)."""

    shared: RouterContext
    """One object for all routers of a chunk, set by `model.experts.connect`."""

    def __init__(self, config: TransformerConfig, pg_collection: ProcessGroupCollection, *, moe: Moe):
        super().__init__(config=config)
        self.moe, self.layer_number = moe, 0
        self.weight = nn.Parameter(torch.empty(moe.num_experts, config.hidden_size, dtype=config.params_dtype))
        # Each rank routes its own tokens: mcore sums such gradients over the tensor-parallel ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        if moe.bias_update_rate > 0:
            # No gradient reaches it: it is moved by what the experts had to do.
            self.expert_bias = nn.Parameter(torch.empty(moe.num_experts, dtype=torch.float32), requires_grad=False)
        self._groups = pg_collection
        self._tally: Tensor | None = None
        self._to_recompute: deque[Routing] = deque()

    def set_layer_number(self, layer_number: int) -> None:
        """Called by mcore: counted from 1 over all pipeline stages."""
        self.layer_number = layer_number

    def forward(self, hidden: Tensor, *_) -> tuple[Tensor, Tensor]:
        """Route tokens.

        Args:
            hidden: [S, B, H], this rank's tokens.

        Returns:
            What each expert's output counts for, [S * B, E] fp32, and whether the token goes there, bool.
        """
        routing, moe = self._routing(), self.moe
        length, rows = hidden.shape[:2]
        logits = _Logits.apply(hidden.flatten(0, 1), self.weight)
        probabilities = logits.softmax(-1)
        chosen = self._choose(logits)
        weights = (probabilities.gather(1, chosen)) if moe.pre_softmax else logits.gather(1, chosen).softmax(-1)
        weights = torch.zeros_like(logits).scatter(1, chosen, weights)
        routing_map = torch.zeros_like(logits, dtype=torch.bool).scatter(1, chosen, True)
        real = routing.real
        if real is None or not self.training:
            real = torch.ones(length, rows, dtype=torch.bool, device=hidden.device)
        kept = routing_map
        if self.training and self.config.moe_expert_capacity_factor is not None:
            kept = self._within_capacity(weights.detach(), routing_map, real)
        if self.training and torch.is_grad_enabled() and self.shared.counts:
            balance = self._balance(probabilities, routing_map, real, routing.weights)
            if moe.router_aux_loss_coef > 0:
                weights = _WithLoss.apply(weights, balance * moe.router_aux_loss_coef)
            self._count(probabilities.detach(), routing_map, kept, real, balance.detach())
        if kept is not routing_map:
            weights = weights * kept
        return (weights if moe.scaling_factor == 1.0 else weights * moe.scaling_factor), kept

    def _routing(self) -> Routing:
        """The micro-batch whose tokens these are.

        mcore runs a checkpointed layer first without gradients, then again with them, in the same order; by then other
        micro-batches may have gone through the chunk.
        """
        if self.training and not torch.is_grad_enabled():
            self._to_recompute.append(self.shared.routing)
        elif self.training and self._to_recompute:
            return self._to_recompute.popleft()
        return self.shared.routing

    @torch.no_grad()
    def _choose(self, logits: Tensor) -> Tensor:
        """The experts of each token, [T, k]."""
        moe = self.moe
        if moe.force_balanced:
            routing_map = torch.arange(len(logits) * moe.num_experts_per_tok, device=logits.device) % moe.num_experts
            return routing_map.view(len(logits), moe.num_experts_per_tok)
        scores = logits + self.expert_bias if moe.bias_update_rate > 0 else logits
        return scores.topk(moe.num_experts_per_tok, dim=1).indices

    @torch.no_grad()
    def _within_capacity(self, weights: Tensor, routing_map: Tensor, real: Tensor) -> Tensor:
        """Of the visits [T, E] those that the experts have room for: the most probable ones, padding last."""
        length, rows = real.shape
        # Below every visit lies what is none, which only `pad_to_capacity` can reach.
        scores = torch.where(routing_map, weights + real.reshape(-1, 1), weights - 1.0).view(length, rows, -1)
        over = self.moe.capacity_over
        if over == "sequence":
            scores, wide = self._whole_sequences(scores), self._whole_sequences(real[..., None])
            room = self._capacity(wide.sum(0))  # [B, 1]
            return (self._own_tokens(_ranks(scores, 0) < room) & routing_map.view(length, rows, -1)).flatten(0, 1)
        if over == "global":
            group = self._groups.tp_dp_cp
            everyones = _gather(scores.flatten(0, 1), group)  # [ranks, T, E]
            num_real = _gather(real.sum().view(1), group).sum()
            ranks = _ranks(everyones.flatten(0, 1), 0).view_as(everyones)[group.rank()]
            return (ranks < self._capacity(num_real)) & routing_map
        ranks = _ranks(scores.flatten(0, 1), 0)
        # As megatron-core counts a rank's tokens, padding included: without it no size would be known before.
        kept = ranks < self._capacity(torch.tensor(length * rows, device=ranks.device))
        return kept if self.moe.pad_to_capacity else kept & routing_map

    def _capacity(self, num_tokens: Tensor) -> Tensor:
        """Visits that an expert takes of so many tokens."""
        share = num_tokens.double() * self.moe.num_experts_per_tok / self.moe.num_experts
        # Whole numbers stay: a product such as 1.1 * 10 may lie a rounding above one.
        return (share * self.config.moe_expert_capacity_factor - 1e-9).ceil()

    def _whole_sequences(self, own: Tensor) -> Tensor:
        """[S, B, ...] of the whole sequences, from those of this rank's tokens."""
        tensor, context = self._sequence_ranks()
        if tensor * context == 1:
            return own
        parts = _gather(own, self._groups.tp_cp).unflatten(0, (context, tensor)).flatten(1, 2)
        return zigzag_join(list(parts), 0) if context > 1 else parts[0]

    def _own_tokens(self, whole: Tensor) -> Tensor:
        """This rank's tokens of whole sequences."""
        tensor, context = self._sequence_ranks()
        own = zigzag_split(whole, context, 0)[self._groups.cp.rank()] if context > 1 else whole
        return own.chunk(tensor)[self._groups.tp.rank()] if tensor > 1 else own

    def _sequence_ranks(self) -> tuple[int, int]:
        """How many tensor- and context-parallel ranks share a sequence's tokens."""
        return self._groups.tp.size() if self.config.sequence_parallel else 1, self._groups.cp.size()

    def _balance(self, probabilities: Tensor, routing_map: Tensor, real: Tensor, weights: Tensor | None) -> Tensor:
        """This rank's addend of the balancing loss: E * sum over experts of share of visits * mean probability.

        The share is a number to the gradient, of all tokens that are balanced together; the sum of the addends over
        the ranks that share them is the loss. What is dropped afterwards does not enter. It is multiplied by the
        weights of the rows, since mcore divides gradients by their sum over the whole batch.
        """
        moe = self.moe
        groups = real.size(1) if moe.balance_over == "sequence" else 1
        place = real.reshape(-1, groups, 1)
        counted = torch.cat([routing_map.view(-1, groups, moe.num_experts) & place, place], -1).sum(0)
        counted = counted.to(torch.float32)  # [groups, E + 1]
        if math.prod(self._sequence_ranks()) > 1:
            dist.all_reduce(counted, group=self._groups.tp_cp)
        visited, num_tokens = counted[:, :-1], counted[:, -1:].clamp(min=1)
        share = visited / (num_tokens * moe.num_experts_per_tok)
        mean = (probabilities.view(-1, groups, moe.num_experts) * place).sum(0) / num_tokens
        losses = moe.num_experts * (share * mean).sum(1)
        if weights is None:
            return losses.new_zeros(())
        return (losses * (weights if moe.balance_over == "sequence" else weights.sum())).sum()

    @torch.no_grad()
    def _count(self, probabilities: Tensor, routing_map: Tensor, kept: Tensor, real: Tensor, balance: Tensor) -> None:
        rows = real.reshape(-1, 1)
        entropy = -(torch.xlogy(probabilities, probabilities).sum(-1) * rows[:, 0]).sum(dtype=torch.float64)
        sums = [(routing_map & rows).sum(0), (kept & routing_map & rows).sum(0), rows.sum().view(1)]
        tally = torch.cat([*(values.double() for values in sums), entropy.view(1), balance.double().view(1)])
        self._tally = tally if self._tally is None else self._tally + tally

    def take_tally(self) -> Tensor | None:
        """What was counted since this was called last: [2E + 3] fp64, see `collect`."""
        tally, self._tally = self._tally, None
        return tally


@dataclass(frozen=True)
class Load:
    """What the experts of every layer had to do in a step, over the global batch."""

    tokens_per_expert: list[list[float]]
    """For each layer, each expert's share of all visits, before any is dropped. Fair is 1 / E."""
    drop_rate: list[float]
    """For each layer, the share of visits that found no room."""
    entropy: list[float]
    """For each layer, of the router's probabilities, mean over tokens, nats. ln E is the most."""
    balance: list[float]
    """For each layer, the balancing loss before its coefficient, mean over micro-batches by their targets."""

    @property
    def max_violation(self) -> list[float]:
        """For each layer, by how much the busiest expert exceeds its fair share, as a multiple of that (Wang et al.
        2024, arXiv:2408.15664, eq. 4)."""
        return [max(layer) * len(layer) - 1 for layer in self.tokens_per_expert]

    def starving(self, bound: float) -> list[tuple[int, int]]:
        """Layer and expert of those with less than `bound` times their fair share."""
        shares = (
            (layer, e, share * len(own))
            for layer, own in enumerate(self.tokens_per_expert)
            for e, share in enumerate(own)
        )
        return [(layer, expert) for layer, expert, share in shares if share < bound]

    def dropping(self, bound: float) -> list[int]:
        """Layers that drop more than `bound` of the visits."""
        return [layer for layer, rate in enumerate(self.drop_rate) if rate > bound]


def routers_of(chunks: Iterable[nn.Module]) -> Iterator[Router]:
    """The routers of model chunks, wrapped or not."""
    for chunk in chunks:
        yield from (module for module in chunk.modules() if isinstance(module, Router))


def bias_states(chunks: Iterable[nn.Module], mesh: Mesh) -> Iterator[ParameterState]:
    """The routers' biases, as a checkpoint keeps them: no optimizer has them."""
    for router in routers_of(chunks):
        if router.moe.bias_update_rate > 0:
            name, shape = f"decoder.layers.{router.layer_number - 1}.mlp.router.expert_bias", (router.moe.num_experts,)
            shard = Shard(name, shape, shape, None, mesh.tensor.rank, mesh.tensor.size, 1, sequence_parallel=False)
            yield ParameterState(shard, 0, {"master": router.expert_bias.detach()}, replicated=True)


def router_context(chunk: nn.Module) -> RouterContext | None:
    """What the routers of a model chunk share; None for a dense one."""
    return next((router.shared for router in routers_of([chunk])), None)


def collect(chunks: Sequence[nn.Module], weight: float) -> Load | None:
    """Sum what this rank's routers and all others have counted since the last call. Every rank calls it.

    Args:
        weight: of all micro-batches together (`Routing.weights`).

    Returns:
        None for a dense model.
    """
    routers = list(routers_of(chunks))
    if not routers:
        return None
    experts, num_layers = routers[0].moe.num_experts, routers[0].config.num_layers
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
    """Raise the bias of experts that had too little to do in the last step, and lower the others'."""
    for router in routers_of(chunks):
        if router.moe.bias_update_rate > 0:
            tokens_per_expert = torch.tensor(
                load.tokens_per_expert[router.layer_number - 1], device=router.expert_bias.device
            )
            router.expert_bias.add_(
                (tokens_per_expert.mean() - tokens_per_expert).sign(), alpha=router.moe.bias_update_rate
            )


def _ranks(scores: Tensor, dim: int) -> Tensor:
    """Place of each score along a dim, from 0, the highest first; of equal ones the first first."""
    order = scores.argsort(dim=dim, descending=True, stable=True)
    shape = [1] * scores.dim()
    shape[dim] = -1
    places = torch.arange(scores.size(dim), device=scores.device).view(shape).expand_as(order)
    return torch.empty_like(order).scatter_(dim, order, places)


def _gather(own: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[ranks, ...] of every rank's tensor."""
    parts = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(parts, own.contiguous(), group=group)
    return torch.stack(parts)


class _Logits(torch.autograd.Function):
    """hidden [T, H] times weight [E, H] transposed, in fp32, keeping hidden in its own type."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return hidden.float() @ weight.float().t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        hidden, weight = ctx.saved_tensors
        return (grad @ weight.float()).to(hidden.dtype), (grad.t() @ hidden.float()).to(weight.dtype)


class _WithLoss(torch.autograd.Function):
    """Hand a tensor on, and add a scalar to the loss: its gradient is 1 wherever the tensor's backward pass comes."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.ones_like(ctx.saved_tensors[0])
