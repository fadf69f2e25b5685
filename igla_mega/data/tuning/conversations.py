"""Draw the batches of instruction tuning and preference optimization: functions of data, step and data-parallel rank.

Both data sets implement `batches.Dataset`. Each sample of every source is drawn once per epoch; the last
`validation_fraction` of each source is held out.
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from igla_mega.config.errors import ConfigError
from igla_mega.data.batches import BatchShard, as_tensor, fingerprint_of
from igla_mega.data.indexed import IndexedReader
from igla_mega.data.micro_batch import SEQUENCES, MicroBatch
from igla_mega.data.packing import Packing, Row, fill_row
from igla_mega.data.prepared import TARGETS
from igla_mega.data.tuning.chat import Sample
from igla_mega.data.tuning.pairs import Pair, rows_of
from igla_mega.data.windows import feistel_permutation, round_keys


class _Samples:
    """Open files, and the split of each source into training and held-out samples; common to both data sets."""

    documents_each: int
    """Number of documents of a source that make up one sample."""
    noun: str
    """Plural name of the samples, in messages and in the ledger."""

    def __init__(
        self,
        prefixes: Mapping[str, str | Path],
        *,
        sequence_length: int,
        seed: int,
        vocab_size: int,
        validation_fraction: float,
    ):
        """Open every source.

        Raises:
            ConfigError: all errors of the sources, together.
        """
        self.sequence_length, self.seed = sequence_length, seed
        self.readers: dict[str, IndexedReader] = {}
        self._starts: dict[str, np.ndarray] = {}
        self._held_out: dict[str, list[tuple[str, int]]] = {}
        self._train: list[tuple[str, int]] = []
        breaches: list[str] = []
        for name, prefix in prefixes.items():
            try:
                self._open(name, str(prefix), vocab_size, validation_fraction)
            except ConfigError as error:
                breaches += error.breaches
        if breaches:
            raise ConfigError(*breaches)
        self._identity = json.dumps([self.noun, sequence_length, seed, vocab_size, validation_fraction])

    def _open(self, name: str, prefix: str, vocab_size: int, validation_fraction: float) -> None:
        """Open a source and split its samples.

        Raises:
            ConfigError: the files are damaged, or no sample is left for training.
        """
        reader = self.readers[name] = IndexedReader(prefix, vocab_size)
        self._starts[name] = reader.document_starts(0, reader.num_documents)
        count = reader.num_documents // self.documents_each
        held_out = max(1, round(count * validation_fraction)) if validation_fraction else 0
        if held_out >= count:
            raise ConfigError(
                f"data.validation_fraction: {validation_fraction} holds out {held_out} of the {count} {self.noun} of "
                f"{name}, which leaves none for training.\n  Add {self.noun}, or set data.validation_fraction to 0."
            )
        self._train += [(name, i) for i in range(count - held_out)]
        self._held_out[name] = [(name, i) for i in range(count - held_out, count)]

    @property
    def notes(self) -> list[str]:
        """Lines to show at the start."""
        held_out = sum(len(samples) for samples in self._held_out.values())
        return [f"{len(self._train):,} {self.noun} for training, {held_out:,} held out"]

    def _tokens(self, name: str, document: int) -> np.ndarray:
        """Return the tokens of a document, int64.

        Raises:
            ConfigError: a token id outside the vocabulary.
        """
        starts, reader = self._starts[name], self.readers[name]
        first, stop = int(starts[document]), int(starts[document + 1])
        if error := reader.out_of_range(first, stop):
            raise error
        return reader.tokens(first, stop).astype(np.int64)

    def validation_names(self) -> list[str]:
        """Return the sources that have a held-out part."""
        return [name for name, samples in self._held_out.items() if samples]

    def fingerprint(self) -> str:
        """Return a digest of the order of the data, and of the files' sizes and first and last bytes."""
        return fingerprint_of(self._identity, self.readers)

    def _entry(self, step: int, global_batch: int, per_epoch: int) -> dict[str, dict[str, list[int]]]:
        """Return what one step consumes: samples [first, end), counted from the start of training, and epochs."""
        first, last = step * global_batch, (step + 1) * global_batch
        return {self.noun: {"samples": [first, last], "epochs": [first // per_epoch, (last - 1) // per_epoch]}}


class Conversations(_Samples):
    """Conversations packed into rows; only the assistant's tokens are targets."""

    documents_each, noun = 1, "conversations"

    def __init__(self, prefixes: Mapping[str, str | Path], *, pack: bool = True, **settings):
        self._targets: dict[str, IndexedReader] = {}
        super().__init__(prefixes, **settings)
        self.pack = pack
        self._packing = self._packed(self._train)
        self._validation = {name: self._packed(samples) for name, samples in self._held_out.items() if samples}

    def _open(self, name: str, prefix: str, vocab_size: int, validation_fraction: float) -> None:
        super()._open(name, prefix, vocab_size, validation_fraction)
        self._targets[name] = IndexedReader(prefix + TARGETS)

    def _packed(self, samples: Sequence[tuple[str, int]]) -> Packing:
        """Return which samples share a row, from their lengths in tokens."""
        lengths = {name: np.diff(starts) for name, starts in self._starts.items()}
        sizes = np.array([lengths[name][index] for name, index in samples])
        return Packing(sizes, self.sequence_length, self.seed, pack=self.pack)

    def _sample(self, name: str, index: int) -> Sample:
        """Read a conversation and its target mask."""
        first, stop = (int(self._starts[name][i]) for i in (index, index + 1))
        return Sample(self._tokens(name, index), self._targets[name].tokens(first, stop).astype(bool))

    def micro_batches(self, step: int, share: BatchShard) -> Iterator[MicroBatch]:
        """Yield the micro-batches of one rank at one step, counted from 0."""
        for microbatch in range(share.num_microbatches):
            rows = step * share.global_batch + share.rows(microbatch)
            yield self._batch([self._row(self._packing, self._train, int(row)) for row in rows])

    def _row(self, packing: Packing, samples: Sequence[tuple[str, int]], row: int) -> Row:
        return fill_row([self._sample(*samples[i]) for i in packing.samples(row)], self.sequence_length, 0)

    def _batch(self, rows: Sequence[Row]) -> MicroBatch:
        batch = batch_of(rows)
        return batch._replace(documents=[row.documents for row in rows]) if self.pack else batch

    def ledger_entry(self, step: int, global_batch: int) -> dict[str, dict[str, list[int]]]:
        """Return the rows that one step consumes, counted from the start of training."""
        return self._entry(step, global_batch, self._packing.num_rows)

    def windows_per_epoch(self) -> dict[str, int]:
        """Return the number of rows in an epoch, of all sources together: a row may have samples of several."""
        return {self.noun: self._packing.num_rows}

    def num_validation_samples(self, name: str) -> int:
        """Return the number of held-out rows of a source."""
        return self._validation[name].num_rows

    def validation_batches(self, name: str, share: BatchShard, num_batches: int) -> Iterator[MicroBatch]:
        """Yield the held-out rows of a source, the same at every call, filled up with rows without targets."""
        packing = self._validation[name]
        for batch, microbatch in itertools.product(range(num_batches), range(share.num_microbatches)):
            numbers = batch * share.global_batch + share.rows(microbatch)
            empty = fill_row([], self.sequence_length, 0)
            held = self._held_out[name]
            yield self._batch([self._row(packing, held, int(n)) if n < packing.num_rows else empty for n in numbers])


class Pairs(_Samples):
    """Preference pairs: two rows each, the chosen answer before the rejected one."""

    documents_each, noun = 3, "pairs"

    reference: Mapping[str, np.ndarray] | None = None
    """By source, log-probability of each answer under the reference model, fp32 [pairs, 2], added to the batches."""

    def _open(self, name: str, prefix: str, vocab_size: int, validation_fraction: float) -> None:
        super()._open(name, prefix, vocab_size, validation_fraction)
        parts = np.diff(self._starts[name])[: 3 * self.num_pairs(name)].reshape(-1, 3)
        lengths = parts[:, 0] + parts[:, 1:].max(axis=1)
        if lengths.max() > self.sequence_length:
            pair = int(lengths.argmax())
            raise ConfigError(
                f"training.sequence_length: pair {pair} of {name} has {lengths[pair]} tokens with its longer answer, "
                f"more than the {self.sequence_length} of a row.\n  Raise it, or lower data.max_length."
            )

    def num_pairs(self, name: str) -> int:
        """Return the number of pairs of a source, held-out ones included."""
        return self.readers[name].num_documents // self.documents_each

    def all_pairs(self, name: str, share: BatchShard) -> Iterator[MicroBatch]:
        """Yield micro-batches of all pairs of a source in the order of the file, filled up with empty pairs."""
        count = self.num_pairs(name)
        for first in range(0, count, share.global_batch):
            for microbatch in range(share.num_microbatches):
                numbers = first + share.rows(microbatch)
                yield self._batch([(name, int(n)) if n < count else None for n in numbers])

    def micro_batches(self, step: int, share: BatchShard) -> Iterator[MicroBatch]:
        """Yield the micro-batches of one rank at one step, counted from 0."""
        size = len(self._train)
        for microbatch in range(share.num_microbatches):
            drawn = []
            for number in step * share.global_batch + share.rows(microbatch):
                # A keyed permutation of the epoch's places: random access, with no shuffled list to keep.
                epoch, place = divmod(int(number), size)
                keys = round_keys(self.seed, self.noun, epoch)[:-1]
                drawn.append(self._train[int(feistel_permutation(np.array([place]), size, keys)[0]) if size > 1 else 0])
            yield self._batch(drawn)

    def _pair(self, name: str, index: int) -> Pair:
        """Read a pair, stored as three documents: prompt, chosen answer, rejected answer."""
        return Pair(*(self._tokens(name, 3 * index + part) for part in range(3)))

    def _batch(self, drawn: Sequence[tuple[str, int] | None]) -> MicroBatch:
        """Return pairs as a micro-batch; None is an empty pair: two rows without targets, which count nothing."""
        known = [one for one in drawn if one is not None]
        rows = iter(rows_of([self._pair(*one) for one in known], self.sequence_length, 0))
        empty = fill_row([], self.sequence_length, 0)
        batch = batch_of([empty if one is None else next(rows) for one in drawn for _ in range(2)])
        if self.reference is not None:
            nothing = np.zeros(2, np.float32)
            reference = [nothing if one is None else self.reference[one[0]][one[1]] for one in drawn]
            batch = batch._replace(reference=as_tensor(np.concatenate(reference)))
        return batch

    def ledger_entry(self, step: int, global_batch: int) -> dict[str, dict[str, list[int]]]:
        """Return the pairs that one step consumes, counted from the start of training."""
        return self._entry(step, global_batch, len(self._train))

    def windows_per_epoch(self) -> dict[str, int]:
        """Return the number of pairs in an epoch, of all sources together."""
        return {self.noun: len(self._train)}

    def num_validation_samples(self, name: str) -> int:
        """Return the number of held-out pairs of a source."""
        return len(self._held_out[name])

    def validation_batches(self, name: str, share: BatchShard, num_batches: int) -> Iterator[MicroBatch]:
        """Yield the held-out pairs of a source, the same at every call, filled up with empty pairs."""
        held = self._held_out[name]
        for batch, microbatch in itertools.product(range(num_batches), range(share.num_microbatches)):
            numbers = batch * share.global_batch + share.rows(microbatch)
            yield self._batch([held[int(n)] if n < len(held) else None for n in numbers])


def batch_of(rows: Sequence[Row]) -> MicroBatch:
    """Return rows as a micro-batch, [B, S]."""
    tokens, labels, loss_mask, positions = (
        as_tensor(np.stack([getattr(row, name) for row in rows])) for name in SEQUENCES
    )
    return MicroBatch(tokens, labels, loss_mask, positions)
