"""Mix sources by weight: which source, and which of its samples, is global sample n.

A pure function of n in bounded memory. One period of the schedule is built, every prefix of it within one sample of
n * weight for every source; the periods repeat.
"""

import heapq
import math
from collections.abc import Mapping
from fractions import Fraction

import numpy as np

from igla_mega.config.errors import ConfigError

try:  # the same schedule, slot for slot, built from csrc/index_helpers.cpp
    from igla_mega._helpers import blend_schedule as built_blend_schedule  # type: ignore[import-not-found]
except ImportError:
    built_blend_schedule = None

MAX_PERIOD = 1_000_000


class Blend:
    """A schedule over named sources. Sources are numbered in the order of `weights`."""

    def __init__(self, weights: Mapping[str, float]):
        """
        Args:
            weights: not negative, at least one above zero; they need not add up to 1. Weight 0 is never drawn.

        Raises:
            ConfigError: no weight above zero, or one that is negative or not finite.
        """
        wrong = {name: weight for name, weight in weights.items() if not (math.isfinite(weight) and weight >= 0)}
        if wrong:
            raise ConfigError(*[f"data.mix.{name}: {w} is no weight.\n  Use 0 or more." for name, w in wrong.items()])
        if not any(weights.values()):
            sources = ", ".join(weights) or "no sources"
            raise ConfigError(f"data.mix: no weight above 0 ({sources}).\n  Give at least one source a weight.")
        self.names = list(weights)
        exact = [Fraction(str(weight)) for weight in weights.values()]
        total = sum(exact)
        shares = [weight / total for weight in exact]
        self.counts, self.note = period_counts(self.names, shares)
        self.period = int(self.counts.sum())
        self._schedule = (built_blend_schedule or blend_schedule)(self.counts)
        self._rank = np.empty(self.period, dtype=np.int32)
        by_source = np.argsort(self._schedule, kind="stable")
        first = np.repeat(np.cumsum(self.counts) - self.counts, self.counts)
        self._rank[by_source] = np.arange(self.period) - first

    def sources_of(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Source number and index within that source of the global samples [start, stop), each int64."""
        return self.lookup(np.arange(start, stop, dtype=np.int64))

    def lookup(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same for any global sample numbers (int64)."""
        periods, place = np.divmod(samples, self.period)
        sources = self._schedule[place].astype(np.int64)
        return sources, periods * self.counts[sources] + self._rank[place]

    def consumed(self, samples: int) -> dict[str, int]:
        """How many samples of each source the first `samples` global samples hold."""
        periods, rest = divmod(samples, self.period)
        drawn = periods * self.counts + np.bincount(self._schedule[:rest], minlength=len(self.counts))
        return dict(zip(self.names, drawn.tolist(), strict=True))


def period_counts(names: list[str], shares: list[Fraction]) -> tuple[np.ndarray, str | None]:
    """Samples of each source in one period, int64, and a sentence when the shares had to be rounded.

    Exact while their common denominator is at most MAX_PERIOD; beyond that largest remainders, at least one sample for
    every share above zero.
    """
    denominator = math.lcm(*(share.denominator for share in shares))
    if denominator <= MAX_PERIOD:
        return np.array([int(share * denominator) for share in shares], dtype=np.int64), None
    counts = [max(int(share * MAX_PERIOD), 1 if share > 0 else 0) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda s: counts[s] - shares[s] * MAX_PERIOD)
    missing = MAX_PERIOD - sum(counts)
    for s in by_remainder[: max(missing, 0)]:
        counts[s] += 1
    # Raising tiny shares to one sample can overfill the period: the largest source gives way.
    counts[max(range(len(counts)), key=counts.__getitem__)] += min(missing, 0)
    used = ", ".join(f"{name} {count}" for name, count in zip(names, counts, strict=True))
    return np.array(counts, dtype=np.int64), f"data.mix: rounded to parts of {MAX_PERIOD:,}: {used}."


def blend_schedule(counts: np.ndarray) -> np.ndarray:
    """Spread `counts[s]` turns of each source over `sum(counts)` slots.

    Turn k of a source with share w = counts[s] / D must fall into slots [floor(k / w), ceil((k + 1) / w)); then every
    prefix of n slots holds more than n*w - 1 and fewer than n*w + 1 of its turns. Earliest deadline first meets all
    these windows, because the fluid schedule does and the turns are of unit length (Tijdeman 1980, "The chairman
    assignment problem"; Baruah et al. 1996, "Proportionate progress"). Of equal deadlines the lower source goes first.

    Args:
        counts: int64, not negative, not all zero.

    Returns:
        Source number of each slot, int32 [D].
    """
    period, num_sources = int(counts.sum()), len(counts)
    releases, keys = [], []
    for source, count in enumerate(counts.tolist()):
        turns = np.arange(count, dtype=np.int64)
        releases.append(turns * period // max(count, 1))
        deadlines = -(-(turns + 1) * period // max(count, 1))
        keys.append(deadlines * num_sources + source)
    released = np.concatenate(releases)
    order = np.argsort(released, kind="stable")
    upcoming = iter(zip(released[order].tolist(), np.concatenate(keys)[order].tolist(), strict=True))

    schedule = [0] * period
    waiting: list[int] = []
    release, key = next(upcoming)
    for slot in range(period):
        while release <= slot:
            heapq.heappush(waiting, key)
            release, key = next(upcoming, (period, 0))
        schedule[slot] = heapq.heappop(waiting)
    return (np.array(schedule, dtype=np.int64) % num_sources).astype(np.int32)
