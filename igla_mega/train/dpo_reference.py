"""Compute the reference's log-probabilities of preference optimization.

The reference is the model with its adapters off, a frozen second model, or the initial model in one pass over all
pairs, whose results are kept in the run folder. All three use the same code and give the same loss.
"""

import hashlib
import itertools
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from igla_mega.config.errors import ConfigError
from igla_mega.config.features import Dpo
from igla_mega.config.files import no_follow
from igla_mega.data.batches import BatchShard, on_device
from igla_mega.data.micro_batch import MicroBatch
from igla_mega.data.tuning.conversations import Pairs
from igla_mega.engine.step import Engine, Objective, scheduled
from igla_mega.objective import dpo
from igla_mega.train.session import Session


def mode_of(section: Dpo, *, adapters: bool) -> str:
    """Return where the reference comes from: `adapter`, `model`, `cached`, or `none`.

    Args:
        adapters: True if the model trains low-rank adapters; switched off, they make it the reference at no cost.
    """
    if section.reference_free:
        return "none"
    return section.reference if section.reference != "auto" else "adapter" if adapters else "cached"


def objective(section: Dpo, mode: str, engine: Engine, frozen: Sequence[nn.Module] = ()) -> Objective:
    """Return preference optimization as the engine's objective.

    Args:
        mode: result of `mode_of`.
        frozen: chunks of the reference model, for mode `model`.
    """
    context = engine.mesh.context
    step = partial(dpo.forward_step, dpo=section, context=context)
    if mode in ("none", "cached"):
        return Objective(step, dpo.METRICS)
    return Objective(step, dpo.METRICS, partial(_completed, frozen))


def _completed(frozen: Sequence[nn.Module], engine: Engine, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
    """Return the micro-batches of a step with the log-probabilities under the reference."""
    micro_batches = list(itertools.islice(batches, engine.layout.num_microbatches))
    return dpo.with_reference(micro_batches, _reference(engine, frozen, micro_batches))


@torch.no_grad()
def _reference(engine: Engine, frozen: Sequence[nn.Module], micro_batches: Sequence[MicroBatch]) -> list[torch.Tensor]:
    """Return the log-probability of each answer, [2B] fp32 per micro-batch, on the last pipeline stage only."""
    step = partial(dpo.reference_step, context=engine.mesh.context)
    if frozen:
        return scheduled(engine, frozen, iter(micro_batches), step, forward_only=True)
    training = [chunk.training for chunk in engine.chunks]
    for chunk in engine.chunks:
        # In training mode a checkpointed layer keeps state for its recomputation, which never comes here. Dropout of
        # the adapters is off as well.
        chunk.eval()
    try:
        if engine.adapters is None:
            return scheduled(engine, engine.chunks, iter(micro_batches), step, forward_only=True)
        with engine.adapters.off():
            return scheduled(engine, engine.chunks, iter(micro_batches), step, forward_only=True)
    finally:
        for chunk, before in zip(engine.chunks, training, strict=True):
            chunk.train(before)


def cache(engine: Engine, pairs: Pairs, share: BatchShard, base: str, session: Session) -> None:
    """Set `pairs.reference` to the log-probabilities under the model at its current weights, with adapters off.

    They are computed once and kept in the run folder, in a file named by the digests of model and data. Every rank
    calls it.

    Args:
        base: digest of the model's weights.

    Raises:
        ConfigError: the file cannot be read.
    """
    key = hashlib.blake2b(f"{base}:{pairs.fingerprint()}".encode(), digest_size=8).hexdigest()
    folder, group = session.run_dir, engine.mesh.host_group
    file = folder / f"reference_{key}.npz"
    # The main rank decides for all: on a network disk some ranks may see the file later, and the pass is collective.
    known: list = [file.is_file()]
    dist.broadcast_object_list(known, src=0, group=group)
    if known[0]:
        try:
            with np.load(file, allow_pickle=False) as kept:
                pairs.reference = {name: kept[name] for name in kept.files}
        except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ConfigError(f"{file}: cannot be read ({error}).\n  Remove it: it is computed again.") from None
        return
    names = list(pairs.readers)
    found = {}
    with session.display.counting("reference", sum(pairs.num_pairs(name) for name in names)) as advance:
        for name in names:
            found[name] = _pass(engine, pairs, name, share, advance)
    if engine.mesh.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        partial_file = folder / f".{file.name}"
        with open(partial_file, "wb", opener=no_follow) as stream:
            np.savez(stream, **found)  # type: ignore[arg-type]
        partial_file.rename(file)
    dist.barrier(group=group)
    pairs.reference = found


def _pass(engine: Engine, pairs: Pairs, name: str, share: BatchShard, advance) -> np.ndarray:
    """Return the reference's log-probability of each answer of a source, fp32 [pairs, 2], on every rank."""
    mesh, count = engine.mesh, pairs.num_pairs(name)
    device = next(engine.chunks[0].parameters()).device
    batches = on_device(pairs.all_pairs(name, share), device)
    result = torch.zeros(count, 2)
    for first in range(0, count, share.global_batch):
        reports = _reference(engine, (), list(itertools.islice(batches, share.num_microbatches)))
        # Tensor- and context-parallel peers hold the same sums: only one may enter the all-reduce below.
        for number, report in enumerate(reports if mesh.tensor.rank == 0 and mesh.context.rank == 0 else []):
            rows = first + share.rows(number)
            kept = rows < count  # the last batch is filled up with empty pairs
            result[rows[kept]] = report.cpu().view(-1, 2)[kept]
        advance(min(share.global_batch, count - first))
    dist.all_reduce(result, group=mesh.host_group)
    return result.numpy()
