"""Score given rows with the model in any layout: how likely their last tokens are, and which tokens follow.

Only forward passes, through the schedule that training uses. All functions are collective: every rank calls them with
the same rows and gets the same answer. Rows are spread over the data-parallel ranks, longest first, which balances
their work. Only the draws are random, and their seeds are arguments.
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
"""Number of targets whose fp32 logits are in memory at once, by device type."""
ALIGNMENT = {"cpu": 1, "cuda": 64}
"""Multiple of tokens that rows are padded to: GPU kernels are fast on few, round shapes."""
MOST_MICRO_BATCHES = 64
"""Maximum number of micro-batches in one pass through the schedule."""


@dataclass(frozen=True)
class Row:
    """Token ids, of which the last `num_targets` are scored. The first token cannot be a target."""

    tokens: Sequence[int]
    num_targets: int


@dataclass(frozen=True)
class Score:
    """Scores of a row's targets."""

    log_prob: float
    """Sum over the targets, in nats."""
    not_likeliest: int
    """Number of targets that are not the model's most likely token."""
    beaten: int
    """Number of targets for which some distractor is at least as likely as the target."""


def score(engine: Engine, rows: Sequence[Row], distractors: Sequence[int] = ()) -> list[Score]:
    """Return the scores of each row's targets given all tokens before them.

    Args:
        distractors: token ids that each target is compared with; the target itself is skipped.
    """
    answers = _answers(engine, rows, partial(_score_head, distractors=tuple(distractors)), width=3)
    return [Score(float(log_prob), int(missed), int(beaten)) for log_prob, missed, beaten in answers]


def next_tokens(
    engine: Engine, texts: Sequence[Sequence[int]], keys: Sequence[int], *, temperature: float
) -> list[int]:
    """Draw the token that follows each text.

    Args:
        keys: seed of each draw.
        temperature: divisor of the logits; 0 selects the most likely token.
    """
    # The label is unused, since the next token is unknown: it carries the key of the draw to the last stage.
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
    """Continue all prompts together. Each new token costs a forward pass over all tokens before it: there is no cache.

    Args:
        following: `next_tokens` of an engine.
        max_new_tokens: limit of each prompt.
        seed: seed of the draws, which depend on the index of the prompt and are the same in every layout.
        longest: maximum number of tokens that the model reads; of a longer text the last ones are read.
        ended: function of a prompt's index and its new tokens; True if that text is complete.

    Returns:
        The new token ids of each prompt.
    """
    drawn: list[list[int]] = [[] for _ in prompts]
    active = [place for place, limit in enumerate(max_new_tokens) if limit > 0]
    while active:
        texts = [[*prompts[place], *drawn[place]][-longest:] for place in active]
        # Masked to 63 bits: keys travel as int64 labels.
        keys = [((seed << 40) + (place << 20) + len(drawn[place])) & 0x7FFF_FFFF_FFFF_FFFF for place in active]
        for place, token in zip(active, following(texts, keys), strict=True):
            drawn[place].append(token)
        active = [p for p in active if len(drawn[p]) < max_new_tokens[p] and not ended(p, drawn[p])]
    return drawn


@contextmanager
def undisturbed(engine: Engine) -> Iterator[None]:
    """Restore the state that a forward pass or a library may change: random states, training modes, FP8 scales.

    Training after the block is bit for bit the same as without it.
    """
    tracker = get_cuda_rng_tracker()
    modules = [module for chunk in engine.chunks for module in chunk.modules()]
    modes = [(module, module.training) for module in modules]
    # Every forward pass under FP8 appends to the amax history, in evaluation mode too.
    scales = [(value, value.clone()) for value in _fp8_state(modules)]
    python, arrays, host = random.getstate(), np.random.get_state(), torch.get_rng_state()
    device = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    tracked = {name: state.clone() for name, state in tracker.get_states().items()}
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for value, before in scales:
            value.copy_(before)
        random.setstate(python)
        np.random.set_state(arrays)
        torch.set_rng_state(host)
        if device is not None:
            torch.cuda.set_rng_state(device)
        tracker.set_states(tracked)


def _fp8_state(modules: Sequence[nn.Module]) -> Iterator[Tensor]:
    """Yield Transformer Engine's amax histories and the FP8 scales derived from them."""
    for module in modules:
        for kind in getattr(module, "fp8_meta", {}).values():
            for name in ("amax_history", "scale", "scale_inv"):
                if isinstance(value := getattr(kind, name, None), Tensor):
                    yield value


@torch.no_grad()
def _answers(engine: Engine, rows: Sequence[Row], head: Output, width: int) -> np.ndarray:
    """Return a head's outputs summed over each row's targets: fp64 [rows, width], the same on every rank."""
    device = next(engine.chunks[0].parameters()).device
    answers = torch.zeros(len(rows), width, dtype=torch.float64, device=device)
    with _with_head(engine, head):
        for layout, places in _passes(engine.layout, [len(row.tokens) - 1 for row in rows], device):
            here = replace(engine, layout=layout)
            batches = (_batch(rows, members, layout, device) for members in _members(places, here))
            reports = scheduled(here, here.chunks, batches, _step, forward_only=True)
            # Only the last stage has reports, and they are equal on all tensor-parallel ranks: one of them contributes,
            # or the sum below would count a row several times.
            if reports and engine.mesh.tensor.rank == 0:
                for members, report in zip(_members(places, here), reports, strict=True):
                    answers[members] = report[: len(members)]
    dist.all_reduce(answers)
    return answers.cpu().numpy()


@contextmanager
def _with_head(engine: Engine, head: Output) -> Iterator[None]:
    """Put the model into evaluation mode with `head` as its output, and restore both afterwards."""
    with ExitStack() as stack:
        for chunk in engine.chunks:
            for module in chunk.modules():
                stack.callback(setattr, module, "training", module.training)
                if isinstance(module, CausalLM):
                    stack.enter_context(module.with_output(head))
            chunk.eval()
        yield


def _passes(layout: Layout, lengths: Sequence[int], device: torch.device) -> Iterator[tuple[Layout, list[int]]]:
    """Yield groups of rows of similar length for one pass through the schedule, each with the layout of its pass.

    A micro-batch has at most as many tokens as one of training.
    """
    most_tokens = layout.micro_batch_size * layout.rows_per_sample * layout.padded_length
    # Sequence parallelism divides a row by the tensor axis, zig-zag context parallelism by twice the context axis.
    unit = ALIGNMENT[device.type] * (layout.tensor if layout.sequence_parallel else 1) * 2 * layout.context
    waiting = sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
    while waiting:
        filled = [-(-lengths[place] // unit) * unit for place in waiting]
        length = filled[0]
        size = max(1, most_tokens // length)
        # At most half of a row is padding.
        similar = [place for place, padded in zip(waiting, filled, strict=True) if 2 * padded > length]
        rows = min(len(similar), size * layout.data * MOST_MICRO_BATCHES)
        per_rank = -(-rows // layout.data)
        # Smaller micro-batches if there are fewer than stages: otherwise the stages would run one after the other.
        size = min(size, -(-per_rank // layout.pipeline))
        micro_batches = -(-per_rank // size)
        # The interleaved schedule needs a multiple of the number of stages.
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
            similar[:rows],
        )
        waiting = waiting[rows:]


def _members(places: Sequence[int], engine: Engine) -> Iterator[list[int]]:
    """Yield the rows in each micro-batch of this rank; the last micro-batches may have fewer or none."""
    layout, rank = engine.layout, engine.mesh.data.rank
    for number in range(layout.num_microbatches):
        first = (number * layout.data + rank) * layout.micro_batch_size
        yield list(places[first : first + layout.micro_batch_size])


def _batch(rows: Sequence[Row], members: Sequence[int], layout: Layout, device: torch.device) -> MicroBatch:
    """Return a micro-batch of rows padded at their end, where causal attention hides the padding from every target."""
    shape = (layout.micro_batch_size, layout.sequence_length)
    tokens, labels, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.float32)
    for line, place in enumerate(members):
        row, length = rows[place], len(rows[place].tokens) - 1
        ids = np.asarray(row.tokens, np.int64)
        tokens[line, :length], labels[line, :length] = ids[:-1], ids[1:]
        mask[line, length - row.num_targets : length] = 1.0
    inputs, targets, targets_mask = (torch.from_numpy(array).to(device) for array in (tokens, labels, mask))
    return MicroBatch(inputs, targets, targets_mask, torch.arange(shape[1], device=device).expand(shape).contiguous())


def _step(batches: Iterator[MicroBatch], model: nn.Module) -> tuple[Tensor, Callable]:
    """Run megatron-core's forward step; the report is fp64 [B, width]."""
    return language.run(next(batches), model), _report


def _report(answers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss, number of tokens, report) as megatron-core's schedule expects; only the report is used."""
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
    """Return fp64 [S, B, 3]: log-probability in nats, 1 if not the most likely token, 1 if beaten by a distractor.

    All three are 0 where there is no target. The signature is that of `CausalLM.head`.

    Args:
        hidden: [S, B, H], for this rank's tokens.
        weight: [V, H], this tensor-parallel rank's rows of the output projection.
        labels, loss_mask: [B, S].
    """
    found = torch.zeros(hidden.size(0) * hidden.size(1), 3, dtype=torch.float64, device=hidden.device)
    rivals = torch.tensor(distractors, dtype=torch.int64, device=hidden.device)
    labels = labels.t().flatten()
    for targets in _targets(loss_mask):
        logits = _logits(hidden.flatten(0, 1)[targets], weight, group, vocab_size)  # [targets, V of this rank]
        correct = labels[targets]
        chosen, first = _picked(logits, correct[:, None], group, weight)[:, 0], _first(group, weight)
        largest, place = logits.max(1)
        parts = torch.stack([logits.logsumexp(1), largest, (place + first).to(largest.dtype)]).double()
        parts = _gathered(parts, group)  # [ranks, 3, targets]
        # Of equally likely tokens the one with the lowest id counts as the most likely, as in argmax.
        highest = parts[:, 1] == parts[:, 1].amax(0)
        likeliest = torch.where(highest, parts[:, 2], torch.inf).amin(0)
        found[targets, 0] = chosen.double() - parts[:, 0].logsumexp(0)
        found[targets, 1] = (likeliest != correct).double()
        if distractors:
            others = _picked(logits, rivals.expand(len(correct), -1), group, weight)  # [targets, distractors]
            beaten = (others >= chosen[:, None]) & (rivals != correct[:, None])
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
    """Return a drawn token id for each target, fp64 [S, B, 1]; the label of a target is the key of its draw."""
    found = torch.zeros(hidden.size(0) * hidden.size(1), 1, dtype=torch.float64, device=hidden.device)
    labels = labels.t().flatten()
    for targets in _targets(loss_mask):
        logits = _logits(hidden.flatten(0, 1)[targets], weight, group, vocab_size)
        whole = _gathered(logits, group).transpose(0, 1).flatten(1)  # [targets, V]
        if temperature > 0:
            # The argmax of logits with Gumbel noise is a draw from their softmax (Gumbel-max). The noise is drawn on
            # the host, so that it is the same on every device and tensor-parallel rank.
            keys = labels[targets].tolist()
            noise = [torch.rand(whole.size(1), generator=torch.Generator().manual_seed(key)) for key in keys]
            uniform = torch.stack(noise).to(whole).clamp_(1e-20, 1 - 1e-7)
            whole = whole / temperature - (-uniform.log()).log()
        found[targets, 0] = whole.argmax(1).double()
    return found.view(*hidden.shape[:2], 1)


def _targets(loss_mask: Tensor) -> Iterator[Tensor]:
    """Yield the places of targets among the [S * B] tokens, at most CHUNK_TOKENS at a time."""
    places = loss_mask.t().flatten().nonzero().squeeze(1)
    return iter(places.split(CHUNK_TOKENS[places.device.type]) if len(places) else ())


def _first(group: dist.ProcessGroup | None, weight: Tensor) -> int:
    """Return the first token id of this rank's shard of the vocabulary."""
    return 0 if group is None else group.rank() * weight.size(0)


def _logits(hidden: Tensor, weight: Tensor, group: dist.ProcessGroup | None, vocab_size: int) -> Tensor:
    """Return fp32 logits [targets, V of this rank], -inf for the rows that pad the vocabulary."""
    logits = project(hidden, weight).float()
    logits[:, max(0, vocab_size - _first(group, weight)) :] = -torch.inf
    return logits


def _picked(logits: Tensor, ids: Tensor, group: dist.ProcessGroup | None, weight: Tensor) -> Tensor:
    """Return the logits [targets, n] of token ids [targets, n], from the ranks that hold them."""
    places = ids - _first(group, weight)
    here = (places >= 0) & (places < logits.size(1))
    picked = logits.gather(1, places.clamp(0, logits.size(1) - 1)).masked_fill(~here, -torch.inf)
    if group is not None:
        dist.all_reduce(picked, op=dist.ReduceOp.MAX, group=group)
    return picked


def _gathered(local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """All-gather a tensor over the tensor-parallel ranks: [ranks, ...]."""
    if group is None:
        return local[None]
    parts = [torch.empty_like(local) for _ in range(group.size())]
    dist.all_gather(parts, local.contiguous(), group=group)
    return torch.stack(parts)
