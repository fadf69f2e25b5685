"""Implement Elastic Weight Consolidation (Kirkpatrick et al. 2017, arXiv:1612.00796) on the optimizer's shards.

The penalty is `lambda / 2 * sum_i F_i (theta_i - theta*_i)^2` in nats per token, where F is the diagonal Fisher
information per token of an earlier task and theta* (the anchor) the weights at which it was estimated. Fisher and
anchor are two more fp32 values of each optimizer state: they are sharded, saved and resharded like its moments.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from igla_mega.config.errors import ConfigError
from igla_mega.distributed.mesh import Mesh
from igla_mega.model.shards import ParameterState
from igla_mega.ops.ewc_penalty import ewc_pull_

PER_TOKEN = "per token"
"""Normalization of F: the sum over samples of (gradient of the sample's summed loss)^2, divided by all their tokens."""

Coupling = Literal["coupled", "decoupled", "proximal"]
Merging = Literal["online", "separate", "laplace"]


@dataclass(frozen=True)
class FisherMetadata:
    """Origin of a Fisher estimate, stored with it: values of lambda are comparable only for the same origin."""

    normalization: str
    """`PER_TOKEN`."""
    labels: str
    """`model`: labels drawn from the model's predictions; `data`: labels of the data (the empirical Fisher)."""
    samples: int
    """Number of samples, summed over the merged phases."""
    tokens: int
    """Number of tokens, summed over the merged phases."""
    sequence_length: int
    """Tokens per sample."""
    seed: int
    """Seed of the samples and of drawn labels."""
    sources: tuple[str, ...]
    """Names of the data domains that the estimate covers."""
    model: str
    """Digest of the anchor weights; empty if they belong to no single model."""

    def merged(self, later: "FisherMetadata", anchor_is_latest: bool) -> "FisherMetadata":
        """Return the metadata of this estimate merged with a later one.

        Args:
            later: metadata of the newer estimate.
            anchor_is_latest: True if the merged anchor is the newest weights, False if it is a mean of several.
        """
        return FisherMetadata(
            self.normalization,
            later.labels,
            self.samples + later.samples,
            self.tokens + later.tokens,
            later.sequence_length,
            later.seed,
            (*self.sources, *later.sources),
            later.model if anchor_is_latest else "",
        )


@dataclass(frozen=True)
class Pull:
    """Penalty and gradient norms of one step."""

    nats: float
    """Value of the penalty before the update, in nats per token."""
    grad_norm: float
    """L2 norm of the penalty's gradient over all parameters."""
    task_grad_norm: float
    """L2 norm of the gradient that it was added to."""


@dataclass(frozen=True)
class FisherAnchor:
    """Fisher information and anchor weights of one optimizer state, 1-D fp32 of the state's length."""

    fisher: Tensor
    """Diagonal Fisher information per token, not negative."""
    anchor: Tensor
    """Weights at which the Fisher information was estimated."""


@dataclass
class Ewc:
    """Penalty towards the weights of earlier tasks; inactive until the first consolidation sets `anchors`."""

    mesh: Mesh
    ewc_lambda: float
    """Stiffness of the penalty, dimensionless."""
    coupling: Coupling = "coupled"
    """Place of the penalty's gradient in the step (`engine.optimizer.step_with_ewc`)."""
    metadata: FisherMetadata | None = None
    """Origin of the anchors; None until the first consolidation."""
    anchors: list[FisherAnchor] = field(default_factory=list)
    """Fisher and anchor of each optimizer state, in the order of the states."""
    # Weight in sums over all ranks, and the indices of the states with that weight (`_by_weight`).
    _groups: list[tuple[float, list[int]]] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """True if a penalty is active."""
        return bool(self.anchors)

    def hold(self, states: Sequence[ParameterState], anchors: list[FisherAnchor], metadata: FisherMetadata) -> None:
        """Replace the anchors; from now on the penalty uses these.

        Args:
            states: optimizer states of this rank.
            anchors: Fisher and anchor of each state, in the same order.
            metadata: origin of the anchors.

        Raises:
            ConfigError: a value is not finite, or a Fisher value is negative.
        """
        assert len(states) == len(anchors), "one anchor for each state"
        self.refuse_broken(states, anchors)
        self.anchors, self.metadata = anchors, metadata
        self._groups = _by_weight(states, self.mesh)

    def refuse_broken(self, states: Sequence[ParameterState], anchors: Sequence[FisherAnchor]) -> None:
        """Raise on every rank if a value on any rank is not finite, or a Fisher value is negative.

        Raises:
            ConfigError: names the first such parameter.
        """
        problem = ""
        for state, held in zip(states, anchors, strict=True):
            # Two reductions find every case: the minimum is NaN if any value is, and the maximum shows an infinity.
            if held.fisher.numel() and not (float(held.fisher.min()) >= 0 and math.isfinite(float(held.fisher.max()))):
                problem = f"the Fisher of {state.shard.name} is negative or not finite"
            elif held.anchor.numel() and not bool(torch.isfinite(held.anchor).all()):
                problem = f"the anchor of {state.shard.name} is not finite"
        problems: list = [None] * self.mesh.world_size
        dist.all_gather_object(problems, problem, group=self.mesh.host_group)
        if any(problems):
            raise ConfigError(
                f"ewc: {next(one for one in problems if one)}, so it cannot be used as a penalty.\n"
                "  Estimate it again with a model whose loss is finite on its data."
            )

    def allocate(self, states: Sequence[ParameterState]) -> list[FisherAnchor]:
        """Allocate zero anchors for these states, into which a checkpoint is read."""
        return [
            FisherAnchor(torch.zeros_like(s.values["master"]), torch.zeros_like(s.values["master"])) for s in states
        ]

    def with_state(self, states: Iterable[ParameterState]) -> Iterator[ParameterState]:
        """Yield the states with `fisher` and `anchor` added to their values, so that checkpoints contain them."""
        if not self.anchors:
            yield from states
            return
        for state, held in zip(states, self.anchors, strict=True):
            yield state._replace(values={**state.values, "fisher": held.fisher, "anchor": held.anchor})

    def pull(self, states: Sequence[ParameterState], gradients: Sequence[Tensor]) -> Pull:
        """Add `lambda * F * (theta - theta*)` to the gradients, in place.

        The gradients must be reduced over ranks, divided by the number of targets and unscaled, so that the result does
        not depend on the number of ranks, micro-batches or tokens.

        Args:
            states: optimizer states with `master` values, in the order of the anchors.
            gradients: 1-D gradient of each state.

        Returns:
            The penalty and norms over all parameters of all ranks.
        """
        # Replicated states pull on every rank, but their share of the sums must count once in the reduction.
        sums = torch.zeros(3, dtype=torch.float64, device=gradients[0].device if gradients else None)
        for share, members in self._groups:
            sums += share * ewc_pull_(
                [gradients[i] for i in members],
                [states[i].values["master"] for i in members],
                [self.anchors[i].anchor for i in members],
                [self.anchors[i].fisher for i in members],
                self.ewc_lambda,
            )
        dist.all_reduce(sums)
        nats, task_square, pull_square = sums.tolist()
        return Pull(nats, math.sqrt(pull_square), math.sqrt(task_square))

    def measure(self, states: Sequence[ParameterState], gradients: Sequence[Tensor]) -> Pull:
        """Return what `pull` would, without changing the gradients."""
        return self.pull(states, [gradient.clone() for gradient in gradients])

    @torch.no_grad()
    def draw_to_anchor(
        self, index: int, weights: Tensor, second_moment: Tensor, *, learning_rate: float, epsilon: float
    ) -> None:
        """Apply the proximal step of one state after AdamW's own step; it is stable for any lambda.

        theta <- (theta + c theta*) / (1 + c) with c = learning_rate * lambda * F / (sqrt(v) + epsilon), the implicit
        form of AdamW's step along the penalty's gradient.

        Args:
            index: index of the state.
            weights: the state's `master` values, changed in place.
            second_moment: AdamW's second moment v with bias correction.
            learning_rate: rate of the step just taken.
            epsilon: AdamW's epsilon.
        """
        held = self.anchors[index]
        strength = (learning_rate * self.ewc_lambda) * held.fisher / second_moment.sqrt().add_(epsilon)
        weights.add_(strength * held.anchor).div_(1 + strength)


def merge(
    method: Merging, gamma: float, old: Sequence[FisherAnchor], new: Sequence[FisherAnchor]
) -> list[FisherAnchor]:
    """Merge the Fisher and anchor of a finished phase with those of earlier phases; memory stays at two buffers.

    `online` (Schwarz et al. 2018, arXiv:1805.06370): F = gamma * F_old + F_new around the newest weights. `laplace`
    (Huszar 2018, arXiv:1712.03847): the same with gamma 1. `separate`: one penalty per phase around its own anchor; the
    sum of these quadratics is exactly one quadratic around their F-weighted mean, plus a constant.
    """
    if not old:
        return list(new)
    merged = []
    for before, after in zip(old, new, strict=True):
        if method == "separate":
            fisher = before.fisher + after.fisher
            moved = (after.fisher / fisher).nan_to_num_(nan=1.0)  # 0 / 0: without stiffness take the newest
            merged.append(FisherAnchor(fisher, torch.lerp(before.anchor, after.anchor, moved)))
        else:
            decay = gamma if method == "online" else 1.0
            merged.append(FisherAnchor(decay * before.fisher + after.fisher, after.anchor))
    return merged


def damped(mesh: Mesh, states: Sequence[ParameterState], fisher: list[Tensor], damping: float) -> list[Tensor]:
    """Add `damping` times the mean Fisher value of all parameters to each value.

    Rows of rare tokens have a Fisher of 0 and would otherwise drift freely.
    """
    if damping == 0:
        return fisher
    sums = torch.zeros(2, dtype=torch.float64, device=fisher[0].device)
    for share, members in _by_weight(states, mesh):
        for i in members:
            sums[0] += share * fisher[i].sum(dtype=torch.float64)
            sums[1] += share * fisher[i].numel()
    dist.all_reduce(sums)
    return [values + damping * float(sums[0] / sums[1]) for values in fisher]


def weights_digest(mesh: Mesh, states: Iterable[ParameterState]) -> str:
    """Return a digest of the exact bits of a model's weights, the same in every layout.

    Each rank sums integers over its rectangles; integer sums do not depend on how parameters are split.
    """
    local_sums: dict[str, int] = {}
    for state in states:
        if state.shard.is_first_copy and (not state.replicated or mesh.replicas(expert=state.shard.expert).rank == 0):
            for offset, piece in state.shard.rectangles(state.values["master"], state.start):
                bits = int(_place_weighted(piece, offset, state.shard.shape)) % (1 << 64)
                local_sums[state.shard.name] = (local_sums.get(state.shard.name, 0) + bits) % (1 << 64)
    all_ranks: list = [None] * mesh.world_size
    dist.all_gather_object(all_ranks, local_sums, group=mesh.host_group)
    sums: dict[str, int] = {}
    for part in all_ranks:
        for name, bits in part.items():
            sums[name] = (sums.get(name, 0) + bits) % (1 << 64)
    return hashlib.blake2b(repr(sorted(sums.items())).encode(), digest_size=8).hexdigest()


def _place_weighted(piece: Tensor, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """Return the sum of each weight's bits times an odd number given by its position, modulo 2^64.

    Sums of parts add up in any order; the factors make the sum depend on where each weight is.
    """
    bits = piece.contiguous().view(torch.int32).long()
    row = torch.arange(offset[0], offset[0] + piece.size(0), device=piece.device)
    if piece.dim() == 1:
        return (bits * (2 * row + 1)).sum()
    column = torch.arange(offset[1], offset[1] + piece.size(1), device=piece.device)
    # Factorized over columns, then rows: a matrix of position factors would double the memory.
    return ((bits * (2 * column + 1)).sum(1) * (2 * row + 1)).sum()


def _by_weight(states: Sequence[ParameterState], mesh: Mesh) -> list[tuple[float, list[int]]]:
    """Group states by their weight in a sum over all ranks, chosen so that each parameter counts once.

    Returns:
        (weight, indices of states), sorted by weight: 1 / copies for replicated states, 0 for copies that do not count.
    """
    groups: dict[float, list[int]] = {}
    for i, state in enumerate(states):
        copies = mesh.replicas(expert=state.shard.expert).size if state.replicated else 1
        share = 1.0 / copies if state.shard.is_first_copy else 0.0
        groups.setdefault(share, []).append(i)
    return sorted(groups.items())
