"""Compute which queries of one rank see which keys of another, as rectangles and triangles of indices.

Masks are never built. A document is an interval of the sequence, and a rank holds a few intervals in increasing order,
so the tokens of one document are contiguous on each rank. What the tokens of two ranks see of each other is therefore a
few full rectangles and, on the diagonal, one causal triangle per document. Inside a block every query sees a key.
"""

import itertools
from bisect import bisect_right
from functools import lru_cache
from typing import NamedTuple

from igla_mega.ops.zigzag import Interval


class Block(NamedTuple):
    """Queries [q_start, q_stop) and keys [k_start, k_stop), as indices into the tokens that their ranks store."""

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    causal: bool
    """True if query i of the block sees its keys 0 to i (the block is square), False if it sees all keys."""

    @property
    def num_pairs(self) -> int:
        """Number of visible (query, key) pairs, proportional to the work of the block."""
        num_queries, num_keys = self.q_stop - self.q_start, self.k_stop - self.k_start
        return num_queries * (num_queries + 1) // 2 if self.causal else num_queries * num_keys


@lru_cache(maxsize=4096)
def visible_blocks(
    queries: tuple[Interval, ...], keys: tuple[Interval, ...], offsets: tuple[int, ...], *, causal: bool
) -> list[Block]:
    """Return the (query, key) pairs that see each other, as blocks that do not overlap.

    Args:
        queries, keys: token intervals of the two ranks, in increasing order.
        offsets: first token of each document, then the end of the last one (`cu_seqlens`). Tokens see only their own
            document; tokens after the last offset are padding that neither sees nor is seen.
        causal: True if a token sees no later token.
    """
    if queries == keys:
        # A rank stores its tokens in the order of the sequence, so one triangle per document covers both of its chunks.
        spans = [_local(keys, start, stop) for start, stop in _documents(offsets, keys[0][0], keys[-1][1])]
        return [Block(start, stop, start, stop, causal) for start, stop in spans if start < stop]
    triangles: list[Block] = []
    rectangles: list[Block] = []
    for query in queries:
        # Cut at the borders of `query`, each key interval is equal to it, wholly before it, or wholly after it.
        for key in _split_at(keys, query):
            if key == query:
                pairs = [(span, span) for span in _documents(offsets, *query)]
            elif key[0] >= query[1]:
                pairs = [] if causal else [(early, late) for late, early in _shared(offsets, query, key)]
            else:
                pairs = _shared(offsets, key, query)
            square = causal and key == query
            for seeing, seen in pairs:
                block = Block(*_local(queries, *seeing), *_local(keys, *seen), square)
                (triangles if square else rectangles).append(block)
    return triangles + _joined(rectangles)


def _documents(offsets: tuple[int, ...], start: int, stop: int) -> list[Interval]:
    """Return the part of each document within [start, stop), without empty parts."""
    found = []
    for index in range(max(bisect_right(offsets, start) - 1, 0), len(offsets) - 1):
        if offsets[index] >= stop:
            break
        if (part := (max(start, offsets[index]), min(stop, offsets[index + 1])))[0] < part[1]:
            found.append(part)
    return found


def _shared(offsets: tuple[int, ...], early: Interval, late: Interval) -> list[tuple[Interval, Interval]]:
    """Return the parts in `late` and `early` of the only document that can reach into both, or an empty list.

    Such a document covers every token between the two intervals, so it contains the first token of `late` and the last
    of `early`.
    """
    index = bisect_right(offsets, late[0]) - 1
    if not 0 <= index < len(offsets) - 1 or offsets[index] >= early[1]:
        return []
    return [((late[0], min(late[1], offsets[index + 1])), (max(early[0], offsets[index]), early[1]))]


def _split_at(keys: tuple[Interval, ...], query: Interval) -> list[Interval]:
    """Return the intervals of `keys`, cut at the start and stop of `query`."""
    pieces = []
    for start, stop in keys:
        borders = [start, *(border for border in query if start < border < stop), stop]
        pieces += list(itertools.pairwise(borders))
    return pieces


def _local(held: tuple[Interval, ...], start: int, stop: int) -> Interval:
    """Return the range of local indices of the tokens [start, stop) on a rank that stores the intervals `held`."""
    first = last = 0
    for begin, end in held:
        # Number of stored tokens of this interval that come before `start` and before `stop`.
        first += min(max(start - begin, 0), end - begin)
        last += min(max(stop - begin, 0), end - begin)
    return first, last


def _joined(rectangles: list[Block]) -> list[Block]:
    """Merge rectangles that share a whole edge, for fewer and larger kernel calls."""
    joined: list[Block] = []
    for block in rectangles:
        for index, other in enumerate(joined):
            if block[:2] == other[:2] and block.k_start == other.k_stop:
                joined[index] = other._replace(k_stop=block.k_stop)
                break
            if block[2:4] == other[2:4] and block.q_start == other.q_stop:
                joined[index] = other._replace(q_stop=block.q_stop)
                break
        else:
            joined.append(block)
    return joined if len(joined) == len(rectangles) else _joined(joined)
