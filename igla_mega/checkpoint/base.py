"""Find the frozen base of a checkpoint of adapters, and compute the digest that identifies its weights."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from igla_mega.checkpoint import store
from igla_mega.checkpoint.pieces import Reader, read_whole
from igla_mega.config import json_text
from igla_mega.config.errors import ConfigError
from igla_mega.model.lora import is_adapter
from igla_mega.model.shards import Shard

BASE = "base.json"
"""File in a checkpoint of adapters that identifies their base."""


def base_of(checkpoint: Path) -> Path:
    """Return the checkpoint of the base to which a checkpoint of adapters belongs.

    Raises:
        ConfigError: the base is no longer at its path, or that path holds other weights.
    """
    note = read_base(checkpoint)
    if note is None:
        raise ConfigError(
            f"{checkpoint}: does not name the base of its adapters ({BASE} is missing).\n  Use another checkpoint."
        )
    base = Path(note["checkpoint"])
    if not (base / store.MANIFEST).is_file():
        raise ConfigError(
            f"{checkpoint / BASE}: checkpoint: {base} does not exist.\n  Restore it, or change the path in this file."
        )
    if (found := digest_of_checkpoint(base)) != note["digest"]:
        raise ConfigError(
            f"{base}: not the base of these adapters: its digest is {found}, theirs has {note['digest']}.\n"
            f"  Change the path in {checkpoint / BASE} to their base."
        )
    return base


def read_base(checkpoint: Path) -> dict[str, Any] | None:
    """Return what identifies the base of a checkpoint of adapters.

    Returns:
        `base_model` as the recipe named it, `checkpoint` (a path) and `digest`; None for a checkpoint of a whole model.

    Raises:
        ConfigError: the file is invalid.
    """
    file = checkpoint / BASE
    if not file.is_file():
        return None
    try:
        note = json_text.read(file)
        if not all(isinstance(note[key], str) for key in ("checkpoint", "digest")):
            raise ValueError("`checkpoint` and `digest` are not both texts")
        return {"base_model": None, **note}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file}: does not name a base ({error}).\n  Use another checkpoint.") from None


def digest_of_checkpoint(base: Path, rank: int = 0, size: int = 1, group: dist.ProcessGroup | None = None) -> str:
    """Return `digest_of` the weights in a checkpoint; each of `size` ranks reads some of them."""
    reader = Reader(base)
    names = sorted(name for name in reader.shapes() if not name.startswith("optimizer."))

    def runs() -> Iterator[tuple[Shard, Tensor, int]]:
        for name in names[rank::size]:
            whole = read_whole(reader, name)
            shape = tuple(whole.shape)
            yield Shard(name, shape, shape, None, 0, 1, 1, sequence_parallel=False), whole.view(-1), 0

    return digest_of(runs(), group)


def digest_of(runs: Iterable[tuple[Shard, Tensor, int]], group: dist.ProcessGroup | None = None) -> str:
    """Return 16 hex digits that identify a base's weights, the same in every layout and in fp32 and bf16.

    The bits of each element, rounded to bf16, are multiplied by odd 64-bit numbers drawn for its name, row and column,
    and summed modulo 2^64. Integer addition is associative, so the sum depends on neither the order nor the layout.

    Args:
        runs: as for `build.initialize`; adapters among them are skipped. Over `group`, each element of the model must
            occur once (`Shard.is_first_copy`, one data-parallel rank).
        group: the ranks that hold parts; None if this rank holds all.
    """
    total = torch.zeros(1, dtype=torch.int64)
    for shard, values, start in runs:
        if not is_adapter(shard.name):
            for offset, piece in shard.rectangles(values, start):
                total += _digest_piece(shard, offset, piece).cpu()
    if group is not None:
        dist.all_reduce(total, group=group)
    return f"{int(total.item()) & (2**64 - 1):016x}"


def _digest_piece(shard: Shard, offset: tuple[int, ...], piece: Tensor) -> Tensor:
    """Return one rectangle's part of the sum in `digest_of`, as int64 [1] that wraps around."""
    seed = hashlib.blake2b(shard.name.encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(seed, "big"))
    factors = []
    for size, first, length in zip(shard.shape, offset, piece.shape, strict=True):
        # On the CPU on every machine: the generators of CUDA draw other numbers. `| 1`, because an odd factor has an
        # inverse modulo 2^64, so that no bit of an element is lost.
        drawn = torch.empty(size, dtype=torch.int64).random_(-(2**63), None, generator=generator) | 1
        factors.append(drawn[first : first + length].to(piece.device))
    bits = piece.bfloat16().view(torch.int16)
    total = torch.zeros(1, dtype=torch.int64, device=piece.device)
    if piece.dim() == 1:
        return total + (bits.long() * factors[0]).sum()
    for rows in range(0, len(bits), 256):  # in blocks: as int64 the bits take four times the memory of bf16
        block = (bits[rows : rows + 256].long() * factors[1]).sum(1)
        total += (block * factors[0][rows : rows + 256]).sum()
    return total


def base_note(base: Path, digest: str, name: str | None) -> str:
    """Return the content of `base.json`.

    Args:
        name: the base as the recipe named it.
    """
    return json.dumps({"base_model": name, "checkpoint": str(base.resolve()), "digest": digest}, indent=1) + "\n"


def refuse_other_base(checkpoint: Path, base: Path, digest: str) -> None:
    """Reject a resume of adapters on another base than the one they were trained on.

    Raises:
        ConfigError: the digests differ.
    """
    note = read_base(checkpoint)
    if note is not None and note["digest"] != digest:
        raise ConfigError(
            f"{checkpoint}: adapters of another base: theirs has digest {note['digest']}, {base} has {digest}.\n"
            f"  Use {note['base_model'] or note['checkpoint']}, or start in a new run folder."
        )
