"""Which queries of one rank see which keys of another, as rectangles and triangles: pure integers.

Masks are never built. A document is an interval of the sequence, and what a rank holds is a few intervals in rising
order, so that the tokens of one document on one rank are neighbours there. Whatever two ranks' tokens see of each other
is therefore a few full rectangles, and on the diagonal one causal triangle per document; inside a block every query
sees a key.
"""

import itertools
from bisect import bisect_right
from functools import lru_cache
from typing import NamedTuple

from igla_mega.ops.zigzag import Interval


class Block(NamedTuple):
    """Queries [q_start, q_stop) and keys [k_start, k_stop), counted in what their ranks hold."""

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    causal: bool
    """Query i of the block sees its keys 0 to i (the block is square); else all of them."""

    @property
    def num_pairs(self) -> int:
        num_queries, num_keys = self.q_stop - self.q_start, self.k_stop - self.k_start
        return num_queries * (num_queries + 1) // 2 if self.causal else num_queries * num_keys


@lru_cache(maxsize=4096)
def visible_blocks(
    queries: tuple[Interval, ...], keys: tuple[Interval, ...], offsets: tuple[int, ...], *, causal: bool
) -> list[Block]:
    """Cut what `queries` see of `keys` into blocks that do not overlap.

    Args:
        queries, keys: what the two ranks hold, in rising order.
        offsets: where documents begin, and last where the last one ends (`cu_seqlens`); tokens see only their own
            document, and what lies behind the last offset is padding that sees and is seen by nothing.
        causal: a token sees no later one.
    """
    if queries == keys:
        # The order within a rank is the order in the sequence, so that one triangle covers both of its chunks.
        spans = [_local(keys, start, stop) for start, stop in _documents(offsets, keys[0][0], keys[-1][1])]
        return [Block(start, stop, start, stop, causal) for start, stop in spans if start < stop]
    triangles: list[Block] = []
    rectangles: list[Block] = []
    for query in queries:
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
    """The documents' parts within [start, stop)."""
    found = []
    for index in range(max(bisect_right(offsets, start) - 1, 0), len(offsets) - 1):
        if offsets[index] >= stop:
            break
        if (part := (max(start, offsets[index]), min(stop, offsets[index + 1])))[0] < part[1]:
            found.append(part)
    return found


def _shared(offsets: tuple[int, ...], early: Interval, late: Interval) -> list[tuple[Interval, Interval]]:
    """The parts in `late` and in `early` of the one document that can lie in both: it covers all between them."""
    index = bisect_right(offsets, late[0]) - 1
    if not 0 <= index < len(offsets) - 1 or offsets[index] >= early[1]:
        return []
    return [((late[0], min(late[1], offsets[index + 1])), (max(early[0], offsets[index]), early[1]))]


def _split_at(keys: tuple[Interval, ...], query: Interval) -> list[Interval]:
    """`keys`, cut where `query` begins and ends."""
    pieces = []
    for start, stop in keys:
        borders = [start, *(border for border in query if start < border < stop), stop]
        pieces += list(itertools.pairwise(borders))
    return pieces


def _local(held: tuple[Interval, ...], start: int, stop: int) -> Interval:
    """Where the tokens of [start, stop) that a rank holds lie in it."""
    first = last = 0
    for begin, end in held:
        first += min(max(start - begin, 0), end - begin)
        last += min(max(stop - begin, 0), end - begin)
    return first, last


def _joined(rectangles: list[Block]) -> list[Block]:
    """Neighbouring rectangles as one: fewer and larger calls."""
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
