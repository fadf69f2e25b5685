"""What the model says of given rows, in any layout: how likely their last tokens are, and which tokens follow.

Forward passes alone, through the schedule that training takes: every rank takes part, and the rows are spread over the
data-parallel ranks, longest first, so that each has as much to do as the others. Every rank calls with the same rows
and gets the same answer. Nothing here is random but the draws, whose seeds are given.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor, nn

from igla_mega.data.micro_batch import MicroBatch
from igla_mega.engine.step import Engine, scheduled
from igla_mega.layout.layout import Layout
from igla_mega.model.build import CausalLM
from igla_mega.model.output import Output
from igla_mega.objective import language
from igla_mega.ops.linear_cross_entropy import project

CHUNK_TOKENS = {"cpu": 256, "cuda": 1024}
"""Targets whose fp32 logits are held at once."""
ALIGNMENT = {"cpu": 1, "cuda": 64}
"""Rows are filled up to a multiple of this many tokens: GPUs' kernels want few different, round shapes."""
MOST_MICRO_BATCHES = 64
"""Of one pass through the schedule."""


@dataclass(frozen=True)
class Row:
    """Token ids; the last `num_targets` are asked about, and each has a token before it."""

    tokens: Sequence[int]
    num_targets: int


@dataclass(frozen=True)
class Score:
    """What the model says of a row's targets."""

    log_prob: float
    """Sum over the targets, in nats."""
    not_likeliest: int
    """Targets that are not the model's likeliest token."""
    beaten: int
    """Targets that one of the distractors is as likely as, or likelier."""


def score(engine: Engine, rows: Sequence[Row], distractors: Sequence[int] = ()) -> list[Score]:
    """Log-probability of each row's targets given all that is before them.

    Args:
        distractors: token ids that each target is held against (but for the target itself).
    """
    answers = _answers(engine, rows, partial(_score_head, distractors=tuple(distractors)), width=3)
    return [Score(float(log_prob), int(missed), int(beaten)) for log_prob, missed, beaten in answers]


def next_tokens(
    engine: Engine, texts: Sequence[Sequence[int]], keys: Sequence[int], *, temperature: float
) -> list[int]:
    """Draw the token that follows each text.

    Args:
        keys: seed of each draw.
        temperature: divides the logits; 0 takes the likeliest token.
    """
    # In place of the unknown next token stands the key of its draw.
    rows = [Row([*text, key], 1) for text, key in zip(texts, keys, strict=True)]
    answers = _answers(engine, rows, partial(_draw_head, temperature=temperature), width=1)
    return [int(token) for (token,) in answers]


def draw(
    following: Callable[[list[list[int]], list[int]], list[int]],
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: Sequence[int],
    seed: int,
    longest: int,
    ended: Callable[[int, list[int]], bool],
) -> list[list[int]]:
    """Continue token ids, all prompts together; each new token is a pass over all that is before it.

    Args:
        following: `next_tokens` of an engine.
        max_new_tokens: of each prompt.
        seed: of the draws, which belong to a prompt's place and are the same in every layout.
        longest: tokens that the model reads; of longer texts the last ones are read.
        ended: whether the prompt of this place needs no more behind these new tokens.
    """
    drawn: list[list[int]] = [[] for _ in prompts]
    going = [place for place, limit in enumerate(max_new_tokens) if limit > 0]
    while going:
        texts = [[*prompts[place], *drawn[place]][-longest:] for place in going]
        keys = [((seed << 40) + (place << 20) + len(drawn[place])) & 0x7FFF_FFFF_FFFF_FFFF for place in going]
        for place, token in zip(going, following(texts, keys), strict=True):
            drawn[place].append(token)
        going = [p for p in going if len(drawn[p]) < max_new_tokens[p] and not ended(p, drawn[p])]
    return drawn


@contextmanager
def undisturbed(engine: Engine) -> Iterator[None]:
    """Put back what a forward pass, or a library called in between, may leave: random states, modules' modes, FP8's
    scales. What is trained afterwards is bit for bit what it would have been."""
    tracker = get_cuda_rng_tracker()
    modules = [module for chunk in engine.chunks for module in chunk.modules()]
    modes = [(module, module.training) for module in modules]
    scales = [(held, held.clone()) for held in _fp8_state(modules)]
    python, arrays, host = random.getstate(), np.random.get_state(), torch.get_rng_state()
    device = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    tracked = {name: state.clone() for name, state in tracker.get_states().items()}
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for held, before in scales:
            held.copy_(before)
        random.setstate(python)
        np.random.set_state(arrays)
        torch.set_rng_state(host)
        if device is not None:
            torch.cuda.set_rng_state(device)
        tracker.set_states(tracked)


def _fp8_state(modules: Sequence[nn.Module]) -> Iterator[Tensor]:
    """Transformer Engine's histories of the largest values, from which FP8's scales follow."""
    for module in modules:
        for kind in getattr(module, "fp8_meta", {}).values():
            for name in ("amax_history", "scale", "scale_inv"):
                if isinstance(held := getattr(kind, name, None), Tensor):
                    yield held


@torch.no_grad()
def _answers(engine: Engine, rows: Sequence[Row], head: Output, width: int) -> np.ndarray:
    """What a head says of each row's targets, summed over them: fp64 [rows, width], the same on every rank."""
    device = next(engine.chunks[0].parameters()).device
    answers = torch.zeros(len(rows), width, dtype=torch.float64, device=device)
    with _asked(engine, head):
        for layout, places in _passes(engine.layout, [len(row.tokens) - 1 for row in rows], device):
            here = replace(engine, layout=layout)
            batches = (_batch(rows, own, layout, device) for own in _own(places, here))
            reports = scheduled(here, here.chunks, batches, _step, forward_only=True)
            # Nothing comes but on the last stage, and tensor-parallel ranks all say the same.
            if reports and engine.mesh.tensor.rank == 0:
                for own, report in zip(_own(places, here), reports, strict=True):
                    answers[own] = report[: len(own)]
    dist.all_reduce(answers)
    return answers.cpu().numpy()


@contextmanager
def _asked(engine: Engine, head: Output) -> Iterator[None]:
    """The model in evaluation mode, answering by `head`."""
    with ExitStack() as stack:
        for chunk in engine.chunks:
            for module in chunk.modules():
                stack.callback(setattr, module, "training", module.training)
                if isinstance(module, CausalLM):
                    stack.enter_context(module.with_output(head))
            chunk.eval()
        yield


def _passes(layout: Layout, lengths: Sequence[int], device: torch.device) -> Iterator[tuple[Layout, list[int]]]:
    """Rows of like length that go through the schedule together, and the layout that they do so in.

    A micro-batch holds at most as many tokens as one of training.
    """
    most_tokens = layout.micro_batch_size * layout.rows_per_sample * layout.padded_length
    unit = ALIGNMENT[device.type] * (layout.tensor if layout.sequence_parallel else 1) * 2 * layout.context
    waiting = sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
    while waiting:
        filled = [-(-lengths[place] // unit) * unit for place in waiting]
        length = filled[0]
        size = max(1, most_tokens // length)
        alike = [place for place, own in zip(waiting, filled, strict=True) if 2 * own > length]
        rows = min(len(alike), size * layout.data * MOST_MICRO_BATCHES)
        per_rank = -(-rows // layout.data)
        size = min(size, -(-per_rank // layout.pipeline))  # so that no stage waits for all of the others
        micro_batches = -(-per_rank // size)
        if layout.virtual_pipeline > 1:
            micro_batches = -(-micro_batches // layout.pipeline) * layout.pipeline
        yield (
            replace(
                layout,
                micro_batch_size=size,
                num_microbatches=micro_batches,
                rows_per_sample=1,
                sequence_length=length,
            ),
            alike[:rows],
        )
        waiting = waiting[rows:]


def _own(places: Sequence[int], engine: Engine) -> Iterator[list[int]]:
    """For each micro-batch of this rank the rows in it, fewer or none at the end."""
    layout, rank = engine.layout, engine.mesh.data.rank
    for number in range(layout.num_microbatches):
        first = (number * layout.data + rank) * layout.micro_batch_size
        yield list(places[first : first + layout.micro_batch_size])


def _batch(rows: Sequence[Row], own: Sequence[int], layout: Layout, device: torch.device) -> MicroBatch:
    """A micro-batch of rows filled up behind their end, which no token before it sees."""
    shape = (layout.micro_batch_size, layout.sequence_length)
    tokens, labels, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.float32)
    for line, place in enumerate(own):
        row, length = rows[place], len(rows[place].tokens) - 1
        ids = np.asarray(row.tokens, np.int64)
        tokens[line, :length], labels[line, :length] = ids[:-1], ids[1:]
        mask[line, length - row.num_targets : length] = 1.0
    inputs, targets, targets_mask = (torch.from_numpy(array).to(device) for array in (tokens, labels, mask))
    return MicroBatch(inputs, targets, targets_mask, torch.arange(shape[1], device=device).expand(shape).contiguous())


def _step(batches: Iterator[MicroBatch], model: nn.Module) -> tuple[Tensor, Callable]:
    """megatron-core's forward step; the report is fp64 [B, width]."""
    return language.run(next(batches), model), _report


def _report(answers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    sums = answers.sum(0)
    return sums.sum(), torch.zeros((), dtype=torch.int, device=sums.device), sums


def _score_head(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_mask: Tensor,
    *,
    group: dist.ProcessGroup | None,
    vocab_size: int,
    distractors: tuple[int, ...],
) -> Tensor:
    """For each target its log-probability, whether another token is likelier, and whether a distractor is not less
    likely: fp64 [S, B, 3], 0 where there is no target.

    Args:
        hidden: [S, B, H], of this rank's tokens.
        weight: [V, H], this tensor-parallel rank's rows of the output projection.
        labels, loss_mask: [B, S].
    """
    found = torch.zeros(hidden.size(0) * hidden.size(1), 3, dtype=torch.float64, device=hidden.device)
    wanted = torch.tensor(distractors, dtype=torch.int64, device=hidden.device)
    labels = labels.t().flatten()
    for targets in _targets(loss_mask):
        logits = _logits(hidden.flatten(0, 1)[targets], weight, group, vocab_size)
        own = labels[targets]
        chosen, first = _picked(logits, own[:, None], group, weight)[:, 0], _first(group, weight)
        most, place = logits.max(1)
        parts = torch.stack([logits.logsumexp(1), most, (place + first).to(most.dtype)]).double()
        parts = _gathered(parts, group)  # [ranks, 3, targets]
        # Of equally likely tokens the one with the lowest id is taken, as argmax does.
        highest = parts[:, 1] == parts[:, 1].amax(0)
        likeliest = torch.where(highest, parts[:, 2], torch.inf).amin(0)
        found[targets, 0] = chosen.double() - parts[:, 0].logsumexp(0)
        found[targets, 1] = (likeliest != own).double()
        if distractors:
            others = _picked(logits, wanted.expand(len(own), -1), group, weight)
            beaten = (others >= chosen[:, None]) & (wanted != own[:, None])
            found[targets, 2] = beaten.any(1).double()
    return found.view(*hidden.shape[:2], 3)


def _draw_head(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_mask: Tensor,
    *,
    group: dist.ProcessGroup | None,
    vocab_size: int,
    temperature: float,
) -> Tensor:
    """For each target a token drawn by the model, fp64 [S, B, 1]; its label is the key of the draw."""
    found = torch.zeros(hidden.size(0) * hidden.size(1), 1, dtype=torch.float64, device=hidden.device)
    labels = labels.t().flatten()
    for targets in _targets(loss_mask):
        logits = _logits(hidden.flatten(0, 1)[targets], weight, group, vocab_size)
        whole = _gathered(logits, group).transpose(0, 1).flatten(1)
        if temperature > 0:
            # The largest of logits with Gumbel noise is a draw from their softmax. Drawn on the host: any device's.
            keys = labels[targets].tolist()
            noise = [torch.rand(whole.size(1), generator=torch.Generator().manual_seed(key)) for key in keys]
            uniform = torch.stack(noise).to(whole).clamp_(1e-20, 1 - 1e-7)
            whole = whole / temperature - (-uniform.log()).log()
        found[targets, 0] = whole.argmax(1).double()
    return found.view(*hidden.shape[:2], 1)


def _targets(loss_mask: Tensor) -> Iterator[Tensor]:
    """Places of targets among [S * B] tokens, some at a time."""
    places = loss_mask.t().flatten().nonzero().squeeze(1)
    return iter(places.split(CHUNK_TOKENS[places.device.type]) if len(places) else ())


def _first(group: dist.ProcessGroup | None, weight: Tensor) -> int:
    """The first token id of this rank's part of the vocabulary."""
    return 0 if group is None else group.rank() * weight.size(0)


def _logits(hidden: Tensor, weight: Tensor, group: dist.ProcessGroup | None, vocab_size: int) -> Tensor:
    """[targets, V of this rank], fp32; -inf for rows that only pad the vocabulary."""
    logits = project(hidden, weight).float()
    logits[:, max(0, vocab_size - _first(group, weight)) :] = -torch.inf
    return logits


def _picked(logits: Tensor, ids: Tensor, group: dist.ProcessGroup | None, weight: Tensor) -> Tensor:
    """The logits of token ids [targets, n], whichever rank has them."""
    places = ids - _first(group, weight)
    here = (places >= 0) & (places < logits.size(1))
    picked = logits.gather(1, places.clamp(0, logits.size(1) - 1)).masked_fill(~here, -torch.inf)
    if group is not None:
        dist.all_reduce(picked, op=dist.ReduceOp.MAX, group=group)
    return picked


def _gathered(own: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[ranks, ...] of every tensor-parallel rank's tensor."""
    if group is None:
        return own[None]
    parts = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(parts, own.contiguous(), group=group)
    return torch.stack(parts)
