"""Short samples packed into rows of one length, none of which sees another: best fit, decreasing.

Which lengths share a row depends on the lengths alone (Johnson et al. 1974: at most 11/9 of the fewest rows). Which of
the samples of a length stands where, and the order of the rows, are permutations keyed by (seed, epoch): row i of a run
is a pure function of (seed, i), and every epoch has equally many rows.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from igla_mega.config.errors import ConfigError
from igla_mega.data.chat import Sample
from igla_mega.data.document_packing import best_fit
from igla_mega.data.windows import feistel_permutation, round_keys


class Row(NamedTuple):
    """One row of a batch, S tokens; documents end to end, padding behind them."""

    tokens: np.ndarray
    """int64 [S]"""
    labels: np.ndarray
    """int64 [S]: the next token of the same document."""
    loss_mask: np.ndarray
    """float32 [S]: 1 where the label is a target."""
    position_ids: np.ndarray
    """int64 [S]: counted from the begin of each document."""
    documents: list[int]
    """Where each document begins, and where the last one ends."""


class Packing:
    """Rows of samples whose lengths are known."""

    def __init__(self, lengths: np.ndarray, sequence_length: int, seed: int, *, pack: bool = True):
        """Plan the rows; takes some microseconds a sample.

        Args:
            lengths: tokens of each sample, int [n], each in [2, sequence_length].
            pack: several samples a row; otherwise each has its own.

        Raises:
            ConfigError: no samples, or one that is longer than a row.
        """
        lengths = np.asarray(lengths, dtype=np.int64)
        if not len(lengths):
            raise ConfigError("data: no samples to train on.\n  Give at least one conversation that is not left out.")
        if lengths.max() > sequence_length:
            sample = int(lengths.argmax())
            raise ConfigError(
                f"training.sequence_length: sample {sample} has {lengths[sample]} tokens, a row {sequence_length}.\n"
                "  Raise it, or lower data.max_length."
            )
        self.sequence_length, self.seed = sequence_length, seed
        # In the order of the lengths: equal ones lie together, and each group is permuted by itself.
        self._samples = np.argsort(-lengths, kind="stable")
        _, counts = np.unique(-lengths, return_counts=True)
        self._group_starts = np.concatenate([[0], np.cumsum(counts)])
        rows = best_fit(lengths, sequence_length)[self._samples] if pack else np.arange(len(lengths))
        order = np.argsort(rows, kind="stable")
        self._slots = order
        """Places in `_samples`, row by row."""
        self._row_starts = np.searchsorted(rows[order], np.arange(rows.max() + 2))

    @property
    def num_rows(self) -> int:
        """Rows of an epoch."""
        return len(self._row_starts) - 1

    @property
    def num_samples(self) -> int:
        return len(self._samples)

    def samples(self, row: int) -> list[int]:
        """The samples of a row, counted from the start of training, without end."""
        epoch, place = divmod(row, self.num_rows)
        at = self._permuted("rows", epoch, np.array([place]), self.num_rows)[0]
        return [self._drawn(int(slot), epoch) for slot in self._slots[self._row_starts[at] : self._row_starts[at + 1]]]

    def _drawn(self, slot: int, epoch: int) -> int:
        group = int(np.searchsorted(self._group_starts, slot, side="right")) - 1
        first, size = int(self._group_starts[group]), int(self._group_starts[group + 1] - self._group_starts[group])
        return int(self._samples[first + self._permuted(f"samples {group}", epoch, np.array([slot - first]), size)[0]])

    def _permuted(self, name: str, epoch: int, places: np.ndarray, size: int) -> np.ndarray:
        if size == 1:
            return places
        return feistel_permutation(places, size, round_keys(self.seed, name, epoch)[:-1])


def fill_row(samples: Sequence[Sample], sequence_length: int, pad_id: int) -> Row:
    """Lay samples end to end; no label crosses from one to the next, and padding is no target.

    Of no samples, a row of padding, which is one document.
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
        position_ids[start:] -= position_ids[start]  # of padding, as if it went on
        documents.append(stop)
    if not samples:
        documents.append(sequence_length)
    return Row(tokens, labels, loss_mask, position_ids, documents)
