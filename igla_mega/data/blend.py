"""Mix sources by weight: map global sample n to a source and a sample of that source.

The map is a pure function of n in bounded memory. One period of the schedule is built and then repeated; in every
prefix of n samples, each source's count is within one sample of n * weight.
"""

import heapq
import json
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from igla_mega.config import json_text
from igla_mega.config.errors import ConfigError

try:  # the same schedule, slot for slot, built from csrc/index_helpers.cpp
    from igla_mega._helpers import blend_schedule as built_blend_schedule  # type: ignore[import-not-found]
except ImportError:
    built_blend_schedule = None

MAX_PERIOD = 1_000_000
"""Maximum number of samples in one period of the schedule."""
_PART = 1 << 14
"""Samples handled at a time, so that the temporary arrays fit in the CPU cache."""
TOLERANCE = 1e-6
"""Deviation of the sum of the weights from 1 that is not reported."""


class Blend:
    """Schedule over named sources, numbered in the order of `weights`."""

    def __init__(self, weights: Mapping[str, float], after: "tuple[Blend, int] | None" = None):
        """Build one period of the schedule.

        Args:
            weights: nonnegative, at least one above zero; they need not add up to 1. Weight 0 is never drawn.
            after: (blend, n): global samples before n belong to that blend, and each source continues where it stopped.

        Raises:
            ConfigError: no weight is above zero, or a weight is negative or not finite.
        """
        wrong = {name: weight for name, weight in weights.items() if not (math.isfinite(weight) and weight >= 0)}
        if wrong:
            raise ConfigError(
                *[f"data.mix.{name}: {w} is not a weight.\n  Use 0 or more." for name, w in wrong.items()]
            )
        if not any(weights.values()):
            sources = ", ".join(weights) or "no sources"
            raise ConfigError(f"data.mix: no weight above 0 ({sources}).\n  Give at least one source a weight.")
        self._before: Blend | None
        self._before, self._first = after or (None, 0)
        self.names: list[str]
        if self._before is not None:
            # Sources keep their numbers across a change: new ones are appended, removed ones get weight 0.
            weights = {**dict.fromkeys(self._before.names, 0), **weights}
        self.names = list(weights)
        # Exact fractions of the decimal text: 0.1 means 1/10, so that the period of 0.1 / 0.9 is 10, not 2^55.
        exact = [Fraction(str(weight)) for weight in weights.values()]
        total = sum(exact)
        shares = [weight / total for weight in exact]
        self.shares = {name: share for name, share in zip(self.names, shares, strict=True) if share}
        self.counts, self.note = period_counts(self.names, shares)
        self.period = int(self.counts.sum())
        self._schedule = (built_blend_schedule or blend_schedule)(self.counts)
        # _rank[slot]: number of earlier slots of the period that the same source has.
        self._rank = np.empty(self.period, dtype=np.int32)
        by_source = np.argsort(self._schedule, kind="stable")
        first = np.repeat(np.cumsum(self.counts) - self.counts, self.counts)
        self._rank[by_source] = np.arange(self.period) - first
        drawn = self._before.consumed(self._first) if self._before is not None else {}
        self._offsets = np.array([drawn.get(name, 0) for name in self.names], dtype=np.int64)

    def sources_of(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return source number and index within the source of the global samples [start, stop), int64 each."""
        return self.lookup(np.arange(start, stop, dtype=np.int64))

    def lookup(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return source number and index within the source of any global samples (int64), int64 each."""
        sources, indices = np.empty_like(samples), np.empty_like(samples)
        for at in range(0, len(samples), _PART):
            part = slice(at, at + _PART)
            counted = samples[part] - self._first if self._first else samples[part]
            periods = counted // self.period
            place = counted - periods * self.period
            sources[part] = self._schedule[place]
            indices[part] = periods * self.counts[sources[part]] + self._rank[place]
        if self._before is not None:
            indices += self._offsets[sources]
            if (earlier := samples < self._first).any():
                sources[earlier], indices[earlier] = self._before.lookup(samples[earlier])
        return sources, indices

    def consumed(self, samples: int) -> dict[str, int]:
        """Return the number of samples drawn from each source by the first `samples` global samples."""
        if self._before is not None and samples < self._first:
            return {**dict.fromkeys(self.names, 0), **self._before.consumed(samples)}
        periods, rest = divmod(samples - self._first, self.period)
        drawn = periods * self.counts + np.bincount(self._schedule[:rest], minlength=len(self.counts)) + self._offsets
        return dict(zip(self.names, drawn.tolist(), strict=True))


def changing_blend(mixes: Sequence[tuple[int, Mapping[str, float]]]) -> Blend:
    """Return one blend of several successive mixes.

    Args:
        mixes: (n, weights) in order; the weights apply from global sample n on, and the first n is 0.
    """
    blend = Blend(mixes[0][1])
    for first, weights in mixes[1:]:
        blend = Blend(weights, (blend, first))
    return blend


MIXES = "mix.json"
"""File of a run folder, and of each checkpoint: the mixes that the run has followed."""
Mixes = list[tuple[int, dict[str, float]]]
"""(n, weights) in order: the weights apply from global sample n on."""


def read_mixes(file: Path) -> Mixes:
    """Return the mixes in a file that `mixes_text` has written; none if it does not exist.

    Raises:
        ConfigError: the file is damaged.
    """
    try:
        entries = json_text.read(file) if file.exists() else []
        mixes = [(int(e["first_sample"]), dict(e["mix"])) for e in entries]
        if file.exists() and (not mixes or mixes[0][0] != 0 or mixes != sorted(mixes, key=lambda one: one[0])):
            raise ValueError("it does not begin at sample 0")
        if mixes:
            changing_blend(mixes)  # refuses what are no weights
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError) as error:
        raise ConfigError(f"{file}: not a list of mixes ({error}).\n  Restore it, or start another --run.") from None
    return mixes


def followed_mixes(recorded: Mixes, mix: Mapping[str, float], consumed_samples: int) -> Mixes:
    """Return the successive mixes of a run, with `mix` appended from `consumed_samples` on if it differs from the last.

    Entries after `consumed_samples`, left when a run resumes from an earlier checkpoint, are dropped.
    """
    mixes = [(first, weights) for first, weights in recorded if first == 0 or first < consumed_samples]
    if not mixes or consumed_samples == 0:
        return [(0, dict(mix))]
    if Blend(mixes[-1][1]).shares != Blend(mix).shares:
        mixes.append((consumed_samples, dict(mix)))
    return mixes


def mixes_text(mixes: Mixes) -> str:
    """Return the ledger of the changes: a JSON list of {first_sample, mix, consumed: {source: samples before}}."""
    entries = [
        {"first_sample": first, "mix": weights, "consumed": changing_blend(mixes[: number + 1]).consumed(first)}
        for number, (first, weights) in enumerate(mixes)
    ]
    return json.dumps(entries, indent=2) + "\n"


def normalised(mix: Mapping[str, float]) -> str | None:
    """Return a notice about weights that do not add up to 1 or are 0, or None."""
    total, notices = sum(mix.values()), []
    if mix and total > 0 and abs(total - 1) > TOLERANCE:
        shares = ", ".join(f"{name} {weight / total:.4g}" for name, weight in mix.items())
        notices.append(f"data.mix: the weights add up to {total:.4g}, not 1; normalized to {shares}")
    if zero := [name for name, weight in mix.items() if weight == 0]:
        notices.append(f"data.mix: {', '.join(zero)} with weight 0 is never drawn and not prepared")
    return "; ".join(notices) or None


def consumption(mix: Mapping[str, float], tokens: Mapping[str, int], total_tokens: int) -> list[str]:
    """Return a line per source with the tokens and epochs that a run of `total_tokens` reads from it.

    Args:
        tokens: number of tokens for training per source, without those held out.
    """
    total = sum(mix.values())
    lines = []
    for name, weight in mix.items():
        read = total_tokens * weight / total
        available = tokens.get(name, 0)
        epochs = f"{read / available:.2f} epochs" if available else "not prepared"
        lines.append(f"{name:16} {weight / total:8.2%} {read:18,.0f} of {available:16,} tokens, {epochs}")
    return lines


def period_counts(names: list[str], shares: list[Fraction]) -> tuple[np.ndarray, str | None]:
    """Return the samples of each source in one period, int64, and a notice if the shares had to be rounded.

    Exact if their common denominator is at most MAX_PERIOD. Otherwise rounded by largest remainder, with at least one
    sample for every share above zero.
    """
    denominator = math.lcm(*(share.denominator for share in shares))
    if denominator <= MAX_PERIOD:
        return np.array([int(share * denominator) for share in shares], dtype=np.int64), None
    counts = [max(int(share * MAX_PERIOD), 1 if share > 0 else 0) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda s: counts[s] - shares[s] * MAX_PERIOD)
    missing = MAX_PERIOD - sum(counts)
    for s in by_remainder[: max(missing, 0)]:
        counts[s] += 1
    # Raising tiny shares to one sample can overfill the period: the largest source is reduced.
    counts[max(range(len(counts)), key=counts.__getitem__)] += min(missing, 0)
    used = ", ".join(f"{name} {count}" for name, count in zip(names, counts, strict=True))
    return np.array(counts, dtype=np.int64), f"data.mix: rounded to parts of {MAX_PERIOD:,}: {used}."


def blend_schedule(counts: np.ndarray) -> np.ndarray:
    """Spread `counts[s]` turns of each source over D = `sum(counts)` slots.

    Turn k of a source with share w = counts[s] / D must fall into slots [floor(k / w), ceil((k + 1) / w)); then every
    prefix of n slots holds more than n*w - 1 and fewer than n*w + 1 of its turns. Earliest-deadline-first scheduling
    satisfies all these windows, because the fluid schedule does and the turns have unit length (Tijdeman 1980, "The
    chairman assignment problem"; Baruah et al. 1996, "Proportionate progress"). Ties go to the lower source number.

    Args:
        counts: turns per source, int64 [sources], nonnegative, not all zero.

    Returns:
        Source number of each slot, int32 [D].
    """
    period, num_sources = int(counts.sum()), len(counts)
    releases, keys = [], []
    for source, count in enumerate(counts.tolist()):
        turns = np.arange(count, dtype=np.int64)
        releases.append(turns * period // max(count, 1))
        deadlines = -(-(turns + 1) * period // max(count, 1))
        keys.append(deadlines * num_sources + source)  # one integer sorts by (deadline, source)
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
