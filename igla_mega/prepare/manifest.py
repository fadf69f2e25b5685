"""What a dataset was made from, beside it: `<prefix>.manifest.json`, and whether its files are still those."""

import hashlib
import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, NonNegativeInt, ValidationError

from igla_mega.config import json_text
from igla_mega.config.errors import ConfigError

_AGAIN = "Run `igla-mega prepare` (or tools/preprocess_data.py) again for this source."


class _Piece(BaseModel):
    bytes: NonNegativeInt
    sha256: str


class _Input(BaseModel):
    file: str
    bytes: NonNegativeInt
    modified_ns: int


class _Tokenizer(BaseModel):
    path: str
    digest: str


class _Manifest(BaseModel):
    """What this project reads of one; there is more in it."""

    job: str
    inputs: list[_Input]
    tokenizer: _Tokenizer
    shards: list[_Piece]
    index: _Piece
    documents: NonNegativeInt
    tokens: NonNegativeInt
    characters: NonNegativeInt
    text_bytes: NonNegativeInt
    input_bytes: NonNegativeInt
    empty: NonNegativeInt
    broken: NonNegativeInt
    dropped: dict[str, NonNegativeInt]
    languages: dict[str, NonNegativeInt]


def manifest_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.manifest.json")


def read_manifest(prefix: str | Path) -> dict[str, Any] | None:
    """The manifest beside a dataset; None where there is none, as beside those of other tools.

    Raises:
        ConfigError: there is one, and it is damaged.
    """
    path = manifest_path(prefix)
    try:
        manifest = json_text.loads(path.read_bytes())
        _Manifest.model_validate(manifest, strict=True)
        return manifest
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise ConfigError(f"{path}: not a manifest: {where}: {first['msg']}.\n  {_AGAIN}") from None
    except ValueError:
        raise ConfigError(f"{path}: not a manifest: cut short or damaged.\n  {_AGAIN}") from None


def damage(prefix: str | Path, *, tokenizer_digest: str | None = None, whole: bool = False) -> list[str]:
    """What speaks against the dataset being the one its manifest tells of; nothing where it has none.

    Args:
        tokenizer_digest: of the tokenizer that it should have been made with.
        whole: look at every byte, not at the sizes and at the first, the middle and the last shard.
    """
    manifest = read_manifest(prefix)
    if manifest is None:
        return []
    made_with = manifest["tokenizer"]["digest"]
    breaches = []
    if tokenizer_digest is not None and made_with != tokenizer_digest:
        breaches.append(
            f"{prefix}: prepared with another tokenizer ({manifest['tokenizer']['path']}, sha256 {made_with[:12]}…)"
            f" than data.tokenizer (sha256 {tokenizer_digest[:12]}…).\n  {_AGAIN}"
        )
    shards = manifest["shards"]
    sizes = {".bin": sum(shard["bytes"] for shard in shards), ".idx": manifest["index"]["bytes"]}
    for suffix, size in sizes.items():
        path = Path(f"{prefix}{suffix}")
        if not path.is_file():
            breaches.append(f"{path}: no such file, though its manifest is there.\n  {_AGAIN}")
        elif path.stat().st_size != size:
            breaches.append(f"{path}: {path.stat().st_size} bytes, its manifest says {size}.\n  {_AGAIN}")
    if breaches:
        return breaches
    looked_at = range(len(shards)) if whole else {0, len(shards) // 2, len(shards) - 1}
    begin = 0
    with open(f"{prefix}.bin", "rb") as stream:
        for number, shard in enumerate(shards):
            if number in looked_at and digest_of(stream, begin, shard["bytes"]) != shard["sha256"]:
                breaches.append(
                    f"{prefix}.bin: bytes {begin:,} to {begin + shard['bytes']:,} are not those that were written"
                    f" (sha256): damaged.\n  {_AGAIN}"
                )
            begin += shard["bytes"]
    if whole or sizes[".idx"] < 1 << 26:
        with open(f"{prefix}.idx", "rb") as stream:
            if digest_of(stream, 0, sizes[".idx"]) != manifest["index"]["sha256"]:
                breaches.append(f"{prefix}.idx: not what was written (sha256): damaged.\n  {_AGAIN}")
    return breaches


def index_entry(path: str | Path) -> dict[str, Any]:
    """What a manifest says of the index."""
    with open(path, "rb") as stream:
        size = stream.seek(0, 2)
        return {"bytes": size, "sha256": digest_of(stream, 0, size)}


def digest_of(stream: Any, begin: int, size: int) -> str:
    """sha256 of a part of an open file."""
    digest = hashlib.sha256()
    stream.seek(begin)
    while size > 0 and (piece := stream.read(min(size, 1 << 22))):
        digest.update(piece)
        size -= len(piece)
    return digest.hexdigest()


def modified_inputs(prefix: str | Path) -> list[str]:
    """Inputs that are there and no longer as they were when the dataset was made."""
    manifest = read_manifest(prefix) or {}
    changed = []
    for given in manifest.get("inputs", []):
        try:
            stat = os.stat(given["file"])
        except (OSError, ValueError):
            continue  # moved away after use, as one may
        if (stat.st_size, stat.st_mtime_ns) != (given["bytes"], given["modified_ns"]):
            changed.append(given["file"])
    return changed
