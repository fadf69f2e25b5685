"""Elastic Weight Consolidation (Kirkpatrick et al. 2017, arXiv:1612.00796) on the shards that the optimizer keeps.

The penalty is `lambda / 2 * sum_i F_i (theta_i - theta*_i)^2` in nats per token, where F is the diagonal Fisher
information per token of an earlier task and theta* the weights it was taken at. Fisher and anchor are two more fp32
values of each state: they are sharded, saved and resharded as the optimizer's moments are.
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
"""F = sum over samples of (gradient of the sample's summed loss)^2, divided by the tokens of all samples."""

Coupling = Literal["coupled", "decoupled", "proximal"]
Merging = Literal["online", "separate", "laplace"]


@dataclass(frozen=True)
class FisherMetadata:
    """Where a Fisher comes from, as it lies beside it: lambda means nothing without it."""

    normalization: str
    labels: str
    """`model`: drawn from the model's own predictions; `data`: as the data has them (the empirical Fisher)."""
    samples: int
    tokens: int
    """Over which it was taken; summed over the phases merged into it."""
    sequence_length: int
    seed: int
    sources: tuple[str, ...]
    """Names of the domains that are held."""
    model: str
    """Digest of the weights it was taken at, the latest where several are merged."""

    def merged(self, later: "FisherMetadata", anchor_is_latest: bool) -> "FisherMetadata":
        """Of the sum of this one and a later one."""
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
    """What the pull was in one step."""

    nats: float
    """The penalty, before the update."""
    grad_norm: float
    """L2 of its gradient over all parameters."""
    task_grad_norm: float
    """L2 of the gradient that it was added to."""


@dataclass(frozen=True)
class FisherAnchor:
    """Fisher and anchor of one state, 1-D fp32 of the state's length."""

    fisher: Tensor
    anchor: Tensor


@dataclass
class Ewc:
    """The pull to earlier tasks: `state` is empty until the first consolidation, and nothing pulls until then."""

    mesh: Mesh
    ewc_lambda: float
    coupling: Coupling = "coupled"
    metadata: FisherMetadata | None = None
    anchors: list[FisherAnchor] = field(default_factory=list)
    """In the order of the optimizer's states."""
    _groups: list[tuple[float, list[int]]] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether there is something to hold."""
        return bool(self.anchors)

    def hold(self, states: Sequence[ParameterState], anchors: list[FisherAnchor], metadata: FisherMetadata) -> None:
        """Hold `state` from now on.

        Raises:
            ConfigError: it is not finite, or a Fisher is below 0.
        """
        assert len(states) == len(anchors), "one for each state"
        self.refuse_broken(states, anchors)
        self.anchors, self.metadata = anchors, metadata
        self._groups = _by_weight(states, self.mesh)

    def refuse_broken(self, states: Sequence[ParameterState], anchors: Sequence[FisherAnchor]) -> None:
        """Raise on every rank when a value on any of them is not finite, or a Fisher below 0.

        Raises:
            ConfigError: names the parameter.
        """
        found = ""
        for state, held in zip(states, anchors, strict=True):
            # A minimum is NaN where a value is, and an infinity shows in the largest.
            if held.fisher.numel() and not (float(held.fisher.min()) >= 0 and math.isfinite(float(held.fisher.max()))):
                found = f"the Fisher of {state.shard.name} is negative or not finite"
            elif held.anchor.numel() and not bool(torch.isfinite(held.anchor).all()):
                found = f"the anchor of {state.shard.name} is not finite"
        everyones: list = [None] * self.mesh.world_size
        dist.all_gather_object(everyones, found, group=self.mesh.host_group)
        if any(everyones):
            raise ConfigError(
                f"ewc: {next(one for one in everyones if one)}: it cannot hold a weight.\n"
                "  Take it again from a model whose loss is finite on its data."
            )

    def allocate(self, states: Sequence[ParameterState]) -> list[FisherAnchor]:
        """Room for the state of these states, for a checkpoint to be read into."""
        return [
            FisherAnchor(torch.zeros_like(s.values["master"]), torch.zeros_like(s.values["master"])) for s in states
        ]

    def with_state(self, states: Iterable[ParameterState]) -> Iterator[ParameterState]:
        """The states with `fisher` and `anchor` among their values."""
        if not self.anchors:
            yield from states
            return
        for state, held in zip(states, self.anchors, strict=True):
            yield state._replace(values={**state.values, "fisher": held.fisher, "anchor": held.anchor})

    def pull(self, states: Sequence[ParameterState], gradients: Sequence[Tensor]) -> Pull:
        """Add `lambda * F * (theta - theta*)` to the gradients, in place.

        Exact whatever the number of ranks, micro-batches or tokens: the gradients are reduced, divided and unscaled.

        Args:
            states: with `master`, in the order of the state.
            gradients: of the states, 1-D.
        """
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
        """As `pull`, and leave the gradients as they are."""
        return self.pull(states, [gradient.clone() for gradient in gradients])

    @torch.no_grad()
    def draw_to_anchor(
        self, index: int, weights: Tensor, second_moment: Tensor, *, learning_rate: float, epsilon: float
    ) -> None:
        """Take the proximal step of one state after AdamW's own: stable for any lambda.

        theta <- (theta + c theta*) / (1 + c) with c = learning_rate * lambda * F / (sqrt(v) + epsilon), the implicit
        form of AdamW's step along the pull.

        Args:
            index: of the state.
            second_moment: AdamW's, freed of its bias.
        """
        held = self.anchors[index]
        strength = (learning_rate * self.ewc_lambda) * held.fisher / second_moment.sqrt().add_(epsilon)
        weights.add_(strength * held.anchor).div_(1 + strength)


def merge(
    method: Merging, gamma: float, old: Sequence[FisherAnchor], new: Sequence[FisherAnchor]
) -> list[FisherAnchor]:
    """Fold the Fisher and anchor of a finished phase into those of the phases before it, two buffers as before.

    `online` (Schwarz et al. 2018, arXiv:1805.06370): F = gamma * F_old + F_new about the newest weights; `laplace`
    (Huszar 2018, arXiv:1712.03847): the same with gamma 1; `separate`: a penalty for each phase about its own anchor,
    whose sum is exactly one about their mean, weighted by F, and a constant.
    """
    if not old:
        return list(new)
    merged = []
    for before, after in zip(old, new, strict=True):
        if method == "separate":
            fisher = before.fisher + after.fisher
            moved = (after.fisher / fisher).nan_to_num_(nan=1.0)  # where neither holds, the newest
            merged.append(FisherAnchor(fisher, torch.lerp(before.anchor, after.anchor, moved)))
        else:
            decay = gamma if method == "online" else 1.0
            merged.append(FisherAnchor(decay * before.fisher + after.fisher, after.anchor))
    return merged


def damped(mesh: Mesh, states: Sequence[ParameterState], fisher: list[Tensor], damping: float) -> list[Tensor]:
    """Add `damping` times the mean over all parameters: rows of rare tokens, of Fisher 0, are then held a little."""
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
    """A digest of a model's weights, bit for bit, the same in every layout."""
    own: dict[str, int] = {}
    for state in states:
        if state.shard.is_first_copy and (not state.replicated or mesh.replicas(expert=state.shard.expert).rank == 0):
            for offset, piece in state.shard.rectangles(state.values["master"], state.start):
                bits = int(_place_weighted(piece, offset, state.shard.shape)) % (1 << 64)
                own[state.shard.name] = (own.get(state.shard.name, 0) + bits) % (1 << 64)
    everyones: list = [None] * mesh.world_size
    dist.all_gather_object(everyones, own, group=mesh.host_group)
    sums: dict[str, int] = {}
    for part in everyones:
        for name, bits in part.items():
            sums[name] = (sums.get(name, 0) + bits) % (1 << 64)
    return hashlib.blake2b(repr(sorted(sums.items())).encode(), digest_size=8).hexdigest()


def _place_weighted(piece: Tensor, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """Sum of the bits of each weight times an odd number of its place: sums of parts, in any order, add up."""
    bits = piece.contiguous().view(torch.int32).long()
    row = torch.arange(offset[0], offset[0] + piece.size(0), device=piece.device)
    if piece.dim() == 1:
        return (bits * (2 * row + 1)).sum()
    column = torch.arange(offset[1], offset[1] + piece.size(1), device=piece.device)
    # Rows first: no matrix of places is made.
    return ((bits * (2 * column + 1)).sum(1) * (2 * row + 1)).sum()


def _by_weight(states: Sequence[ParameterState], mesh: Mesh) -> list[tuple[float, list[int]]]:
    """Slots by what they count for in a sum over all ranks, so that each parameter counts once."""
    groups: dict[float, list[int]] = {}
    for i, state in enumerate(states):
        copies = mesh.replicas(expert=state.shard.expert).size if state.replicated else 1
        share = 1.0 / copies if state.shard.is_first_copy else 0.0
        groups.setdefault(share, []).append(i)
    return sorted(groups.items())
