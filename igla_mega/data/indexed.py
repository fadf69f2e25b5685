"""Megatron's indexed datasets, `<prefix>.bin` (tokens) and `<prefix>.idx` (where they lie), byte for byte.

The .idx, little-endian: magic (9 bytes), version (uint64, 1), dtype code (uint8), number of sequences n (uint64),
number of document borders d (uint64), lengths in tokens (n x int32), offsets in bytes (n x int64), borders as sequence
numbers (d x int64, the first is 0), and in multimodal sets modes (n x int8), which are ignored.
"""

import contextlib
import fcntl
import os
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np

from igla_mega.config.errors import ConfigError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16}
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}

_CHUNK = 1 << 20
_SAMPLE_TOKENS = 1 << 16


def token_dtype(vocab_size: int) -> np.dtype:
    """The type Megatron's tools choose for ids below `vocab_size`."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


class IndexedReader:
    """One indexed dataset as a single stream of tokens, documents end to end, memory-mapped.

    Opening costs the same for any size: counts, file sizes, and a bounded sample of offsets and tokens are checked.
    """

    def __init__(self, prefix: str | Path, vocab_size: int | None = None):
        """Open `<prefix>.bin` and `<prefix>.idx`.

        Args:
            vocab_size: rows of the model's embedding; every id must be below it.

        Raises:
            ConfigError: a file is missing, empty, cut short or of another format, the two do not belong together, or an
                id in the sample is outside the vocabulary.
        """
        self.prefix = str(prefix)
        self.vocab_size = vocab_size
        bin_file, idx_file = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
        for file in (bin_file, idx_file):
            if not file.is_file():
                raise ConfigError(f"{file}: no such file.\n  Run `igla-mega prepare`, or mend the path of this source.")
            if file.stat().st_size == 0:
                raise ConfigError(f"{file}: the file is empty.\n  {_AGAIN}")
        self._read_index(idx_file)
        self._match(bin_file)
        self._stream = np.memmap(bin_file, dtype=self.dtype, mode="r")
        if vocab_size is not None:
            self._check_sample(vocab_size)

    @property
    def num_tokens(self) -> int:
        return len(self._stream)

    @property
    def num_documents(self) -> int:
        return len(self._borders) - 1

    def document_start(self, document: int) -> int:
        """Offset in the stream of a document's first token; `document_start(num_documents)` is `num_tokens`."""
        sequence = int(self._borders[document])
        if sequence == len(self._offsets):
            return self.num_tokens
        return int(self._offsets[sequence]) // self.dtype.itemsize

    def document_starts(self) -> np.ndarray:
        """Offset in the stream of every document's first token, and of the end, int64 [num_documents + 1]."""
        return np.append(self._offsets // self.dtype.itemsize, self.num_tokens).astype(np.int64)[self._borders]

    def document_of(self, token: int) -> int:
        """Number of the document that holds the token at this offset of the stream."""
        sequence = int(np.searchsorted(self._offsets, token * self.dtype.itemsize, side="right")) - 1
        return int(np.searchsorted(self._borders, sequence, side="right")) - 1

    def starts_within(self, start: int, stop: int) -> np.ndarray:
        """Offsets in the stream at which documents begin, above `start` and below `stop`."""
        first, last = self.document_of(start) + 1, self.document_of(stop - 1)
        starts = self._offsets[self._borders[first : last + 1]] // self.dtype.itemsize
        return np.unique(starts[starts > start])  # empty documents begin where the next one does

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the stream, a view of the file in its own dtype."""
        return self._stream[start:stop]

    def out_of_range(self, start: int, stop: int) -> ConfigError | None:
        """The error that names the first id of [start, stop) outside the vocabulary, if there is one."""
        if self.vocab_size is None or start >= stop:
            return None
        tokens = self._stream[start:stop]
        if tokens.min() >= 0 and tokens.max() < self.vocab_size:
            return None
        at = start + int(np.flatnonzero((tokens < 0) | (tokens >= self.vocab_size))[0])
        return ConfigError(
            f"{self.prefix}.bin: token {at} (document {self.document_of(at)}) has id {int(self._stream[at])}, outside"
            f" model.vocab_size {self.vocab_size}.\n"
            "  Prepare the data with the model's tokenizer, or set model.vocab_size to that of the data's tokenizer."
        )

    def _read_index(self, file: Path) -> None:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            header = stream.read(HEADER.size)
        if header[: len(MAGIC)] != MAGIC[: len(header)]:
            raise ConfigError(
                f"{file}: not an index of Megatron's (it begins with {header[:9]!r}, not {MAGIC!r}).\n  {_AGAIN}"
            )
        if len(header) < HEADER.size:
            raise ConfigError(f"{file}: cut short: {size} bytes, the header alone has {HEADER.size}.\n  {_AGAIN}")
        _, version, code, num_sequences, num_borders = HEADER.unpack(header)
        if version != 1:
            raise ConfigError(f"{file}: version {version} of the format; only 1 is known.\n  {_AGAIN}")
        if code not in DTYPES or not np.issubdtype(DTYPES[code], np.integer):
            name = np.dtype(DTYPES[code]).name if code in DTYPES else "unknown"
            raise ConfigError(f"{file}: dtype code {code} ({name}) is no type for token ids.\n  {_AGAIN}")
        needed = HEADER.size + 12 * num_sequences + 8 * num_borders
        if size not in (needed, needed + num_sequences):
            raise ConfigError(
                f"{file}: {size} bytes, but its {num_sequences} sequences and {num_borders} document borders take"
                f" {needed}: cut short or damaged.\n  {_AGAIN}"
            )
        if num_sequences == 0 or num_borders < 2:
            raise ConfigError(f"{file}: no documents inside.\n  Give the source some text and run `igla-mega prepare`.")

        self.dtype = np.dtype(DTYPES[code])
        at = HEADER.size
        self._lengths = np.memmap(file, np.int32, "r", at, (num_sequences,))
        self._offsets = np.memmap(file, np.int64, "r", at + 4 * num_sequences, (num_sequences,))
        self._borders = np.memmap(file, np.int64, "r", at + 12 * num_sequences, (num_borders,))
        if self._borders[0] != 0 or self._borders[-1] != num_sequences:
            raise ConfigError(
                f"{file}: documents span sequences {self._borders[0]} to {self._borders[-1]}, but there are"
                f" {num_sequences}.\n  {_AGAIN}"
            )

    def _match(self, bin_file: Path) -> None:
        """Hold the index to the size of the .bin, and a sample of its offsets to its lengths."""
        last = len(self._offsets) - 1
        needed = int(self._offsets[last]) + int(self._lengths[last]) * self.dtype.itemsize
        size = bin_file.stat().st_size
        if needed != size:
            what = "cut short or from another run" if size < needed else "of another dtype or from another run"
            raise ConfigError(
                f"{bin_file}: {size} bytes, but {self.prefix}.idx says {needed}"
                f" ({needed // self.dtype.itemsize} tokens of {self.dtype.name}): {what}.\n  {_AGAIN}"
            )
        sample = np.unique(np.linspace(0, last, min(last + 1, 1024)).astype(np.int64))
        ends = self._offsets[sample] + self._lengths[sample].astype(np.int64) * self.dtype.itemsize
        following = np.where(sample < last, self._offsets[np.minimum(sample + 1, last)], size)
        if self._offsets[0] != 0 or (wrong := np.flatnonzero(ends != following)).size:
            k = int(sample[wrong[0]]) if self._offsets[0] == 0 else 0
            raise ConfigError(
                f"{self.prefix}.idx: sequence {k} (offset {self._offsets[k]}, {self._lengths[k]} tokens of"
                f" {self.dtype.name}) does not end where the next begins: damaged.\n  {_AGAIN}"
            )

    def _check_sample(self, vocab_size: int) -> None:
        """Look at the first and last tokens and 16 places between; `batches` looks at every token it hands out."""
        starts = {0, max(0, self.num_tokens - _SAMPLE_TOKENS)}
        starts.update(int(start) for start in np.linspace(0, self.num_tokens, 16, endpoint=False))
        for start in sorted(starts):
            length = _SAMPLE_TOKENS if start in (0, self.num_tokens - _SAMPLE_TOKENS) else 1024
            if error := self.out_of_range(start, min(start + length, self.num_tokens)):
                raise error


_AGAIN = "Run `igla-mega prepare` (or tools/preprocess_data.py) again for this source."


class IndexedWriter:
    """Write `<prefix>.bin` and `<prefix>.idx`, one sequence per document, in bounded memory.

    Both grow under temporary names and get their own when complete, the .idx last: what has an .idx is whole.
    A context manager: an exception inside removes what was written.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype | type):
        """
        Raises:
            ConfigError: another process is writing the same prefix.
        """
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype)
        self.num_documents = 0
        self.num_tokens = 0
        Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
        self._bin = _open_exclusively(f"{self.prefix}.bin.partial")
        # Lengths are written straight behind the header's place: an index of 1e8 documents never lies in memory.
        self._idx = open(f"{self.prefix}.idx.partial", "w+b")  # noqa: SIM115 (closed with the writer)
        self._idx.seek(HEADER.size)

    def __enter__(self) -> "IndexedWriter":
        return self

    def __exit__(self, kind, *_) -> None:
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
            tokens: ids of all of them, end to end.
            lengths: tokens of each.
        """
        assert int(lengths.sum()) == len(tokens), f"{len(tokens)} tokens, lengths that add up to {int(lengths.sum())}"
        self._bin.write(np.ascontiguousarray(tokens, dtype=self.dtype).data)
        self._idx.write(np.ascontiguousarray(lengths, dtype=np.int32).data)
        self.num_documents += len(lengths)
        self.num_tokens += len(tokens)

    def finish(self) -> None:
        """Complete the index, flush both to disk and give them their names."""
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

        for stream in (self._bin, self._idx):
            stream.flush()
            os.fsync(stream.fileno())
        # An old index must not be seen beside the new tokens.
        Path(f"{self.prefix}.idx").unlink(missing_ok=True)
        os.replace(f"{self.prefix}.bin.partial", f"{self.prefix}.bin")
        os.replace(f"{self.prefix}.idx.partial", f"{self.prefix}.idx")
        self._close()

    def abandon(self) -> None:
        """Remove the temporary files; what had the final names before stays."""
        for suffix in (".bin.partial", ".idx.partial"):
            Path(self.prefix + suffix).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # a full disk refuses the last buffer once more
            self._close()

    def _close(self) -> None:
        self._idx.close()
        self._bin.close()


def _open_exclusively(path: str) -> BinaryIO:
    """Open for writing from empty, held by a lock that ends with the process: a killed run's leftover is taken over."""
    stream = open(path, "ab")  # noqa: SIM115 (closed with the writer)
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between open and lock the other writer may have finished: then this file has its final name already.
        ours = os.path.exists(path) and os.path.samestat(os.fstat(stream.fileno()), os.stat(path))
    except BlockingIOError:
        ours = False
    if not ours:
        stream.close()
        raise ConfigError(f"{path}: another process is writing this dataset.\n  Wait for it, or write elsewhere.")
    stream.truncate(0)
    return stream
