"""Join datasets in order, by copying their bytes into one dataset or by a file that refers to them."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from igla_mega.config.errors import ConfigError
from igla_mega.data.indexed import IndexedReader, IndexedWriter, joined_path, publish
from igla_mega.data.journal import Lock, replace_file
from igla_mega.data.prepared import recorded_bos
from igla_mega.prepare.bar import say
from igla_mega.prepare.manifest import index_entry, manifest_path, read_manifest

_DOCUMENTS = 1 << 20
"""Documents copied at a time."""
_TOKENS = 1 << 24
"""Tokens copied at a time."""


def complete_parts(prefix: str | Path, num_parts: int) -> list[str]:
    """Return the prefixes of a dataset's parts in order if all are complete, else an empty list."""
    parts = [f"{prefix}_{number:05d}-of-{num_parts:05d}" for number in range(num_parts)]
    return parts if all(Path(f"{part}.idx").is_file() for part in parts) else []


def merge(
    prefix: str | Path,
    parts: Sequence[str | Path],
    how: Literal["copy", "reference"] = "copy",
    *,
    progress: bool = True,
) -> None:
    """Join datasets into one, with the documents in the order of the parts.

    With `copy`, the result is a Megatron .bin and .idx, and the parts may be removed. With `reference`, it is
    `<prefix>.joined.json`, which lists the parts; they must remain, and only this project's reader can follow it.

    Raises:
        ConfigError: a part is missing or damaged, or has another dtype or tokenizer than the first.
    """
    if not parts:
        raise ConfigError("merge: no parts given.\n  Name the datasets to join, without .bin and .idx.")
    if any(os.path.abspath(part) == os.path.abspath(prefix) for part in parts):
        raise ConfigError(f"{prefix}: is both a part and the result.\n  Give the result another name.")
    # With many machines, one of them may have received no document.
    parts = [part for part in parts if (read_manifest(part) or {}).get("documents") != 0]
    if not parts:
        raise ConfigError(f"{prefix}: none of its parts contains a document.\n  Give the source some text.")
    readers = [IndexedReader(part) for part in parts]
    manifests = [read_manifest(part) for part in parts]
    breaches = []
    for part, reader, manifest in zip(parts, readers, manifests, strict=True):
        if reader.dtype != readers[0].dtype:
            breaches.append(
                f"{part}: ids of type {reader.dtype.name}, but {parts[0]} has {readers[0].dtype.name}.\n"
                "  Join only datasets prepared with the same tokenizer."
            )
        if manifest and manifests[0] and manifest["tokenizer"]["digest"] != manifests[0]["tokenizer"]["digest"]:
            breaches.append(
                f"{part}: prepared with another tokenizer than {parts[0]}.\n"
                "  Join only datasets prepared with the same tokenizer."
            )
        if manifest and manifests[0] and (theirs := recorded_bos(manifest)) != (first := recorded_bos(manifests[0])):
            breaches.append(
                f"{part}: prepared with data.add_bos: {theirs}, but {parts[0]} with {first}.\n"
                "  Join only datasets prepared with the same rule: prepare one of them again."
            )
    if breaches:
        raise ConfigError(*breaches)
    if how == "reference":
        base = Path(prefix).parent
        base.mkdir(parents=True, exist_ok=True)
        names = [os.path.relpath(part, base) for part in parts]
        replace_file(joined_path(prefix), (json.dumps({"parts": names}, indent=2) + "\n").encode())
    else:
        _merge_by_copy(str(prefix), readers, [manifest for manifest in manifests if manifest])
    if progress:
        documents = sum(reader.num_documents for reader in readers)
        tokens = sum(reader.num_tokens for reader in readers)
        say(f"{prefix}: {len(parts)} datasets joined by {how}, {documents:,} documents, {tokens:,} tokens")


def _merge_by_copy(prefix: str, readers: list[IndexedReader], manifests: list[dict[str, Any]]) -> None:
    """Copy all parts into one dataset, with a manifest if every part has one."""
    joined_path(prefix).unlink(missing_ok=True)
    with Lock(prefix) as lock:
        writer = IndexedWriter(prefix, readers[0].dtype, lock=lock)
        try:
            shards = []
            for reader in readers:
                _copy(reader, writer)
                size = reader.num_tokens * reader.dtype.itemsize
                shards.append({"bytes": size, "sha256": writer.take_digests()["sha256"]})
            writer.complete()
        except BaseException:
            writer.abandon()
            raise
        writer.leave()
        manifest_path(prefix).unlink(missing_ok=True)
        if len(manifests) == len(readers):
            manifest = {**_together(manifests), "shards": shards, "index": index_entry(f"{prefix}.idx.partial")}
            replace_file(Path(f"{manifest_path(prefix)}.partial"), (json.dumps(manifest, indent=2) + "\n").encode())
        publish(prefix, [".bin", ".manifest.json", ".idx"])


def _together(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one manifest for several: inputs and counts of all, everything else from the first."""
    both = {**manifests[0], "inputs": [given for manifest in manifests for given in manifest["inputs"]]}
    jobs = "".join(manifest["job"] for manifest in manifests)
    both["job"] = hashlib.sha256(jobs.encode()).hexdigest()
    for name in ("documents", "tokens", "characters", "text_bytes", "input_bytes", "empty", "broken"):
        both[name] = sum(manifest[name] for manifest in manifests)
    for name in ("dropped", "languages"):
        total: Counter = Counter()
        for manifest in manifests:
            total.update(manifest[name])
        both[name] = dict(sorted(total.items()))
    both.pop("part", None)
    return both


def _copy(reader: IndexedReader, writer: IndexedWriter) -> None:
    """Append a dataset in bounded memory."""
    for first in range(0, reader.num_documents, _DOCUMENTS):
        starts = reader.document_starts(first, min(first + _DOCUMENTS, reader.num_documents))
        writer.add_lengths(np.diff(starts))
    for at in range(0, reader.num_tokens, _TOKENS):
        writer.add_tokens(reader.tokens(at, min(at + _TOKENS, reader.num_tokens)))
