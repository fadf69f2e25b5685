"""Pack whole documents into rows of one length by best-fit decreasing; longer documents are first cut into full rows.

Follows Ding et al. 2024 (arXiv:2404.10830): only documents longer than a row are cut, tokens attend to their own
document only, and the rest of a row is padding. The plan is computed once per dataset and stored next to it.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from igla_mega.config.errors import ConfigError
from igla_mega.config.files import no_follow, refuse_special
from igla_mega.data.indexed import IndexedReader
from igla_mega.data.journal import Lock
from igla_mega.data.windows import feistel_permutation, round_keys

_PATIENCE_SECONDS = 3600.0
"""Maximum time to wait for another process that computes the plan."""


@dataclass(frozen=True)
class Statistics:
    """Padding and truncation of a dataset in rows of one length."""

    rows: int
    """Number of rows in one pass over the dataset."""
    tokens: int
    """Number of tokens of all documents."""
    padding: float
    """Fraction of the positions that hold no token, 0 to 1."""
    cut_documents: int
    """Number of documents split over several rows."""
    truncated: int
    """Number of tokens after a cut, which do not see the beginning of their document."""
    long_share: float
    """Fraction of the tokens in documents longer than a row, 0 to 1."""


def statistics(lengths: np.ndarray, sequence_length: int, *, packed: bool) -> Statistics:
    """Return the statistics of documents of these lengths, concatenated and split or (`packed`) packed by best fit."""
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
    """Cut contiguous documents into pieces of at most one row.

    Returns:
        Offset in the stream and length of each piece, in tokens, int64 [pieces] each.
    """
    counts = -(-lengths // sequence_length)
    documents = np.repeat(np.arange(len(lengths)), counts)
    within = (np.arange(len(documents)) - np.repeat(np.cumsum(counts) - counts, counts)) * sequence_length
    starts = (np.cumsum(lengths) - lengths)[documents] + within
    return starts, np.minimum(lengths[documents] - within, sequence_length)


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Assign each piece, longest first, to the fullest row that has room for it.

    Args:
        lengths: length of each piece in tokens, in [1, capacity], int64 [n].
        capacity: tokens per row.

    Returns:
        Row number of each piece, int64 [n].
    """
    order = np.argsort(-lengths, kind="stable")
    sizes, counts = np.unique(-lengths, return_counts=True)
    rows = np.empty(len(lengths), dtype=np.int64)
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    # Bit r of the integer is set if some row has room for r more tokens. The fullest row that fits is then the lowest
    # set bit at or above the size: one shift and one mask instead of a search tree.
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
            # After taking one piece of this size the row remains the fullest that fits the next, until it has no room.
            taken = min(count, room // size)
            rows[order[at : at + taken]] = row
            at, count, left = at + taken, count - taken, room - taken * size
            with_room[left].append(row)
            rooms |= 1 << left
            rooms &= ~1  # a full row is never a candidate
    return rows


class PackedRows:
    """Samples of the training split of one source; row i of a run is a pure function of (seed, name, i)."""

    def __init__(self, name: str, reader: IndexedReader, num_documents: int, sequence_length: int, seed: int):
        """Open the plan; the first process to need it computes it while the others wait.

        Args:
            num_documents: number of documents in the training split, which begins at the first document.

        Raises:
            ConfigError: no document to pack, or the wait for another process exceeded an hour.
        """
        self.name, self.seed = name, seed
        path = plan_path(reader, num_documents, sequence_length)
        if not path.is_file():
            with Lock(path, patience_seconds=_PATIENCE_SECONDS):
                # Another process may have written the plan while this one waited for the lock.
                if not path.is_file():
                    _make_plan(path, reader, num_documents, sequence_length)
        plan = _opened(path)
        self._starts, self._lengths, rows = plan[0], plan[1], plan[2]
        self.per_epoch = int(rows[-1]) + 1
        self._rows = rows

    def segments(self, index: int) -> list[tuple[int, int]]:
        """Return (offset in the stream, length), in tokens, of each piece of a sample."""
        epoch, place = divmod(int(index), self.per_epoch)
        keys = round_keys(self.seed, self.name, epoch)
        row = int(feistel_permutation(np.array([place]), self.per_epoch, keys[:-1])[0])
        first, stop = np.searchsorted(self._rows, [row, row + 1])
        return [(int(self._starts[i]), int(self._lengths[i])) for i in range(first, stop)]


def _opened(path: Path) -> np.ndarray:
    """Return the memory-mapped plan, int64 [3, pieces]; raise ConfigError if the file is something else."""
    try:
        refuse_special(path)
        plan = np.load(path, mmap_mode="r", allow_pickle=False)
        if plan.ndim != 2 or len(plan) != 3 or plan.shape[1] < 1 or plan.dtype != np.int64:
            raise ValueError(f"{plan.dtype} {list(plan.shape)}")
    except (ValueError, EOFError) as error:
        raise ConfigError(f"{path}: not a packing plan ({error}).\n  Remove the file; it is computed again.") from None
    return plan


def plan_path(reader: IndexedReader, num_documents: int, sequence_length: int) -> Path:
    """Return the path of the plan, next to the dataset; a digest in its name identifies the inputs."""
    inputs = f"{num_documents}/{reader.num_tokens}/{sequence_length}"
    return Path(f"{reader.prefix}.packed_{hashlib.sha256(inputs.encode()).hexdigest()[:12]}.npy")


def _make_plan(path: Path, reader: IndexedReader, num_documents: int, sequence_length: int) -> None:
    """Write the plan, int64 [3, pieces]: offset, length and row of each piece, sorted by row, then by offset."""
    starts, lengths = cut(np.diff(reader.document_starts(0, num_documents)), sequence_length)
    if not len(lengths):
        raise ConfigError(f"{reader.prefix}: no document to pack.\n  Give the source some text.")
    rows = best_fit(lengths, sequence_length)
    order = np.lexsort((starts, rows))
    # Written under another name and renamed: a reader on another node never sees half a plan.
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb", opener=no_follow) as stream:
        np.save(stream, np.stack([starts[order], lengths[order], rows[order]]))
    partial.replace(path)
