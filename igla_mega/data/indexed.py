"""Read and write Megatron's indexed datasets, `<prefix>.bin` (tokens) and `<prefix>.idx` (index), byte for byte.

Layout of the .idx, little-endian: magic (9 bytes), version (uint64, 1), dtype code (uint8), number of sequences n
(uint64), number of document boundaries d (uint64), lengths in tokens (n x int32), offsets in bytes (n x int64),
boundaries as sequence numbers (d x int64, the first is 0), and in multimodal datasets modes (n x int8), which are
ignored.
"""

import contextlib
import hashlib
import os
import struct
from collections.abc import Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import BinaryIO

import numpy as np

from igla_mega.config import json_text
from igla_mega.config.errors import ConfigError
from igla_mega.config.files import no_follow, regular
from igla_mega.data.journal import Lock

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16}
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}

_CHUNK = 1 << 20
"""Documents indexed at a time when the .idx is completed."""
_SAMPLE_TOKENS = 1 << 16
"""Tokens checked at each end of the stream when a dataset is opened."""


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the type that Megatron's tools choose for ids below `vocab_size`."""
    # 65500, not 65536, as in Megatron's DType.optimal_dtype: otherwise the files would not be byte-identical.
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def joined_path(prefix: str | Path) -> Path:
    """Return the path of the file that lists the parts of a joined dataset."""
    return Path(f"{prefix}.joined.json")


class IndexedReader:
    """Memory-mapped stream of tokens, with contiguous documents, over one indexed dataset or several joined ones.

    The cost of opening does not depend on the size: counts, file sizes and a bounded sample of offsets and tokens are
    checked.
    """

    def __init__(self, prefix: str | Path, vocab_size: int | None = None):
        """Open `<prefix>.bin` and `<prefix>.idx`, or the parts listed in `<prefix>.joined.json`.

        Args:
            vocab_size: number of rows in the model's embedding; every id must be below it.

        Raises:
            ConfigError: a file is missing, empty, truncated or of another format, the two files do not match, or a
                sampled id is outside the vocabulary.
        """
        self.prefix = str(prefix)
        self.vocab_size = vocab_size
        self._parts = [_Part(part) for part in part_prefixes(prefix)]
        self.dtype = self._parts[0].dtype
        if other := [part for part in self._parts if part.dtype != self.dtype]:
            raise ConfigError(
                f"{other[0].prefix}: ids of type {other[0].dtype.name} are joined with ids of {self.dtype.name}.\n"
                "  Join only datasets prepared with the same tokenizer."
            )
        self._token_ends = np.cumsum([part.num_tokens for part in self._parts])
        self._document_ends = np.cumsum([part.num_documents for part in self._parts])
        if vocab_size is not None:
            self._check_sample()

    @property
    def num_tokens(self) -> int:
        """Number of tokens in the stream."""
        return int(self._token_ends[-1])

    @property
    def num_documents(self) -> int:
        """Number of documents in the stream."""
        return int(self._document_ends[-1])

    @property
    def files(self) -> list[Path]:
        """Paths of all .idx and .bin files behind the stream."""
        return [Path(part.prefix + suffix) for part in self._parts for suffix in (".idx", ".bin")]

    def document_start(self, document: int) -> int:
        """Return the offset of a document's first token; `document_start(num_documents)` is `num_tokens`."""
        return int(self.document_starts(document, document)[0])

    def document_starts(self, first: int, last: int) -> np.ndarray:
        """Return the offsets of documents `first` to `last`, both included, int64 [last - first + 1]."""
        starts = [np.zeros(0, np.int64)]
        for part, (tokens, documents) in self._placed():
            low, high = max(first - documents, 0), min(last - documents + 1, part.num_documents)
            if low < high:
                starts.append(part.document_starts(low, high) + tokens)
        if last == self.num_documents:
            starts.append(np.array([self.num_tokens], dtype=np.int64))
        return np.concatenate(starts)

    def document_of(self, token: int) -> int:
        """Return the number of the document that holds the token at an offset of the stream."""
        which = int(np.searchsorted(self._token_ends, token, side="right"))
        tokens, documents = self._before(which)
        return documents + self._parts[which].document_of(token - tokens)

    def starts_within(self, start: int, stop: int) -> np.ndarray:
        """Return the offsets of documents that begin above `start` and below `stop`, int64."""
        starts = self.document_starts(self.document_of(start) + 1, self.document_of(stop - 1))
        # An empty document has the same offset as the next one.
        return np.unique(starts[(starts > start) & (starts < stop)])

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Return tokens [start, stop), clipped to the end of the stream, in the stored dtype; a view if in one file."""
        stop = min(stop, self.num_tokens)
        which = min(int(np.searchsorted(self._token_ends, start, side="right")), len(self._parts) - 1)
        before, _ = self._before(which)
        if stop <= self._token_ends[which]:
            return self._parts[which].stream[start - before : stop - before]
        pieces = []
        while start < stop:
            before, _ = self._before(which)
            end = min(stop, int(self._token_ends[which]))
            pieces.append(self._parts[which].stream[start - before : end - before])
            start, which = end, which + 1
        return np.concatenate(pieces)

    def out_of_range(self, start: int, stop: int) -> ConfigError | None:
        """Return the error for the first id of tokens [start, stop) outside the vocabulary, or None."""
        if self.vocab_size is None or start >= stop:
            return None
        return self._out_of_range(start, self.tokens(start, stop))

    def _out_of_range(self, start: int, tokens: np.ndarray) -> ConfigError | None:
        """Return the error for the first of `tokens`, read at `start`, outside the vocabulary, or None."""
        assert self.vocab_size is not None
        if tokens.min() >= 0 and tokens.max() < self.vocab_size:
            return None
        first = int(np.flatnonzero((tokens < 0) | (tokens >= self.vocab_size))[0])
        at = start + first
        part = self._parts[int(np.searchsorted(self._token_ends, at, side="right"))]
        return ConfigError(
            f"{part.prefix}.bin: token {at} (document {self.document_of(at)}) has id {int(tokens[first])}, outside"
            f" model.vocab_size {self.vocab_size}.\n"
            "  Prepare the data with the model's tokenizer, or set model.vocab_size to that of the data's tokenizer."
        )

    def _before(self, which: int) -> tuple[int, int]:
        """Return the number of tokens and documents before a part."""
        return (int(self._token_ends[which - 1]), int(self._document_ends[which - 1])) if which else (0, 0)

    def _placed(self) -> Iterator[tuple["_Part", tuple[int, int]]]:
        """Yield each part with the number of tokens and documents before it."""
        return ((part, self._before(which)) for which, part in enumerate(self._parts))

    def _check_sample(self) -> None:
        """Check the ids at both ends and at 16 places between; `batches` checks every token that it delivers."""
        starts = {0, max(0, self.num_tokens - _SAMPLE_TOKENS)}
        starts.update(int(start) for start in np.linspace(0, self.num_tokens, 16, endpoint=False))
        for start in sorted(starts):
            length = _SAMPLE_TOKENS if start in (0, self.num_tokens - _SAMPLE_TOKENS) else 1024
            if error := self._out_of_range(start, self._tokens_read(start, min(start + length, self.num_tokens))):
                raise error

    def _tokens_read(self, start: int, stop: int) -> np.ndarray:
        """Return the same as `tokens` by reading the file, so that no page of the mapping becomes resident."""
        pieces = []
        for part, (before, _) in self._placed():
            low, high = max(start - before, 0), min(stop - before, part.num_tokens)
            if low < high:
                pieces.append(part.tokens_read(low, high))
        return np.concatenate(pieces)


def part_prefixes(prefix: str | Path) -> list[str]:
    """Return the prefixes of a dataset's parts: its own prefix, or those listed in its `.joined.json`.

    Raises:
        ConfigError: the `.joined.json` is damaged.
    """
    path = joined_path(prefix)
    if not path.is_file():
        return [str(prefix)]
    try:
        named = json_text.read(path)["parts"]
        if not isinstance(named, list) or not all(isinstance(part, str) for part in named):
            raise TypeError("`parts` is not a list of names")
        parts = [str(path.parent / part) for part in named]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not a list of datasets ({error}).\n  Run `igla-mega merge` again.") from None
    if not parts:
        raise ConfigError(f"{path}: refers to no dataset.\n  Run `igla-mega merge` again.")
    return parts


class _Part:
    """One pair of .bin and .idx files."""

    def __init__(self, prefix: str):
        """Map the files and check them against each other."""
        self.prefix = prefix
        bin_file, idx_file = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
        for file in (bin_file, idx_file):
            if not file.is_file():
                raise ConfigError(f"{file}: no such file.\n  Run `igla-mega prepare`, or fix the path of this source.")
            if file.stat().st_size == 0:
                raise ConfigError(f"{file}: the file is empty.\n  {_AGAIN}")
        # Sampled values are read, not taken from the mapping: touching a mapped page can fault in up to 2 MiB.
        with open(idx_file, "rb", buffering=0, opener=regular) as stream:
            self._read_index(idx_file, stream)
            self._match(bin_file, stream)
        self.stream = np.memmap(bin_file, dtype=self.dtype, mode="r")

    @property
    def num_tokens(self) -> int:
        """Number of tokens in the .bin."""
        return len(self.stream)

    @property
    def num_documents(self) -> int:
        """Number of documents in the .idx."""
        return len(self._borders) - 1

    def document_starts(self, first: int, stop: int) -> np.ndarray:
        """Return the token offsets of documents [first, stop), int64; raise ConfigError if they are not in order."""
        # Only a sample was checked at opening. What is used is checked here, at the cost of what is used.
        sequences = self._borders[first:stop]
        if not _ascending(sequences, len(self._offsets)):
            raise self._damaged(f"the boundaries of documents {first} to {stop - 1} are not ascending")
        inside = sequences < len(self._offsets)
        starts = np.full(len(sequences), self.num_tokens, dtype=np.int64)
        starts[inside] = self._offsets[sequences[inside]] // self.dtype.itemsize
        if not _ascending(starts, self.num_tokens):
            raise self._damaged(f"the offsets of documents {first} to {stop - 1} are not ascending")
        return starts

    def _damaged(self, defect: str) -> ConfigError:
        """Return the error for a damaged index."""
        return ConfigError(f"{self.prefix}.idx: damaged, {defect}.\n  {_AGAIN}")

    def document_of(self, token: int) -> int:
        """Return the number of the document that holds the token at an offset of this part."""
        sequence = int(np.searchsorted(self._offsets, token * self.dtype.itemsize, side="right")) - 1
        return int(np.searchsorted(self._borders, sequence, side="right")) - 1

    def _read_index(self, file: Path, stream: FileIO) -> None:
        """Check the header and the size of the .idx, and map its arrays."""
        size = file.stat().st_size
        header = stream.read(HEADER.size)
        if header[: len(MAGIC)] != MAGIC[: len(header)]:
            raise ConfigError(
                f"{file}: not a Megatron index (it begins with {header[:9]!r}, not {MAGIC!r}).\n  {_AGAIN}"
            )
        if len(header) < HEADER.size:
            raise ConfigError(f"{file}: truncated: {size} bytes, but the header alone has {HEADER.size}.\n  {_AGAIN}")
        _, version, code, num_sequences, num_borders = HEADER.unpack(header)
        if version != 1:
            raise ConfigError(f"{file}: format version {version} is not supported, only 1.\n  {_AGAIN}")
        if code not in DTYPES or not np.issubdtype(DTYPES[code], np.integer):
            name = np.dtype(DTYPES[code]).name if code in DTYPES else "unknown"
            raise ConfigError(f"{file}: dtype code {code} ({name}) is not a type for token ids.\n  {_AGAIN}")
        needed = HEADER.size + 12 * num_sequences + 8 * num_borders
        if size not in (needed, needed + num_sequences):
            raise ConfigError(
                f"{file}: {size} bytes, but its {num_sequences} sequences and {num_borders} document boundaries take"
                f" {needed}: truncated or damaged.\n  {_AGAIN}"
            )
        if num_sequences == 0 or num_borders < 2:
            raise ConfigError(f"{file}: contains no documents.\n  Give the source text and run `igla-mega prepare`.")

        self.dtype = np.dtype(DTYPES[code])
        at = HEADER.size
        self._lengths = np.memmap(file, np.int32, "r", at, (num_sequences,))
        self._offsets = np.memmap(file, np.int64, "r", at + 4 * num_sequences, (num_sequences,))
        self._borders = np.memmap(file, np.int64, "r", at + 12 * num_sequences, (num_borders,))
        first, last = (_value(stream, self._borders, place) for place in (0, num_borders - 1))
        if first != 0 or last != num_sequences:
            raise ConfigError(
                f"{file}: documents span sequences {first} to {last}, but there are {num_sequences}.\n  {_AGAIN}"
            )

    def _match(self, bin_file: Path, stream: FileIO) -> None:
        """Check the index against the size of the .bin, and a sample of its offsets against its lengths."""
        last = len(self._offsets) - 1
        needed = _value(stream, self._offsets, last) + _value(stream, self._lengths, last) * self.dtype.itemsize
        size = bin_file.stat().st_size
        if needed != size:
            cause = "truncated or from another run" if size < needed else "of another dtype or from another run"
            raise ConfigError(
                f"{bin_file}: {size} bytes, but {self.prefix}.idx expects {needed}"
                f" ({needed // self.dtype.itemsize} tokens of {self.dtype.name}): {cause}.\n  {_AGAIN}"
            )
        for k in np.unique(np.linspace(0, last, min(last + 1, 1024)).astype(np.int64)).tolist():
            offset, length = _value(stream, self._offsets, k), _value(stream, self._lengths, k)
            following = _value(stream, self._offsets, k + 1) if k < last else size
            if length < 0 or offset + length * self.dtype.itemsize != following or (k == 0 and offset != 0):
                raise ConfigError(
                    f"{self.prefix}.idx: damaged, sequence {k} (offset {offset}, {length} tokens of"
                    f" {self.dtype.name}) does not end where the next begins.\n  {_AGAIN}"
                )

    def tokens_read(self, start: int, stop: int) -> np.ndarray:
        """Return tokens [start, stop) by reading the file, without touching the mapping."""
        size = self.dtype.itemsize
        return np.fromfile(f"{self.prefix}.bin", self.dtype, stop - start, offset=start * size)


def _ascending(values: np.ndarray, maximum: int) -> bool:
    """Return True if values never decrease and are between 0 and `maximum`."""
    return not len(values) or bool(values[0] >= 0 and values[-1] <= maximum and (values[1:] >= values[:-1]).all())


def _value(stream: FileIO, array: np.memmap, place: int) -> int:
    """Return one value of a mapped array by reading its file."""
    stream.seek(array.offset + place * array.dtype.itemsize)
    return int(np.frombuffer(stream.read(array.dtype.itemsize), array.dtype)[0])


_AGAIN = "Run `igla-mega prepare` (or tools/preprocess_data.py) again for this source."


class IndexedWriter:
    """Writer of `<prefix>.bin` and `<prefix>.idx`, one sequence per document, in bounded memory.

    Both are written under temporary names and renamed when complete, the .idx last: a dataset with an .idx is complete.
    As a context manager, it removes the temporary files if an exception occurs.
    """

    LENGTHS_AT = HEADER.size
    """Byte offset of the int32 lengths in the unfinished .idx."""

    def __init__(
        self,
        prefix: str | Path,
        dtype: np.dtype | type,
        *,
        lock: Lock | None = None,
        keep: tuple[int, int] | None = None,
    ):
        """Open the temporary files, empty or after the part that an earlier writer finished.

        Args:
            lock: lock already held for this prefix; None acquires one.
            keep: number of documents and tokens left by an earlier writer after which to continue.

        Raises:
            ConfigError: another process is writing the same prefix.
        """
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype)
        self.num_documents, self.num_tokens = keep or (0, 0)
        self._lock = None if lock else Lock(prefix)
        # Lengths are written directly after the space of the header, not collected: an index of 1e8 documents would
        # otherwise take 400 MB of memory. `complete` derives the offsets from them.
        sizes = {".bin": self.num_tokens * self.dtype.itemsize, ".idx": HEADER.size + 4 * self.num_documents}
        self._digests = [hashlib.sha256(), hashlib.sha256()]
        self._bin, self._idx = (_open_at(f"{self.prefix}{suffix}.partial", size) for suffix, size in sizes.items())

    def __enter__(self) -> "IndexedWriter":
        return self

    def __exit__(self, kind, *_) -> None:
        """Finish the dataset, or remove the temporary files after an exception."""
        if kind is not None:
            self.abandon()
            return
        try:
            self.finish()
        except BaseException:
            self.abandon()
            raise

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents.

        Args:
            tokens: concatenated ids of all documents.
            lengths: number of tokens of each document.
        """
        self.add_parts([tokens], lengths)

    def add_parts(self, parts: Sequence[np.ndarray], lengths: np.ndarray) -> None:
        """Append documents whose concatenated ids are given as several arrays."""
        count = sum(map(len, parts))
        total = int(lengths.sum(dtype=np.int64))
        assert total == count, f"{count} tokens, lengths that add up to {total}"
        for tokens in parts:
            self.add_tokens(tokens)
        self.add_lengths(lengths)

    def add_tokens(self, tokens: np.ndarray) -> None:
        """Append ids; their lengths must follow before the writer is completed."""
        self._write(self._bin, 0, np.ascontiguousarray(tokens, dtype=self.dtype))
        self.num_tokens += len(tokens)

    def add_lengths(self, lengths: np.ndarray) -> None:
        """Append document lengths, in tokens."""
        self._write(self._idx, 1, np.ascontiguousarray(lengths, dtype=np.int32))
        self.num_documents += len(lengths)

    def _write(self, stream: BinaryIO, which: int, array: np.ndarray) -> None:
        stream.write(array.data)
        self._digests[which].update(array.data)

    def take_digests(self) -> dict[str, str]:
        """Return the sha256 of the tokens and of the lengths written since the last call."""
        names = ("sha256", "lengths_sha256")
        digests = {name: digest.hexdigest() for name, digest in zip(names, self._digests, strict=True)}
        self._digests = [hashlib.sha256(), hashlib.sha256()]
        return digests

    def complete(self) -> None:
        """Complete the index, without renaming, and flush both files to disk."""
        self._idx.flush()
        begin = 0
        for first in range(0, self.num_documents, _CHUNK):
            count = min(_CHUNK, self.num_documents - first)
            self._idx.seek(HEADER.size + 4 * first)
            ends = begin + np.cumsum(np.frombuffer(self._idx.read(4 * count), np.int32), dtype=np.int64)
            offsets = np.concatenate([[begin], ends[:-1]]) * self.dtype.itemsize
            self._idx.seek(HEADER.size + 4 * self.num_documents + 8 * first)
            self._idx.write(offsets.astype(np.int64).data)
            begin = int(ends[-1])
        self._idx.seek(HEADER.size + 12 * self.num_documents)
        for first in range(0, self.num_documents + 1, _CHUNK):
            self._idx.write(np.arange(first, min(first + _CHUNK, self.num_documents + 1), dtype=np.int64).data)
        self._idx.seek(0)
        self._idx.write(HEADER.pack(MAGIC, 1, CODES[self.dtype], self.num_documents, self.num_documents + 1))

        self.flush()

    def flush(self) -> None:
        """Flush both files to disk."""
        for stream in (self._bin, self._idx):
            stream.flush()
            os.fsync(stream.fileno())

    def finish(self) -> None:
        """Complete the index, flush both files to disk and rename them to their final names."""
        self.complete()
        publish(self.prefix, [".bin", ".idx"])
        self._close()

    def abandon(self) -> None:
        """Remove the temporary files; files that already had the final names remain."""
        for suffix in (".bin.partial", ".idx.partial"):
            Path(self.prefix + suffix).unlink(missing_ok=True)
        self.leave()

    def leave(self) -> None:
        """Close without finishing; flushed data remains for a later writer with `keep`."""
        for stream in (self._idx, self._bin):
            with contextlib.suppress(OSError):  # on a full disk, closing tries the last buffer again and fails
                stream.close()
        self._close()

    def _close(self) -> None:
        self._idx.close()
        self._bin.close()
        if self._lock is not None:
            self._lock.release()


def publish(prefix: str, suffixes: list[str]) -> None:
    """Rename complete files to their final names in the given order; calling it again after a crash is safe.

    The .idx comes last, so that a dataset with an .idx is complete.
    """
    waiting = [suffix for suffix in suffixes if Path(f"{prefix}{suffix}.partial").exists()]
    if suffixes[-1] in waiting:
        # A reader must not see an old index with the new tokens.
        Path(f"{prefix}{suffixes[-1]}").unlink(missing_ok=True)
    for suffix in waiting:
        os.replace(f"{prefix}{suffix}.partial", f"{prefix}{suffix}")


def _open_at(path: str, size: int) -> BinaryIO:
    """Open a file for writing after its first `size` bytes, which are kept."""
    stream = open(path, "r+b" if size and os.path.exists(path) else "w+b", opener=no_follow)  # noqa: SIM115 (closed with the writer)
    stream.truncate(size)
    stream.seek(size)
    return stream
