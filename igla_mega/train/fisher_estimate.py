"""The diagonal Fisher information of a model, per token, estimated on the shards that the optimizer keeps.

One sequence is one squared gradient: its sums (over its tokens' ranks, tied weights) are completed first, then it is
squared, and only squares are summed over samples. An expert's gradient is that of the tokens routed to it, and is
divided by the number of all tokens, as every parameter's: a rarely visited expert has a small Fisher. Labels drawn from
the model make it the Fisher information; labels of the data make it the empirical one, which differs wherever the model
does not predict its data (Kunstner et al. 2019, arXiv:1905.12558).
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from igla_mega.config.errors import ConfigError
from igla_mega.data.batches import BatchShard, Corpus
from igla_mega.data.micro_batch import MicroBatch
from igla_mega.engine.step import Engine, forward_backward
from igla_mega.model.build import CausalLM
from igla_mega.model.output import SummedLoss
from igla_mega.model.router import router_context
from igla_mega.objective.ewc import PER_TOKEN, FisherAnchor, FisherMetadata, damped, weights_digest
from igla_mega.ops.categorical import token_keys


@dataclass(frozen=True)
class Estimate:
    """How a Fisher is to be taken."""

    samples: int
    """Sequences, each of which gives one squared gradient."""
    labels: Literal["model", "data"]
    damping: float
    """Share of the mean Fisher that is added everywhere."""
    seed: int


def take(
    engine: Engine, corpus: Corpus, sources: tuple[str, ...], how: Estimate, advance: Callable[[int], None]
) -> tuple[list[FisherAnchor], FisherMetadata]:
    """Estimate the Fisher of the model as it stands, and copy its weights as the anchor.

    Args:
        corpus: of the data that the model was trained on; its sequence length is the samples'.
        sources: their names, for the record.
        advance: called with the number of samples just done.

    Returns:
        For each state of the optimizer, and where it comes from.

    Raises:
        ConfigError: more samples than the data has, or a Fisher that is not finite.
    """
    _refuse_too_few(corpus, how.samples)
    engine = replace(engine, layout=replace(engine.layout, sequence_length=corpus.sequence_length))
    states = list(engine.optimizer.states())
    sums = [torch.zeros_like(state.values["master"]) for state in states]
    samples, draw = _samples(engine, corpus, how), how.labels == "model"
    num_tokens = accumulate(engine, samples, how.samples, sums, advance, draw=draw)
    for values in sums:
        values.div_(num_tokens)
    fisher = damped(engine.mesh, states, sums, how.damping)
    anchors = [
        FisherAnchor(values, state.values["master"].clone()) for values, state in zip(fisher, states, strict=True)
    ]
    digest = weights_digest(engine.mesh, states)
    metadata = FisherMetadata(
        PER_TOKEN, how.labels, how.samples, num_tokens, corpus.sequence_length, how.seed, sources, digest
    )
    return anchors, metadata


def accumulate(
    engine: Engine,
    samples: Iterator[MicroBatch],
    num_samples: int,
    sums: list[Tensor],
    advance: Callable[[int], None],
    *,
    draw: bool,
) -> int:
    """Add the squared gradient of each sample's summed loss to `sums`.

    Args:
        samples: micro-batches of one row, one a round: sample round * data-parallel size + data-parallel rank.
        sums: of the optimizer's states, 1-D fp32.
        draw: labels are drawn from the model; those of `samples` are the keys.

    Returns:
        Target tokens of all samples together.
    """
    width = engine.mesh.data.size
    num_tokens = 0.0
    # Interleaved stages want a micro-batch a rank of the pipeline: the others' rows count for nothing.
    rows = engine.layout.pipeline if len(engine.chunks) > 1 else 1
    engine = replace(engine, layout=replace(engine.layout, micro_batch_size=1, num_microbatches=rows))
    with _as_estimated(engine.chunks, draw), engine.optimizer.per_sample() as add_squares:
        turns = range(width if engine.optimizer.one_sample else 1)
        for first in range(0, num_samples, width):
            sample = next(samples)
            blank = sample._replace(loss_mask=torch.zeros_like(sample.loss_mask))
            for turn in turns:
                engine.optimizer.zero_grad()
                own = sample if turn == engine.mesh.data.rank or len(turns) == 1 else blank
                loss, targets, *_ = forward_backward(engine, iter([own, *[blank] * (rows - 1)]), forward_only=False)
                if not math.isfinite(loss):
                    raise FloatingPointError(f"Fisher: the loss of samples {first + 1} to {first + width} is {loss}.")
                add_squares(sums)
                num_tokens += targets
            advance(min(width, num_samples - first))
    engine.optimizer.zero_grad()
    return round(num_tokens)


def _samples(engine: Engine, corpus: Corpus, how: Estimate) -> Iterator[MicroBatch]:
    """This rank's samples, the data's first in its shuffled order; a blank one where the last round has none for it."""
    data, device = engine.mesh.data, next(engine.chunks[0].parameters()).device
    share = BatchShard(data.size, 1, data.size, data.rank)
    for step in range(-(-how.samples // data.size)):
        batch = next(corpus.micro_batches(step, share))
        number = step * data.size + data.rank
        if number >= how.samples:
            batch.loss_mask.zero_()
        if how.labels == "model":
            # By the place in the row, not by `position_ids`: these begin anew in each document.
            keys = token_keys(how.seed, number, torch.arange(corpus.sequence_length).unsqueeze(0))
            batch = batch._replace(labels=keys)
        yield batch.map_tensors(lambda tensor: tensor.to(device))


@contextmanager
def _as_estimated(chunks, draw: bool) -> Iterator[None]:
    """Without dropout and balancing of experts, and only that: `eval()` would turn off recomputation too. With labels
    drawn where asked."""
    with ExitStack() as stack:
        for chunk in chunks:
            if (routers := router_context(chunk)) is not None:
                routers.counts = False
                stack.callback(setattr, routers, "counts", True)
            for module in chunk.modules():
                if isinstance(module, nn.Dropout):
                    stack.callback(module.train, module.training)
                    module.eval()
                if isinstance(module, CausalLM):
                    assert isinstance(module.output, SummedLoss), "the Fisher is that of a language model's loss"
                    stack.enter_context(module.with_output(replace(module.output, draws_labels=draw)))
        yield


def _refuse_too_few(corpus: Corpus, samples: int) -> None:
    drawn = corpus.blend.consumed(samples)
    short = {name: (drawn[name], has) for name, has in corpus.windows_per_epoch().items() if drawn[name] > has}
    if short:
        raise ConfigError(
            *[
                f"fisher_samples: {samples} takes {wanted} sequences of {corpus.sequence_length} tokens from {name}, "
                f"which has {has}.\n  Ask for fewer, or shorten fisher_seq_length."
                for name, (wanted, has) in short.items()
            ]
        )
