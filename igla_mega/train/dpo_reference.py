"""The reference of preference optimization: the model with its adapters off, a frozen second model, or one pass over
all pairs, kept beside the run. All three go through the same code and give the same loss."""

import hashlib
import itertools
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from igla_mega.config.errors import ConfigError
from igla_mega.config.features import Dpo
from igla_mega.data.batches import BatchShard, on_device
from igla_mega.data.conversations import Pairs
from igla_mega.data.micro_batch import MicroBatch
from igla_mega.engine.step import Engine, Objective, scheduled
from igla_mega.objective import dpo
from igla_mega.train.console import Display, Silent


def mode_of(section: Dpo, *, adapters: bool) -> str:
    """Where the reference comes from: `adapter`, `model`, `cached`, or `none`."""
    if section.reference_free:
        return "none"
    return section.reference if section.reference != "auto" else "adapter" if adapters else "cached"


def objective(section: Dpo, mode: str, engine: Engine, frozen: Sequence[nn.Module] = ()) -> Objective:
    """Preference optimization as the engine's objective.

    Args:
        frozen: chunks of the reference, for `model`.
    """
    context = engine.mesh.context
    step = partial(dpo.forward_step, dpo=section, context=context)
    if mode in ("none", "cached"):
        return Objective(step, dpo.METRICS)
    return Objective(step, dpo.METRICS, partial(_completed, frozen))


def _completed(frozen: Sequence[nn.Module], engine: Engine, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
    """The micro-batches of a step, with the reference's log-probabilities."""
    micro_batches = list(itertools.islice(batches, engine.layout.num_microbatches))
    return dpo.with_reference(micro_batches, _reference(engine, frozen, micro_batches))


@torch.no_grad()
def _reference(engine: Engine, frozen: Sequence[nn.Module], micro_batches: Sequence[MicroBatch]) -> list[torch.Tensor]:
    step = partial(dpo.reference_step, context=engine.mesh.context)
    if frozen:
        return scheduled(engine, frozen, iter(micro_batches), step, forward_only=True)
    training = [chunk.training for chunk in engine.chunks]
    for chunk in engine.chunks:
        chunk.eval()  # nothing is kept for a recomputation that will not come
    try:
        if engine.adapters is None:
            return scheduled(engine, engine.chunks, iter(micro_batches), step, forward_only=True)
        with engine.adapters.off():
            return scheduled(engine, engine.chunks, iter(micro_batches), step, forward_only=True)
    finally:
        for chunk, before in zip(engine.chunks, training, strict=True):
            chunk.train(before)


def cache(engine: Engine, pairs: Pairs, share: BatchShard, base: str, folder: Path, display: Display | Silent) -> None:
    """Have the pairs carry the reference's log-probabilities: those of the model as it stands, adapters off.

    They are kept in `folder`, by the digests of the model and of the data.

    Args:
        base: digest of the model's weights.
    """
    key = hashlib.blake2b(f"{base}:{pairs.fingerprint()}".encode(), digest_size=8).hexdigest()
    file, group = folder / f"reference_{key}.npz", engine.mesh.host_group
    known: list = [file.is_file()]
    dist.broadcast_object_list(known, src=0, group=group)
    if known[0]:
        try:
            with np.load(file, allow_pickle=False) as kept:
                pairs.reference = {name: kept[name] for name in kept.files}
        except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ConfigError(f"{file}: cannot be read ({error}).\n  Remove it: it is made again.") from None
        return
    names = list(pairs.readers)
    found = {}
    with display.counting("reference", sum(pairs.num_pairs(name) for name in names)) as advance:
        for name in names:
            found[name] = _pass(engine, pairs, name, share, advance)
    if engine.mesh.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        partial_file = folder / f".{file.name}"
        with open(partial_file, "wb") as stream:
            np.savez(stream, **found)  # type: ignore[arg-type]
        partial_file.rename(file)
    dist.barrier(group=group)
    pairs.reference = found


def _pass(engine: Engine, pairs: Pairs, name: str, share: BatchShard, advance) -> np.ndarray:
    """The reference's log-probability of each answer of a source, fp32 [pairs, 2], on every rank."""
    mesh, count = engine.mesh, pairs.num_pairs(name)
    device = next(engine.chunks[0].parameters()).device
    batches = on_device(pairs.all_pairs(name, share), device)
    result = torch.zeros(count, 2)
    for first in range(0, count, share.global_batch):
        reports = _reference(engine, (), list(itertools.islice(batches, share.num_microbatches)))
        # Tensor and context peers hold the same sums; one of them counts.
        for number, report in enumerate(reports if mesh.tensor.rank == 0 and mesh.context.rank == 0 else []):
            rows = first + share.rows(number)
            kept = rows < count
            result[rows[kept]] = report.cpu().view(-1, 2)[kept]
        advance(min(share.global_batch, count - first))
    dist.all_reduce(result, group=mesh.host_group)
    return result.numpy()
