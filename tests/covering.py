"""Pairwise covering: of a full cross of cases those few in which every pair of features is still tested."""

from collections.abc import Callable, Hashable
from itertools import combinations


def pairs(features: dict[str, Hashable]) -> set[frozenset]:
    """Return every pair of (name, value) of a case's features."""
    return {frozenset(pair) for pair in combinations(features.items(), 2)}


def covering(
    cases: list, features: Callable[..., dict[str, Hashable]], each: Callable[..., Hashable] = lambda case: None
) -> list:
    """Return a subset of `cases` in which every pair of features that any case has occurs.

    Greedy, so near the smallest subset and always the same one. Most faults need one feature or a pair of them
    (Kuhn, Wallace, Gallo: Software Fault Interactions and Implications for Software Testing, 2004).

    Args:
        features: of a case, by name; a name that only some cases have counts as None in the others.
        each: every value of it occurs in the subset too.
    """
    names = {name for case in cases for name in features(case)}
    items = [pairs(dict.fromkeys(sorted(names)) | features(case)) | {("each", each(case))} for case in cases]
    missing, chosen = set().union(*items), []
    while missing:
        best = max(range(len(cases)), key=lambda number: len(items[number] & missing))
        missing -= items[best]
        chosen.append(best)
    return [cases[number] for number in sorted(chosen)]
