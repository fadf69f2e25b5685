"""Read `<prefix>.manifest.json`, which records a dataset's inputs and options, and check the files against it."""

import hashlib
import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, NonNegativeInt, ValidationError

from igla_mega.config import json_text
from igla_mega.config.errors import ConfigError
from igla_mega.config.files import regular

_AGAIN = "Run `igla-mega prepare` (or tools/preprocess_data.py) again for this source."


class _Piece(BaseModel):
    """Size and digest of a contiguous part of a file."""

    bytes: NonNegativeInt
    sha256: str


class _Input(BaseModel):
    """Input file as it was during the preparation."""

    file: str
    bytes: NonNegativeInt
    modified_ns: int


class _Tokenizer(BaseModel):
    """Tokenizer of the dataset."""

    path: str
    digest: str


class _Manifest(BaseModel):
    """Fields of a manifest that this project reads; it has more."""

    job: str
    inputs: list[_Input]
    tokenizer: _Tokenizer
    options: dict[str, Any] = {}
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
    """Return the path of a dataset's manifest."""
    return Path(f"{prefix}.manifest.json")


def read_manifest(prefix: str | Path) -> dict[str, Any] | None:
    """Return a dataset's manifest; None if it has none, like datasets of other tools.

    Raises:
        ConfigError: the manifest is damaged.
    """
    path = manifest_path(prefix)
    try:
        manifest = json_text.read(path)
        _Manifest.model_validate(manifest, strict=True)
        return manifest
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "it"
        raise ConfigError(f"{path}: not a manifest: {field}: {first['msg']}.\n  {_AGAIN}") from None
    except ValueError:
        raise ConfigError(f"{path}: not a manifest: truncated or damaged.\n  {_AGAIN}") from None


def damage(prefix: str | Path, *, tokenizer_digest: str | None = None, whole: bool = False) -> list[str]:
    """Return all differences between a dataset and its manifest as error texts; none if it has no manifest.

    Args:
        tokenizer_digest: digest of the tokenizer that the dataset should have been prepared with.
        whole: True to check every byte instead of the sizes and the first, the middle and the last shard.
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
            breaches.append(f"{path}: no such file, although its manifest exists.\n  {_AGAIN}")
        elif path.stat().st_size != size:
            breaches.append(f"{path}: {path.stat().st_size} bytes, but its manifest records {size}.\n  {_AGAIN}")
    if breaches:
        return breaches
    # Three shards catch mixed-up and partly copied files at a cost that does not grow with the dataset.
    checked = range(len(shards)) if whole else {0, len(shards) // 2, len(shards) - 1}
    begin = 0
    with open(f"{prefix}.bin", "rb", opener=regular) as stream:
        for number, shard in enumerate(shards):
            if number in checked and digest_of(stream, begin, shard["bytes"]) != shard["sha256"]:
                breaches.append(
                    f"{prefix}.bin: bytes {begin:,} to {begin + shard['bytes']:,} differ from those written"
                    f" (sha256): damaged.\n  {_AGAIN}"
                )
            begin += shard["bytes"]
    if whole or sizes[".idx"] < 1 << 26:
        with open(f"{prefix}.idx", "rb", opener=regular) as stream:
            if digest_of(stream, 0, sizes[".idx"]) != manifest["index"]["sha256"]:
                breaches.append(f"{prefix}.idx: differs from what was written (sha256): damaged.\n  {_AGAIN}")
    return breaches


def index_entry(path: str | Path) -> dict[str, Any]:
    """Return the manifest's entry for an index file."""
    with open(path, "rb", opener=regular) as stream:
        size = stream.seek(0, 2)
        return {"bytes": size, "sha256": digest_of(stream, 0, size)}


def digest_of(stream: Any, begin: int, size: int) -> str:
    """Return the sha256 of `size` bytes of an open file from `begin` on."""
    digest = hashlib.sha256()
    stream.seek(begin)
    while size > 0 and (piece := stream.read(min(size, 1 << 22))):
        digest.update(piece)
        size -= len(piece)
    return digest.hexdigest()


def modified_inputs(prefix: str | Path) -> list[str]:
    """Return the inputs that exist but have changed since the dataset was prepared."""
    manifest = read_manifest(prefix) or {}
    changed = []
    for given in manifest.get("inputs", []):
        try:
            stat = os.stat(given["file"])
        except (OSError, ValueError):
            continue  # removing an input after the preparation is allowed
        if (stat.st_size, stat.st_mtime_ns) != (given["bytes"], given["modified_ns"]):
            changed.append(given["file"])
    return changed
