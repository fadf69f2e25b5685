"""Estimate the diagonal Fisher information of a model, per token, on the shards that the optimizer keeps.

Each sequence gives one squared gradient: the gradient is first summed over the ranks that share the sequence's tokens,
and over tied weights, then squared, and only squares are summed over samples. An expert's gradient is that of the
tokens routed to it, and like every parameter's it is divided by the number of all tokens, so an expert that gets few
tokens has a small Fisher. Labels drawn from the model give the Fisher information; labels of the data give the
empirical Fisher, which differs as far as the model does not predict its data (Kunstner et al. 2019, arXiv:1905.12558).
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
    """Settings of an estimate."""

    samples: int
    """Number of sequences, each of which gives one squared gradient."""
    labels: Literal["model", "data"]
    """Labels are drawn from the model, or taken from the data."""
    damping: float
    """Share of the mean Fisher that is added to every element."""
    seed: int
    """Seed of the labels that are drawn."""


def take(
    engine: Engine, corpus: Corpus, sources: tuple[str, ...], how: Estimate, advance: Callable[[int], None]
) -> tuple[list[FisherAnchor], FisherMetadata]:
    """Estimate the Fisher of the model at its current weights, and copy the weights as the anchor.

    Args:
        corpus: data that the model was trained on; the samples have its sequence length.
        sources: names of the data's sources, for the metadata.
        advance: called with the number of samples just done.

    Returns:
        Fisher and anchor for each state of the optimizer, and the metadata.

    Raises:
        ConfigError: more samples are configured than the data has, or the Fisher is not finite.
        FloatingPointError: the loss of a sample is not finite.
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
        samples: micro-batches of one row. In each round every data-parallel rank takes one: the sample of number
            round * data-parallel size + data-parallel rank.
        sums: one tensor per state of the optimizer, 1-D fp32.
        draw: True to draw labels from the model; the labels of `samples` are then keys of the draws.

    Returns:
        Number of target tokens of all samples together.
    """
    width = engine.mesh.data.size
    num_tokens = 0.0
    # Interleaved stages require a multiple of the pipeline size as number of micro-batches: the others are blank rows,
    # whose loss mask, and so whose gradient, is 0.
    rows = engine.layout.pipeline if len(engine.chunks) > 1 else 1
    engine = replace(engine, layout=replace(engine.layout, micro_batch_size=1, num_microbatches=rows))
    with _as_estimated(engine.chunks, draw), engine.optimizer.per_sample() as add_squares:
        # Distributed experts see tokens of several ranks, and their gradient would mix the samples before it is
        # squared: the data-parallel ranks then take turns, the others with a blank sample.
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
    """Yield this rank's samples, the first ones of the shuffled data; a blank one if the last round has none left."""
    data, device = engine.mesh.data, next(engine.chunks[0].parameters()).device
    share = BatchShard(data.size, 1, data.size, data.rank)
    for step in range(-(-how.samples // data.size)):
        batch = next(corpus.micro_batches(step, share))
        number = step * data.size + data.rank
        if number >= how.samples:
            batch.loss_mask.zero_()
        if how.labels == "model":
            # By the place in the row, not by `position_ids`, which restart in each document: keys must differ.
            keys = token_keys(how.seed, number, torch.arange(corpus.sequence_length).unsqueeze(0))
            batch = batch._replace(labels=keys)
        yield batch.map_tensors(lambda tensor: tensor.to(device))


@contextmanager
def _as_estimated(chunks, draw: bool) -> Iterator[None]:
    """Disable dropout and the balancing of experts while the context is open, and draw labels if `draw`.

    `chunk.eval()` would also disable recomputation, and the activations would not fit.
    """
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
                    assert isinstance(module.output, SummedLoss), "a Fisher is defined for the loss of a language model"
                    stack.enter_context(module.with_output(replace(module.output, draws_labels=draw)))
        yield


def _refuse_too_few(corpus: Corpus, samples: int) -> None:
    """Refuse more samples than one epoch of each source: a repeated sample adds no information."""
    drawn = corpus.blend.consumed(samples)
    short = {name: (drawn[name], has) for name, has in corpus.windows_per_epoch().items() if drawn[name] > has}
    if short:
        raise ConfigError(
            *[
                f"fisher_samples: {samples} takes {wanted} sequences of {corpus.sequence_length} tokens from {name}, "
                f"which has {has}.\n  Lower fisher_samples, or shorten fisher_seq_length."
                for name, (wanted, has) in short.items()
            ]
        )
