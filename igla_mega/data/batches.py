"""Draw the micro-batches of a training step as tensors: a pure function of corpus, step and data-parallel rank.

Shapes: B rows of a micro-batch, S tokens per row.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from igla_mega.config.errors import ConfigError
from igla_mega.config.files import regular
from igla_mega.data.blend import Blend, changing_blend
from igla_mega.data.document_packing import PackedRows
from igla_mega.data.indexed import IndexedReader
from igla_mega.data.loader import open_loader
from igla_mega.data.micro_batch import MicroBatch
from igla_mega.data.windows import Windows, split_point

Borders = tuple[np.ndarray, int]
"""Positions at which documents begin within a row, after its first token, and the row's number of input tokens."""


@dataclass(frozen=True)
class BatchShard:
    """Part of each global batch that this process computes.

    Micro-batch m of data-parallel rank r has rows (m * data_parallel + r) * micro_batch_size + j of the global batch,
    so that the global batch is the same in every layout. Tensor, pipeline and context peers have the same part.
    """

    global_batch: int
    """Samples per optimizer step, over all ranks."""
    micro_batch_size: int
    """Samples per micro-batch of a data-parallel rank."""
    data_parallel: int = 1
    """Number of data-parallel ranks."""
    data_rank: int = 0
    """Data-parallel rank of this process."""

    def __post_init__(self) -> None:
        if self.global_batch % (self.micro_batch_size * self.data_parallel):
            raise ConfigError(
                f"training.batch_size: {self.global_batch} is not divisible by micro_batch_size "
                f"{self.micro_batch_size} times {self.data_parallel} data-parallel ranks.\n"
                f"  Use a multiple of {self.micro_batch_size * self.data_parallel}."
            )

    @property
    def num_microbatches(self) -> int:
        """Number of micro-batches per step and data-parallel rank."""
        return self.global_batch // (self.micro_batch_size * self.data_parallel)

    def rows(self, microbatch: int) -> np.ndarray:
        """Return the rows of the global batch in one micro-batch, int64 [B]."""
        first = (microbatch * self.data_parallel + self.data_rank) * self.micro_batch_size
        return np.arange(first, first + self.micro_batch_size, dtype=np.int64)


class Dataset(Protocol):
    """Data that a run draws its batches from: text (`Corpus`), conversations or pairs (`conversations`)."""

    sequence_length: int
    readers: dict[str, IndexedReader]

    @property
    def notes(self) -> list[str]:
        """Lines to show at the start."""

    def micro_batches(self, step: int, share: BatchShard) -> Iterator[MicroBatch]:
        """Yield the micro-batches of one rank at one step, counted from 0."""

    def ledger_entry(self, step: int, global_batch: int) -> dict[str, dict[str, list[int]]]:
        """Return what one step consumes, ready for JSON: for each source, `samples` [first, end) and `epochs`."""

    def windows_per_epoch(self) -> dict[str, int]:
        """Return the number of samples in one epoch of each source."""

    def validation_names(self) -> list[str]:
        """Return the sources that have a held-out part."""

    def num_validation_samples(self, name: str) -> int:
        """Return the number of held-out samples of a source."""

    def validation_batches(self, name: str, share: BatchShard, num_batches: int) -> Iterator[MicroBatch]:
        """Yield one rank's micro-batches of at most `num_batches` held-out global batches, the same at every call."""

    def fingerprint(self) -> str:
        """Return a digest by which ranks verify that they read the same data."""


@dataclass(frozen=True)
class Sampling:
    """How samples are cut out of the sources of a corpus."""

    sequence_length: int
    """Tokens per sample."""
    seed: int
    """Seed of the order of the samples."""
    vocab_size: int
    """Number of rows of the model's embedding; a token id outside is an error."""
    validation_fraction: float
    """Share of the documents, the last ones of each source, that is held out from training."""
    document_mask: bool = False
    """True if tokens attend to their own document only: batches carry the documents' borders, positions start at 0 in
    each document, and no target crosses a border."""
    packing: str = "concatenate"
    """`concatenate`: documents end to end, cut at the end of a row; `best_fit`: whole documents, then padding, which
    requires a document mask."""


class Corpus:
    """Text sources of a run: open files, their split by document, and the blend."""

    mixes: Sequence[tuple[int, Mapping[str, float]]] = ()
    """Mixes that the run follows, see `follow`."""

    def __init__(
        self,
        prefixes: Mapping[str, str | Path],
        mix: Mapping[str, float],
        sampling: Sampling,
        *,
        loader: str = "native",
        prefetch: int = 2,
    ):
        """Open every source whose weight is above zero, and each that `mix` does not name for validation only.

        Args:
            prefixes: source name -> path without .bin and .idx.
            mix: source name -> weight.
            loader: `native` or `dali`.
            prefetch: number of micro-batches that are prepared ahead of their step.

        Raises:
            ConfigError: all errors of the sources, together.
        """
        packing, sequence_length, seed = sampling.packing, sampling.sequence_length, sampling.seed
        self.sequence_length, self.document_mask = sequence_length, sampling.document_mask
        self.blend = Blend(mix)
        drawn = [name for name, weight in mix.items() if weight > 0]
        breaches = [
            f"data.sources.{name}: no path for a source that data.mix draws from.\n  Give one, or set its weight to 0."
            for name in drawn
            if name not in prefixes
        ]
        self.readers: dict[str, IndexedReader] = {}
        self._train: dict[str, Windows | PackedRows] = {}
        self._validation: dict[str, tuple[int, int]] = {}
        for name in [name for name in prefixes if mix.get(name) != 0]:
            try:
                reader = IndexedReader(prefixes[name], sampling.vocab_size)
                border = split_point(name, reader, sampling.validation_fraction)
                if name in drawn and packing == "best_fit":
                    num_documents = reader.document_of(border - 1) + 1
                    self._train[name] = PackedRows(name, reader, num_documents, sequence_length, seed)
                elif name in drawn:
                    self._train[name] = Windows(name, 0, border, sequence_length, seed)
            except ConfigError as error:
                breaches += error.breaches
                continue
            self.readers[name] = reader
            self._validation[name] = (border, reader.num_tokens)
        if packing == "best_fit" and not sampling.document_mask:
            breaches.append(
                "data.document_packing: best_fit packs whole documents, which requires data.document_mask.\n"
                "  Set data.document_mask=true."
            )
        if breaches:
            raise ConfigError(*breaches)
        self._packed = packing == "best_fit"
        self._loading = loader, self._micro_batches, prefetch
        self._loader = open_loader(*self._loading)
        # Everything that decides on the order of the data, for `fingerprint`.
        self._identity = json.dumps(
            [dict(mix), sequence_length, seed, sampling.vocab_size, sampling.validation_fraction, packing]
        )

    def follow(self, mixes: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """Draw with mixes that change during the run, see `changing_blend`; the sources of the last one are open."""
        self.blend = changing_blend(mixes)
        # The loader may have prepared micro-batches of the old blend.
        self._loader = open_loader(*self._loading)

    @property
    def notes(self) -> list[str]:
        """Lines to show at the start."""
        return [self.blend.note] if self.blend.note else []

    def rows(self, samples: np.ndarray) -> np.ndarray:
        """Return the tokens of global samples (int64 [n]), int64 [n, S + 1]: S inputs and the label of the last."""
        rows = np.empty((len(samples), self.sequence_length + 1), dtype=np.int64)
        for row, (name, start) in zip(rows, self._places(samples), strict=True):
            self._fill(row, name, start)
        return rows

    def _places(self, samples: np.ndarray) -> list[tuple[str, int]]:
        """Return the source of each sample, and the position in the source's stream of tokens at which it starts."""
        sources, indices = self.blend.lookup(samples)
        starts = np.empty_like(indices)
        for source in np.unique(sources):
            here = sources == source
            windows = self._train[self.blend.names[source]]
            assert isinstance(windows, Windows), "a packed row consists of several places"
            starts[here] = windows.starts(indices[here])
        return [(self.blend.names[source], int(start)) for source, start in zip(sources, starts, strict=True)]

    def micro_batches(self, step: int, share: BatchShard) -> Iterator[MicroBatch]:
        """Yield the micro-batches of one rank at one step (counted from 0), in order.

        Yields:
            Tokens, labels (the next tokens), position_ids: int64 [B, S]; loss_mask: fp32 [B, S]; with a document mask
            also documents: for each row, the positions at which they begin, and the end of the last one.

        Raises:
            ConfigError: a token id outside the vocabulary.
        """
        return self._loader.step(step, share)

    def _micro_batches(self, step: int, share: BatchShard) -> Iterator[MicroBatch]:
        """Read the micro-batches of a step; the loader calls it, possibly on another thread."""
        for microbatch in range(share.num_microbatches):
            samples = step * share.global_batch + share.rows(microbatch)
            if self._packed:
                yield self._packed_batch(samples)
                continue
            borders = [self._borders(*place) for place in self._places(samples)] if self.document_mask else None
            yield self._batch(self.rows(samples), borders=borders)

    def _packed_batch(self, samples: np.ndarray) -> MicroBatch:
        """Return rows of whole documents; padding at the end of a row is a separate document, and no target."""
        shape = (len(samples), self.sequence_length)
        tokens, labels = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        mask = np.zeros(shape, np.float32)
        positions = np.tile(np.arange(self.sequence_length), (len(samples), 1))
        documents = []
        sources, indices = self.blend.lookup(samples)
        for row, (source, index) in enumerate(zip(sources, indices, strict=True)):
            name = self.blend.names[source]
            packed = self._train[name]
            assert isinstance(packed, PackedRows)
            borders = [0]
            for start, length in packed.segments(index):
                at, end = borders[-1], borders[-1] + length
                read = np.zeros(length + 1, np.int64)
                follows = start + length < self.readers[name].num_tokens
                self._fill(read, name, start, length + follows)
                tokens[row, at:end], labels[row, at:end] = read[:-1], read[1:]
                mask[row, at:end] = 1.0
                # The last token of a document has no label. A document longer than a row is cut into pieces: the last
                # token of a piece has one, the first token of the next piece.
                ends = not follows or bool(self.readers[name].starts_within(start, start + length + 1).size)
                if ends:
                    mask[row, end - 1] = 0.0
                    labels[row, end - 1] = 0
                positions[row, at:end] -= at
                borders.append(end)
            if borders[-1] < self.sequence_length:
                positions[row, borders[-1] :] -= borders[-1]
                borders.append(self.sequence_length)
            documents.append(borders)
        return MicroBatch(as_tensor(tokens), as_tensor(labels), as_tensor(mask), as_tensor(positions), documents)

    def ledger_entry(self, step: int, global_batch: int) -> dict[str, dict[str, list[int]]]:
        """Return what one step consumes, ready for JSON: by source, `samples` [first, end) and `epochs` [first, last].

        Samples are counted per source from the start of training, across epochs: epoch = sample // windows_per_epoch.
        """
        sources, indices = self.blend.sources_of(step * global_batch, (step + 1) * global_batch)
        entry = {}
        for source in np.unique(sources):
            name = self.blend.names[source]
            drawn = indices[sources == source]
            first, last = int(drawn[0]), int(drawn[-1])
            per_epoch = self._train[name].per_epoch
            entry[name] = {"samples": [first, last + 1], "epochs": [first // per_epoch, last // per_epoch]}
        return entry

    def windows_per_epoch(self) -> dict[str, int]:
        """Return the number of samples in one pass over each source's training part."""
        return {name: windows.per_epoch for name, windows in self._train.items()}

    def read_until(self, step: int, global_batch: int) -> dict[str, tuple[int, float | None]]:
        """Return what the steps before this one have read of each source: tokens, and epochs of its training part.

        Epochs are None for a source that a changed mix no longer draws from.
        """
        drawn, windows = self.blend.consumed(step * global_batch), self.windows_per_epoch()
        return {
            name: (n * self.sequence_length, n / windows[name] if name in windows else None)
            for name, n in drawn.items()
            if n
        }

    def validation_names(self) -> list[str]:
        """Return the sources that have a validation part of at least two tokens, an input and its label."""
        return [name for name, (first, end) in self._validation.items() if end - first >= 2]

    def held_out(self, name: str) -> tuple[int, int]:
        """Return the range [first, end) of a source's validation part in its stream of tokens."""
        return self._validation[name]

    def num_validation_samples(self, name: str) -> int:
        """Return the number of validation windows of a source; one if the part is shorter than a window."""
        first, end = self._validation[name]
        return max((end - first - 1) // self.sequence_length, 1)

    def validation_batches(self, name: str, share: BatchShard, num_batches: int) -> Iterator[MicroBatch]:
        """Yield validation samples of one source in the order of the file, the same at every call.

        Every rank gets the same number of micro-batches: rows beyond the validation part have loss_mask 0, and so has
        the rest of a part shorter than one window. A mean over the mask is therefore exact in every layout.

        Args:
            num_batches: maximum number of global batches.
        """
        first, end = self._validation[name]
        num_samples = self.num_validation_samples(name)
        for batch in range(min(num_batches, -(-num_samples // share.global_batch))):
            for microbatch in range(share.num_microbatches):
                borders = [(np.empty(0, np.int64), self.sequence_length)] * share.micro_batch_size
                rows = np.zeros((share.micro_batch_size, self.sequence_length + 1), dtype=np.int64)
                mask = np.zeros((share.micro_batch_size, self.sequence_length), dtype=np.float32)
                for row, sample in enumerate(batch * share.global_batch + share.rows(microbatch)):
                    if sample < num_samples:
                        start = first + int(sample) * self.sequence_length
                        length = min(self.sequence_length + 1, end - start)
                        self._fill(rows[row], name, start, length)
                        mask[row, : length - 1] = 1.0
                        borders[row] = self._borders(name, start, length)
                yield self._batch(rows, mask, borders if self.document_mask else None)

    def fingerprint(self) -> str:
        """Return a digest of the order of the data, the files' sizes, and the first and last bytes of their contents.

        Ranks compare it to verify that they read the same data; its cost does not depend on the files' sizes.
        """
        return fingerprint_of(self._identity, self.readers)

    def _fill(self, row: np.ndarray, name: str, start: int, length: int | None = None) -> None:
        """Read `length` tokens (by default S + 1) of a source at `start` into the beginning of `row`.

        Raises:
            ConfigError: a token id outside the vocabulary.
        """
        length = length or self.sequence_length + 1
        reader = self.readers[name]
        if error := reader.out_of_range(start, start + length):
            raise error
        row[:length] = reader.tokens(start, start + length)

    def _borders(self, name: str, start: int, length: int | None = None) -> Borders:
        """Return the positions at which documents begin in the tokens read at `start`, and the number of inputs."""
        length = length or self.sequence_length + 1
        return self.readers[name].starts_within(start, start + length) - start, length - 1

    def _batch(
        self, rows: np.ndarray, loss_mask: np.ndarray | None = None, borders: list[Borders] | None = None
    ) -> MicroBatch:
        """Return rows, [B, S + 1], as a micro-batch; with borders, documents are kept apart."""
        shape = (len(rows), self.sequence_length)
        mask = np.ones(shape, np.float32) if loss_mask is None else loss_mask
        positions = np.tile(np.arange(self.sequence_length), (len(rows), 1))
        documents = []
        for row, (starts, num_inputs) in enumerate(borders or ()):
            mask[row, starts - 1] = 0.0  # their labels belong to the next document
            documents.append([0, *starts[starts < num_inputs].tolist(), num_inputs])
            for first, stop in itertools.pairwise(documents[-1]):
                positions[row, first:stop] -= first
        tokens, labels = as_tensor(rows[:, :-1]), as_tensor(rows[:, 1:])
        return MicroBatch(tokens, labels, as_tensor(mask), as_tensor(positions), documents if borders else None)


def fingerprint_of(identity: str, readers: Mapping[str, IndexedReader]) -> str:
    """Return a digest of a text, the files' sizes, and the first and last 64 KiB of their contents."""
    digest = hashlib.blake2b(identity.encode(), digest_size=8)
    for name, reader in readers.items():
        for path in reader.files:
            size = path.stat().st_size
            digest.update(f"{name}{path.suffix}{size}".encode())
            with open(path, "rb", opener=regular) as stream:
                digest.update(stream.read(1 << 16))
                stream.seek(max(0, size - (1 << 16)))
                digest.update(stream.read(1 << 16))
    return digest.hexdigest()


def source_fingerprints(dataset: Dataset) -> dict[str, str]:
    """Return a digest for each source of a dataset: of its files' sizes and ends, wherever they are stored."""
    return {name: fingerprint_of(name, {name: reader}) for name, reader in sorted(dataset.readers.items())}


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """Return a contiguous copy, in pinned memory if there is CUDA, so that its transfer can overlap the step."""
    dtype = torch.float32 if array.dtype == np.float32 else torch.int64
    tensor = torch.empty(array.shape, dtype=dtype, pin_memory=torch.cuda.is_available())
    tensor.numpy()[:] = array
    return tensor


def on_device(batches: Iterator[MicroBatch], device: torch.device) -> Iterator[MicroBatch]:
    """Return the batches with their tensors on the model's device."""
    if device.type == "cpu":
        return batches

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        # A copy from pageable memory blocks the host in spite of `non_blocking`.
        return tensor.pin_memory().to(device, non_blocking=True)

    return (batch.map_tensors(moved) for batch in batches)
