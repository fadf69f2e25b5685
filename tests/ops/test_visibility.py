"""Tests of the blocks of two ranks against a mask over all pairs of tokens."""

import itertools
import random

import pytest
import torch

from igla_mega.ops.visibility import Block, visible_blocks
from igla_mega.ops.zigzag import zigzag_intervals

SIZES = [1, 2, 3, 4, 8]


def mask_of(offsets, length: int, causal: bool) -> torch.Tensor:
    """Return the mask [query, key] of pairs that see each other."""
    document = torch.full((length,), -1)
    for index, (start, stop) in enumerate(itertools.pairwise(offsets)):
        document[start:stop] = index
    mask = (document[:, None] == document) & (document >= 0)
    return mask.tril() if causal else mask


def counted(blocks: list[Block], num_queries: int, num_keys: int) -> torch.Tensor:
    """Return how often the blocks cover each pair."""
    times = torch.zeros(num_queries, num_keys, dtype=torch.int)
    for block in blocks:
        area = times[block.q_start : block.q_stop, block.k_start : block.k_stop]
        if block.causal:
            assert area.size(0) == area.size(1)
        area += torch.ones_like(area).tril() if block.causal else 1
        assert block.num_pairs == (area.numel() if not block.causal else area.size(0) * (area.size(0) + 1) // 2) > 0
    return times


def tokens(intervals) -> torch.Tensor:
    return torch.cat([torch.arange(*interval) for interval in intervals])


def check(length: int, size: int, offsets: tuple[int, ...], causal: bool) -> None:
    """Return all pairs of ranks, and each rank with the keys of all ranks."""
    mask = mask_of(offsets, length, causal)
    held = [zigzag_intervals(length, rank, size) for rank in range(size)]
    for queries, keys in itertools.product(held, [*held, ((0, length),)]):
        blocks = visible_blocks(queries, keys, offsets, causal=causal)
        wanted = mask[tokens(queries)][:, tokens(keys)]
        assert torch.equal(counted(blocks, *wanted.shape), wanted.int()), (queries, keys, offsets, causal, blocks)


def random_offsets(generator: random.Random, length: int) -> tuple[int, ...]:
    end = generator.randint(1, length)
    num_cuts = min(end - 1, generator.randint(0, 6))
    return (0, *sorted(generator.sample(range(1, end), num_cuts)), end)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("causal", [True, False])
def test_blocks_of_random_documents_cover_each_visible_pair_once_and_no_other(size, causal):
    generator = random.Random(size)
    for _ in range(60):
        length = 2 * size * generator.choice([1, 2, 3, 5])
        check(length, size, random_offsets(generator, length), causal)


@pytest.mark.parametrize(
    "offsets",
    [
        pytest.param(tuple(range(33)), id="each token a document"),
        pytest.param((0, 4, 8, 16, 24, 32), id="borders on chunk edges"),
        pytest.param((0, 3, 5, 31, 32), id="one that spans all ranks"),
        pytest.param((0, 15, 17, 20), id="padding behind the last"),
        pytest.param((0, 1), id="one token and padding"),
    ],
)
@pytest.mark.parametrize("causal", [True, False])
def test_blocks_of_chosen_documents_cover_each_visible_pair_once_and_no_other(offsets, causal):
    check(32, 4, offsets, causal)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("causal", [True, False])
def test_without_documents_two_ranks_meet_in_one_block(size, causal):
    length = 2 * size * 3
    held = [zigzag_intervals(length, rank, size) for rank in range(size)]
    for queries, keys in itertools.product(held, held):
        (block,) = visible_blocks(queries, keys, (0, length), causal=causal)
        own = queries == keys
        # A rank holds 6 tokens: every step of the ring but the one with itself is of the same size.
        assert block.num_pairs == ((21 if own else 18) if causal else 36) and block.causal == (causal and own)


def test_ranks_that_share_no_document_have_no_block():
    # Documents of a chunk each: a rank sees itself alone, in two blocks.
    offsets, held = (0, 4, 8, 12, 16, 20, 24, 28, 32), [zigzag_intervals(32, rank, 4) for rank in range(4)]
    found = [[len(visible_blocks(q, k, offsets, causal=True)) for k in held] for q in held]
    assert found == [[2, 0, 0, 0], [0, 2, 0, 0], [0, 0, 2, 0], [0, 0, 0, 2]]
