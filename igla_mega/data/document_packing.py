"""Documents packed whole into rows of one length: best fit, decreasing, longer ones first cut into full rows.

After Ding et al. 2024 (arXiv:2404.10830): no document is cut but where it is longer than a row, tokens see their own
document alone, and what does not fill a row is padding. The plan is made once for a data set and kept beside it.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from igla_mega.config.errors import ConfigError
from igla_mega.data.indexed import IndexedReader
from igla_mega.data.journal import Lock
from igla_mega.data.windows import feistel_permutation, round_keys

_PATIENCE_SECONDS = 3600.0


@dataclass(frozen=True)
class Statistics:
    """What becomes of the tokens of a data set in rows of one length."""

    rows: int
    tokens: int
    padding: float
    """Share of the rows' places that hold no token, 0 to 1."""
    cut_documents: int
    """Documents that do not lie whole within one row."""
    truncated: int
    """Tokens that follow a cut: they do not see the begin of their document."""
    long_share: float
    """Share of the tokens that are of documents longer than a row, 0 to 1."""


def statistics(lengths: np.ndarray, sequence_length: int, *, packed: bool) -> Statistics:
    """Of documents of these lengths: concatenated and split, or packed best fit."""
    lengths = np.asarray(lengths, dtype=np.int64)
    total = int(lengths.sum())
    long_tokens = int(lengths[lengths > sequence_length].sum())
    if packed:
        pieces = cut(lengths, sequence_length)[1]
        num_rows = int(best_fit(pieces, sequence_length).max()) + 1 if len(pieces) else 0
        padding = 1 - total / (num_rows * sequence_length) if num_rows else 0.0
        is_cut = lengths > sequence_length
        truncated = int((lengths[is_cut] - sequence_length).sum())
    else:
        num_rows = max((total - 1) // sequence_length, 0)
        padding = 0.0
        ends = np.cumsum(lengths)
        starts = ends - lengths
        first_row_ends = (starts // sequence_length + 1) * sequence_length
        is_cut = ends > first_row_ends
        truncated = int((ends - first_row_ends)[is_cut].sum())
    return Statistics(num_rows, total, padding, int(is_cut.sum()), truncated, long_tokens / max(total, 1))


def cut(lengths: np.ndarray, sequence_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut documents that lie end to end into pieces of at most one row.

    Returns:
        Where each piece begins in the stream, and its length; int64.
    """
    counts = -(-lengths // sequence_length)
    documents = np.repeat(np.arange(len(lengths)), counts)
    within = (np.arange(len(documents)) - np.repeat(np.cumsum(counts) - counts, counts)) * sequence_length
    starts = (np.cumsum(lengths) - lengths)[documents] + within
    return starts, np.minimum(lengths[documents] - within, sequence_length)


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Put each piece, longest first, into the fullest row that has room for it.

    Args:
        lengths: each in [1, capacity], int64 [n].

    Returns:
        The row of each, int64 [n].
    """
    order = np.argsort(-lengths, kind="stable")
    sizes, counts = np.unique(-lengths, return_counts=True)
    rows = np.empty(len(lengths), dtype=np.int64)
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    # Bit r is set where a row has room for r more: the fullest that fits is the lowest set bit from the size on.
    rooms, num_rows, at = 0, 0, 0
    for size, count in zip((-sizes).tolist(), counts.tolist(), strict=True):
        while count:
            if fitting := rooms >> size:
                room = size + (fitting & -fitting).bit_length() - 1
                row = with_room[room].pop()
                if not with_room[room]:
                    rooms ^= 1 << room
            else:
                room, row = capacity, num_rows
                num_rows += 1
            # Having taken one of this size it is the fullest that has room for the next, until it has none.
            taken = min(count, room // size)
            rows[order[at : at + taken]] = row
            at, count, left = at + taken, count - taken, room - taken * size
            with_room[left].append(row)
            rooms |= 1 << left
            rooms &= ~1  # a full row is none to look for
    return rows


class PackedRows:
    """The samples of the training part of one source: row i of a run is a pure function of (seed, name, i)."""

    def __init__(self, name: str, reader: IndexedReader, num_documents: int, sequence_length: int, seed: int):
        """Open the plan, made by whichever process comes first.

        Args:
            num_documents: of the training part, the first ones of the data set.

        Raises:
            ConfigError: no document to pack; another process has been making the plan for an hour.
        """
        self.name, self.seed = name, seed
        path = plan_path(reader, num_documents, sequence_length)
        if not path.is_file():
            with Lock(path, patience_seconds=_PATIENCE_SECONDS):
                if not path.is_file():
                    _make_plan(path, reader, num_documents, sequence_length)
        plan = _opened(path)
        self._starts, self._lengths, rows = plan[0], plan[1], plan[2]
        self.per_epoch = int(rows[-1]) + 1
        self._rows = rows

    def segments(self, index: int) -> list[tuple[int, int]]:
        """Where in the stream the pieces of a sample begin, and their lengths in tokens."""
        epoch, place = divmod(int(index), self.per_epoch)
        keys = round_keys(self.seed, self.name, epoch)
        row = int(feistel_permutation(np.array([place]), self.per_epoch, keys[:-1])[0])
        first, stop = np.searchsorted(self._rows, [row, row + 1])
        return [(int(self._starts[i]), int(self._lengths[i])) for i in range(first, stop)]


def _opened(path: Path) -> np.ndarray:
    try:
        plan = np.load(path, mmap_mode="r", allow_pickle=False)
        if plan.ndim != 2 or len(plan) != 3 or plan.shape[1] < 1 or plan.dtype != np.int64:
            raise ValueError(f"{plan.dtype} {list(plan.shape)}")
    except (ValueError, EOFError) as error:
        raise ConfigError(f"{path}: not a plan of rows ({error}).\n  Remove it: it is made again.") from None
    return plan


def plan_path(reader: IndexedReader, num_documents: int, sequence_length: int) -> Path:
    """Where the plan lies: beside the data set, named after what decides about it."""
    decides = f"{num_documents}/{reader.num_tokens}/{sequence_length}"
    return Path(f"{reader.prefix}.packed_{hashlib.sha256(decides.encode()).hexdigest()[:12]}.npy")


def _make_plan(path: Path, reader: IndexedReader, num_documents: int, sequence_length: int) -> None:
    """int64 [3, pieces]: begin and length of each piece, and its row, by rows and within them in the file's order."""
    starts, lengths = cut(np.diff(reader.document_starts(0, num_documents)), sequence_length)
    if not len(lengths):
        raise ConfigError(f"{reader.prefix}: no document to pack.\n  Give the source some text.")
    rows = best_fit(lengths, sequence_length)
    order = np.lexsort((starts, rows))
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as stream:
        np.save(stream, np.stack([starts[order], lengths[order], rows[order]]))
    partial.replace(path)
