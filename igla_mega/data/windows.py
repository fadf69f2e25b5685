"""Map sample i of a source to a window of sequence_length + 1 tokens; each window occurs once per epoch, shuffled."""

import hashlib
from dataclasses import dataclass

import numpy as np

from igla_mega.config.errors import ConfigError
from igla_mega.data.indexed import IndexedReader

_ROUNDS = 6
"""Rounds of the Feistel network."""
_PART = 1 << 17
"""Samples handled at a time, so that the temporary arrays fit in the CPU cache."""


@dataclass(frozen=True)
class Windows:
    """Samples of one split of one source, computed from (seed, name, index); nothing is stored."""

    name: str
    first_token: int
    """Offset of the split in the token stream, in tokens."""
    num_tokens: int
    """Number of tokens in the split."""
    sequence_length: int
    """Number of input tokens per sample; a window has one more, for the last label."""
    seed: int

    def __post_init__(self) -> None:
        """Raise ConfigError if the split is shorter than one window."""
        if self.num_tokens < self.sequence_length + 1:
            raise ConfigError(
                f"data.sources.{self.name}: {self.num_tokens} training tokens are fewer than one window of"
                f" {self.sequence_length} + 1.\n"
                "  Give the source more text, shorten training.sequence_length, or lower data.validation_fraction."
            )

    @property
    def per_epoch(self) -> int:
        """Number of windows in one pass over the split."""
        return (self.num_tokens - 1) // self.sequence_length

    def starts(self, indices: np.ndarray) -> np.ndarray:
        """Return the offset in the token stream of each sample's window, int64 [n] like `indices`.

        Within an epoch the windows are contiguous and visited in a permuted order. Each epoch shifts all windows by a
        random part of the remainder at the end of the split, so that the cuts differ between epochs.
        """
        starts = np.empty_like(indices)
        for at in range(0, len(indices), _PART):
            starts[at : at + _PART] = self._starts(indices[at : at + _PART])
        return starts

    def _starts(self, indices: np.ndarray) -> np.ndarray:
        """Return the window offsets of one part of the samples."""
        epochs = indices // self.per_epoch
        places = indices - epochs * self.per_epoch
        spare = self.num_tokens - 1 - self.per_epoch * self.sequence_length
        starts = np.empty_like(places)
        for epoch in np.unique(epochs):
            keys = round_keys(self.seed, self.name, int(epoch))
            shift = int(keys[-1] % np.uint64(spare + 1))
            here = epochs == epoch
            windows = feistel_permutation(places[here], self.per_epoch, keys[:-1])
            starts[here] = self.first_token + shift + windows * self.sequence_length
        return starts


def split_point(name: str, reader: IndexedReader, validation_fraction: float) -> int:
    """Return the offset in the stream at which validation begins: with the last `validation_fraction` of the documents.

    Raises:
        ConfigError: no document would be left for training.
    """
    if validation_fraction == 0:
        return reader.num_tokens
    held_out = max(1, round(reader.num_documents * validation_fraction))
    if held_out >= reader.num_documents:
        raise ConfigError(
            f"data.validation_fraction: {validation_fraction} holds out {held_out} of the {reader.num_documents}"
            f" documents of {name}, which leaves none for training.\n"
            "  Give the source more documents, or set data.validation_fraction to 0."
        )
    return reader.document_start(reader.num_documents - held_out)


def round_keys(seed: int, name: str, epoch: int) -> np.ndarray:
    """Return the keys of an epoch's permutation and one more for its offset: uint64 [_ROUNDS + 1]."""
    digest = hashlib.blake2b(f"{seed}/{name}/{epoch}".encode(), digest_size=8 * (_ROUNDS + 1)).digest()
    return np.frombuffer(digest, dtype="<u8")


def feistel_permutation(places: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Evaluate a keyed permutation of 0 .. size - 1 at `places`, in O(1) memory.

    A balanced Feistel network permutes a power of four >= size. A value at or above `size` is encrypted again until it
    falls below (cycle walking; Black and Rogaway 2002, "Ciphers with arbitrary finite domains").

    Args:
        places: int64, each in [0, size).
        keys: uint64, one per round.
    """
    half = np.uint64(max(2, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)

    def encrypt(values: np.ndarray) -> np.ndarray:
        left, right = values >> half, values & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        return (left << half) | right

    values = encrypt(places.astype(np.uint64))
    # The domain is at most about 4 * size (16 for the smallest sizes): a few iterations on average.
    while (outside := np.flatnonzero(values >= size)).size:
        values[outside] = encrypt(values[outside])
    return values.astype(np.int64)


def _mix(values: np.ndarray) -> np.ndarray:
    """Apply the finalizer of splitmix64, in which every input bit affects every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
