"""The batches of instruction tuning and of preference optimization: functions of (data, step, data-parallel rank).

Both have the interface of `batches.Dataset`. All sources are drawn from alike, each once an epoch; the last
`validation_fraction` of each is held out.
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from igla_mega.config.errors import ConfigError
from igla_mega.data.batches import BatchShard, as_tensor, fingerprint_of
from igla_mega.data.chat import Sample
from igla_mega.data.indexed import IndexedReader
from igla_mega.data.micro_batch import SEQUENCES, MicroBatch
from igla_mega.data.packing import Packing, Row, fill_row
from igla_mega.data.pairs import Pair, rows_of
from igla_mega.data.prepared import TARGETS
from igla_mega.data.windows import feistel_permutation, round_keys


class _Samples:
    """What both have: open files, which samples of each source train and which are held out."""

    documents_each: int
    """Documents of a source that make up one sample."""
    noun: str

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
            ConfigError: all that is wrong with the sources, together.
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
        reader = self.readers[name] = IndexedReader(prefix, vocab_size)
        self._starts[name] = reader.document_starts(0, reader.num_documents)
        count = reader.num_documents // self.documents_each
        held_out = max(1, round(count * validation_fraction)) if validation_fraction else 0
        if held_out >= count:
            raise ConfigError(
                f"data.validation_fraction: {validation_fraction} holds out {held_out} of the {count} {self.noun} of "
                f"{name}: none is left to train on.\n  Give the source more, or set data.validation_fraction to 0."
            )
        self._train += [(name, i) for i in range(count - held_out)]
        self._held_out[name] = [(name, i) for i in range(count - held_out, count)]

    @property
    def notes(self) -> list[str]:
        """What to say at the start."""
        held_out = sum(len(samples) for samples in self._held_out.values())
        return [f"{len(self._train):,} {self.noun} to learn from, {held_out:,} held out"]

    def _tokens(self, name: str, document: int) -> np.ndarray:
        starts, reader = self._starts[name], self.readers[name]
        first, stop = int(starts[document]), int(starts[document + 1])
        if error := reader.out_of_range(first, stop):
            raise error
        return reader.tokens(first, stop).astype(np.int64)

    def validation_names(self) -> list[str]:
        """Sources that have a part held out."""
        return [name for name, samples in self._held_out.items() if samples]

    def fingerprint(self) -> str:
        """A short digest of the order of the data, the files' sizes, and the ends of their contents."""
        return fingerprint_of(self._identity, self.readers)

    def _entry(self, step: int, global_batch: int, per_epoch: int) -> dict[str, dict[str, list[int]]]:
        first, last = step * global_batch, (step + 1) * global_batch
        return {self.noun: {"samples": [first, last], "epochs": [first // per_epoch, (last - 1) // per_epoch]}}


class Conversations(_Samples):
    """Conversations packed into rows, only the assistant's tokens being targets."""

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
        lengths = {name: np.diff(starts) for name, starts in self._starts.items()}
        sizes = np.array([lengths[name][index] for name, index in samples])
        return Packing(sizes, self.sequence_length, self.seed, pack=self.pack)

    def _sample(self, name: str, index: int) -> Sample:
        first, stop = (int(self._starts[name][i]) for i in (index, index + 1))
        return Sample(self._tokens(name, index), self._targets[name].tokens(first, stop).astype(bool))

    def micro_batches(self, step: int, share: BatchShard) -> Iterator[MicroBatch]:
        """The micro-batches of one rank at one step."""
        for microbatch in range(share.num_microbatches):
            rows = step * share.global_batch + share.rows(microbatch)
            yield self._batch([self._row(self._packing, self._train, int(row)) for row in rows])

    def _row(self, packing: Packing, samples: Sequence[tuple[str, int]], row: int) -> Row:
        return fill_row([self._sample(*samples[i]) for i in packing.samples(row)], self.sequence_length, 0)

    def _batch(self, rows: Sequence[Row]) -> MicroBatch:
        batch = batch_of(rows)
        return batch._replace(documents=[row.documents for row in rows]) if self.pack else batch

    def ledger_entry(self, step: int, global_batch: int) -> dict[str, dict[str, list[int]]]:
        """Rows that one step consumes, counted from the start of training."""
        return self._entry(step, global_batch, self._packing.num_rows)

    def windows_per_epoch(self) -> dict[str, int]:
        """Rows of an epoch, of all sources together."""
        return {self.noun: self._packing.num_rows}

    def num_validation_samples(self, name: str) -> int:
        return self._validation[name].num_rows

    def validation_batches(self, name: str, share: BatchShard, num_batches: int) -> Iterator[MicroBatch]:
        """Rows held out of a source, the same at every call; filled up with rows of no target."""
        packing = self._validation[name]
        for batch, microbatch in itertools.product(range(num_batches), range(share.num_microbatches)):
            numbers = batch * share.global_batch + share.rows(microbatch)
            empty = fill_row([], self.sequence_length, 0)
            held = self._held_out[name]
            yield self._batch([self._row(packing, held, int(n)) if n < packing.num_rows else empty for n in numbers])


class Pairs(_Samples):
    """Preference pairs, two rows each, the chosen answer's first."""

    documents_each, noun = 3, "pairs"

    reference: Mapping[str, np.ndarray] | None = None
    """By source, the reference's log-probability of each answer, fp32 [pairs, 2], handed out with them."""

    def num_pairs(self, name: str) -> int:
        """Pairs of a source, those held out among them."""
        return self.readers[name].num_documents // self.documents_each

    def all_pairs(self, name: str, share: BatchShard) -> Iterator[MicroBatch]:
        """Micro-batches of every pair of a source in the order of the file, filled up with its first."""
        count = self.num_pairs(name)
        for first in range(0, count, share.global_batch):
            for microbatch in range(share.num_microbatches):
                numbers = first + share.rows(microbatch)
                yield self._batch([(name, int(n) if n < count else 0) for n in numbers])

    def micro_batches(self, step: int, share: BatchShard) -> Iterator[MicroBatch]:
        """The micro-batches of one rank at one step."""
        size = len(self._train)
        for microbatch in range(share.num_microbatches):
            drawn = []
            for number in step * share.global_batch + share.rows(microbatch):
                epoch, place = divmod(int(number), size)
                keys = round_keys(self.seed, self.noun, epoch)[:-1]
                drawn.append(self._train[int(feistel_permutation(np.array([place]), size, keys)[0]) if size > 1 else 0])
            yield self._batch(drawn)

    def _pair(self, name: str, index: int) -> Pair:
        return Pair(*(self._tokens(name, 3 * index + part) for part in range(3)))

    def _batch(self, drawn: Sequence[tuple[str, int]]) -> MicroBatch:
        batch = batch_of(rows_of([self._pair(*one) for one in drawn], self.sequence_length, 0))
        if self.reference is not None:
            reference = np.concatenate([self.reference[name][i] for name, i in drawn])
            batch = batch._replace(reference=as_tensor(reference))
        return batch

    def ledger_entry(self, step: int, global_batch: int) -> dict[str, dict[str, list[int]]]:
        """Pairs that one step consumes, counted from the start of training."""
        return self._entry(step, global_batch, len(self._train))

    def windows_per_epoch(self) -> dict[str, int]:
        """Pairs of an epoch, of all sources together."""
        return {self.noun: len(self._train)}

    def num_validation_samples(self, name: str) -> int:
        return len(self._held_out[name])

    def validation_batches(self, name: str, share: BatchShard, num_batches: int) -> Iterator[MicroBatch]:
        """Pairs held out of a source, the same at every call; the last batch begins anew where they do not fill it."""
        held = self._held_out[name]
        for batch, microbatch in itertools.product(range(num_batches), range(share.num_microbatches)):
            numbers = batch * share.global_batch + share.rows(microbatch)
            yield self._batch([held[int(n) % len(held)] for n in numbers])


def batch_of(rows: Sequence[Row]) -> MicroBatch:
    """Rows as tensors."""
    tokens, labels, loss_mask, positions = (
        as_tensor(np.stack([getattr(row, name) for row in rows])) for name in SEQUENCES
    )
    return MicroBatch(tokens, labels, loss_mask, positions)
