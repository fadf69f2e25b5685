"""Pack short samples into rows of one length by best-fit decreasing, with no attention between samples.

Which lengths share a row depends on the lengths only (Johnson et al. 1974: at most 11/9 of the optimal row count).
Which sample of a given length takes which place, and the order of the rows, are permutations keyed by (seed, epoch):
row i of a run is a pure function of (seed, i), and every epoch has the same number of rows.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from igla_mega.config.errors import ConfigError
from igla_mega.data.document_packing import best_fit
from igla_mega.data.tuning.chat import Sample
from igla_mega.data.windows import feistel_permutation, round_keys


class Row(NamedTuple):
    """One row of S tokens: contiguous documents followed by padding."""

    tokens: np.ndarray
    """Input token ids, int64 [S]."""
    labels: np.ndarray
    """Next token of the same document, int64 [S]."""
    loss_mask: np.ndarray
    """1 where the label is a target, else 0, float32 [S]."""
    position_ids: np.ndarray
    """Positions counted from the beginning of each document, int64 [S]."""
    documents: list[int]
    """Start of each document within the row, followed by the end of the last one."""


class Packing:
    """Assignment of samples of known lengths to rows, for any number of epochs."""

    def __init__(self, lengths: np.ndarray, sequence_length: int, seed: int, *, pack: bool = True):
        """Plan the rows, in a few microseconds per sample.

        Args:
            lengths: number of tokens of each sample, int [n], each in [2, sequence_length].
            pack: True to put several samples into a row; otherwise one sample per row.

        Raises:
            ConfigError: there are no samples, or a sample is longer than a row.
        """
        lengths = np.asarray(lengths, dtype=np.int64)
        if not len(lengths):
            raise ConfigError("data: no samples to train on.\n  Provide at least one conversation that is kept.")
        if lengths.max() > sequence_length:
            sample = int(lengths.argmax())
            raise ConfigError(
                f"training.sequence_length: sample {sample} has {lengths[sample]} tokens, more than"
                f" the {sequence_length} of a row.\n  Raise it, or lower data.max_length."
            )
        self.sequence_length, self.seed = sequence_length, seed
        # Sorted by length: samples of equal length form a group. Permuting within a group only keeps the plan valid
        # in every epoch, since the plan depends on the lengths alone.
        self._samples = np.argsort(-lengths, kind="stable")
        _, counts = np.unique(-lengths, return_counts=True)
        self._group_starts = np.concatenate([[0], np.cumsum(counts)])
        rows = best_fit(lengths, sequence_length)[self._samples] if pack else np.arange(len(lengths))
        order = np.argsort(rows, kind="stable")
        self._slots = order
        """Positions in `_samples`, row by row."""
        self._row_starts = np.searchsorted(rows[order], np.arange(rows.max() + 2))

    @property
    def num_rows(self) -> int:
        """Number of rows per epoch."""
        return len(self._row_starts) - 1

    @property
    def num_samples(self) -> int:
        """Number of samples per epoch."""
        return len(self._samples)

    def samples(self, row: int) -> list[int]:
        """Return the sample numbers in a row; `row` counts from the start of training over all epochs."""
        epoch, place = divmod(row, self.num_rows)
        at = self._permuted("rows", epoch, np.array([place]), self.num_rows)[0]
        return [self._drawn(int(slot), epoch) for slot in self._slots[self._row_starts[at] : self._row_starts[at + 1]]]

    def _drawn(self, slot: int, epoch: int) -> int:
        """Return the sample that takes a slot in an epoch: a permutation within the slot's group of equal lengths."""
        group = int(np.searchsorted(self._group_starts, slot, side="right")) - 1
        first, size = int(self._group_starts[group]), int(self._group_starts[group + 1] - self._group_starts[group])
        return int(self._samples[first + self._permuted(f"samples {group}", epoch, np.array([slot - first]), size)[0]])

    def _permuted(self, name: str, epoch: int, places: np.ndarray, size: int) -> np.ndarray:
        """Return `places` under the permutation of 0 .. size - 1 keyed by (seed, name, epoch)."""
        if size == 1:
            return places
        return feistel_permutation(places, size, round_keys(self.seed, name, epoch)[:-1])


def fill_row(samples: Sequence[Sample], sequence_length: int, pad_id: int) -> Row:
    """Concatenate samples into a row; no label crosses a sample boundary, and padding is not a target.

    Without samples, return a row of padding that counts as one document.
    """
    tokens = np.full(sequence_length, pad_id, dtype=np.int64)
    labels = np.full(sequence_length, pad_id, dtype=np.int64)
    loss_mask = np.zeros(sequence_length, dtype=np.float32)
    position_ids = np.arange(sequence_length, dtype=np.int64)
    documents = [0]
    for sample in samples:
        start = documents[-1]
        stop = start + len(sample.tokens)
        tokens[start:stop] = sample.tokens
        labels[start : stop - 1] = sample.tokens[1:]
        loss_mask[start : stop - 1] = sample.targets[1:]
        position_ids[start:] -= position_ids[start]  # the padding continues the last document's positions
        documents.append(stop)
    if not samples:
        documents.append(sequence_length)
    return Row(tokens, labels, loss_mask, position_ids, documents)
