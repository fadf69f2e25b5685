"""Tests of the zig-zag split: every token once, equal shares of causal work, and the inverse."""

import re

import pytest
import ranks
import torch
import torch.distributed as dist

from igla_mega.ops.zigzag import (
    pad_sequence,
    zigzag_intervals,
    zigzag_join,
    zigzag_positions,
    zigzag_shard,
    zigzag_split,
    zigzag_unshard,
)

SIZES = [1, 2, 3, 4, 8]


def held(length: int, rank: int, size: int) -> list[int]:
    return [token for start, stop in zigzag_intervals(length, rank, size) for token in range(start, stop)]


@pytest.mark.parametrize("size", SIZES)
def test_every_token_is_on_one_rank_and_in_increasing_order_there(size):
    length = 2 * size * 5
    parts = [held(length, rank, size) for rank in range(size)]
    assert sorted(token for part in parts for token in part) == list(range(length))
    assert all(part == sorted(part) and len(part) == length // size for part in parts)


@pytest.mark.parametrize("size", SIZES)
def test_every_rank_has_the_same_number_of_causal_pairs(size):
    length = 2 * size * 5
    assert len({sum(token + 1 for token in held(length, rank, size)) for rank in range(size)}) == 1


def test_four_ranks_hold_an_early_and_a_late_chunk():
    assert [zigzag_intervals(16, rank, 4) for rank in range(4)] == [
        ((0, 2), (14, 16)),
        ((2, 4), (12, 14)),
        ((4, 6), (10, 12)),
        ((6, 8), (8, 10)),
    ]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_joining_undoes_splitting(size, dim):
    x = (
        torch.arange(2 * size * 3).expand(48, -1).contiguous()
        if dim
        else torch.arange(96 * size).view(2 * size * 3, -1)
    )
    parts = zigzag_split(x, size, dim)
    assert len(parts) == size and torch.equal(zigzag_join(parts, dim), x)


def test_splitting_gives_what_the_intervals_say():
    x = torch.arange(24)
    assert [part.tolist() for part in zigzag_split(x, 4, 0)] == [held(24, rank, 4) for rank in range(4)]


@pytest.mark.parametrize(
    ("length", "size", "nearest"), [(30, 4, "24 or 32"), (5, 4, "8"), (33, 8, "32 or 48"), (7, 3, "6 or 12")]
)
def test_a_length_that_does_not_split_is_refused_with_both_numbers_and_the_nearest_lengths(length, size, nearest):
    with pytest.raises(ValueError, match=re.escape(f"Use {nearest}, or pad.")) as raised:
        zigzag_intervals(length, 0, size)
    assert f"{length} tokens" in str(raised.value) and f"{size} context-parallel ranks" in str(raised.value)


@pytest.mark.parametrize(("length", "size", "padded"), [(30, 4, 32), (32, 4, 32), (1, 8, 16), (13, 1, 13), (7, 3, 12)])
@pytest.mark.parametrize("dim", [0, 1, -1, -2])
def test_padding_fills_the_end_up_to_twice_the_ranks(length, size, padded, dim):
    x = torch.ones(2, length, 3).movedim(1, 0) if dim == 0 else torch.ones(2, length, 3)
    x = x.movedim(1, -1) if dim == -1 else x
    filled = pad_sequence(x, size, dim, fill=-100)
    assert filled.size(dim) == padded
    assert torch.equal(filled.narrow(dim, 0, length), x)
    assert (filled.narrow(dim, length, padded - length) == -100).all()


def test_one_rank_holds_all_and_copies_nothing():
    x = torch.arange(7)
    assert zigzag_shard(x, None, 0, pad=True) is x and zigzag_unshard(x, None, 0) is x
    assert torch.equal(zigzag_positions(7, None), x)


def there_and_back(length: int):
    """Return a rank's part, its positions, the gradient of the part's sum, the whole, and the error of a bad split."""
    group = dist.group.WORLD
    x = torch.arange(2.0 * length).view(2, length).requires_grad_()
    part = zigzag_shard(x, group, 1, pad=True, fill=-1)
    part.sum().backward()
    try:
        refusal = zigzag_shard(x, group, 1) is None
    except ValueError as error:
        refusal = str(error)
    whole = zigzag_unshard(part.detach().t(), group, 0).t()
    padded = whole.size(1)
    return part.tolist(), zigzag_positions(padded, group).tolist(), x.grad.tolist(), whole.tolist(), refusal


@pytest.mark.parametrize(("size", "length"), [(2, 7), (3, 12)])
def test_ranks_shard_and_join_what_all_hold(size, length):
    padded = -(-length // (2 * size)) * 2 * size
    rows = pad_sequence(torch.arange(2.0 * length).view(2, length), size, 1, -1)
    grads = torch.zeros(2, length)
    for rank, (part, positions, grad, whole, refusal) in enumerate(ranks.run(size, there_and_back, length)):
        assert positions == held(padded, rank, size)
        assert part == rows[:, positions].tolist() and whole == rows.tolist()
        assert f"a sequence of {length} tokens" in refusal if padded > length else refusal is False
        grads += torch.tensor(grad)
    assert (grads == 1).all(), "each token has its gradient on one rank"
