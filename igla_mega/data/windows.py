"""Which tokens are sample i of a source: windows of sequence_length + 1 tokens, each once per epoch, shuffled."""

import hashlib
from dataclasses import dataclass

import numpy as np

from igla_mega.config.errors import ConfigError

_ROUNDS = 6
_PART = 1 << 17


@dataclass(frozen=True)
class Windows:
    """The samples of one split of one source: a pure function of (seed, name, index), nothing stored."""

    name: str
    first_token: int
    """Offset in the token stream where the split begins."""
    num_tokens: int
    """Tokens in the split."""
    sequence_length: int
    """Tokens that a model reads per sample; the window has one more, for the last label."""
    seed: int

    def __post_init__(self) -> None:
        if self.num_tokens < self.sequence_length + 1:
            raise ConfigError(
                f"data.sources.{self.name}: {self.num_tokens} training tokens are too few for one window of"
                f" {self.sequence_length} + 1.\n"
                "  Give the source more text, shorten training.sequence_length, or lower data.validation_fraction."
            )

    @property
    def per_epoch(self) -> int:
        """Windows in one pass over the split."""
        return (self.num_tokens - 1) // self.sequence_length

    def starts(self, indices: np.ndarray) -> np.ndarray:
        """Offset in the token stream of the window of each sample, int64 like `indices`.

        Within an epoch the windows lie end to end and come in a permuted order. Each epoch begins at an offset of its
        own, within what is left over at the end, so that the cuts move.
        """
        starts = np.empty_like(indices)
        # In parts that stay in the cache.
        for at in range(0, len(indices), _PART):
            starts[at : at + _PART] = self._starts(indices[at : at + _PART])
        return starts

    def _starts(self, indices: np.ndarray) -> np.ndarray:
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


def round_keys(seed: int, name: str, epoch: int) -> np.ndarray:
    """Keys of the permutation, and one more for the epoch's offset: uint64 [_ROUNDS + 1]."""
    digest = hashlib.blake2b(f"{seed}/{name}/{epoch}".encode(), digest_size=8 * (_ROUNDS + 1)).digest()
    return np.frombuffer(digest, dtype="<u8")


def feistel_permutation(places: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """A keyed permutation of 0 .. size - 1, evaluated at `places`, in O(1) memory.

    A balanced Feistel network permutes the next even power of two; a place that lands at or above `size` walks on along
    its cycle until it is back inside (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").

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
    while (outside := np.flatnonzero(values >= size)).size:
        values[outside] = encrypt(values[outside])
    return values.astype(np.int64)


def _mix(values: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
