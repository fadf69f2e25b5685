"""Tests that labels are drawn from the softmax, and are the same for every split of the columns."""

import pytest
import ranks
import torch
import torch.distributed as dist

from igla_mega.ops.categorical import draw_labels, token_keys, uniform_int16
from igla_mega.ops.linear_cross_entropy import linear_cross_entropy


def logits(rows: int, columns: int) -> torch.Tensor:
    return 3 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def test_labels_are_drawn_with_the_frequencies_of_the_softmax():
    p = torch.tensor([0.5, 0.2, 0.1, 0.1, 0.05, 0.049, 0.001])
    for keys in (
        token_keys(1, 3, torch.arange(200_000)),
        torch.cat([token_keys(1, sample, torch.arange(100)) for sample in range(2000)]),
    ):
        labels = draw_labels(p.log().expand(len(keys), -1), keys, 0, len(p))
        error = (torch.bincount(labels, minlength=len(p)) / len(keys) - p) / (p * (1 - p) / len(keys)).sqrt()
        assert error.abs().max() < 4
        alike = (labels[1:] == labels[:-1]).float().mean()  # neighbours are independent
        assert abs(alike - p.square().sum()) < 4 * (p.square().sum() / len(keys)).sqrt()


def test_seed_sample_and_position_each_change_the_labels():
    values, positions = logits(500, 40), torch.arange(500)

    def drawn(seed: int, sample: int, first: int) -> torch.Tensor:
        return draw_labels(values, token_keys(seed, sample, positions + first), 0, 40)

    reference = drawn(0, 0, 0)
    assert torch.equal(reference, drawn(0, 0, 0))
    # Two independent draws from rows this peaked agree about half of the time.
    assert all(
        (reference == other).float().mean() < 0.8 for other in (drawn(1, 0, 0), drawn(0, 1, 0), drawn(0, 0, 500))
    )


def test_a_token_draws_the_same_alone_and_among_others():
    values, keys = logits(64, 40), token_keys(0, 0, torch.arange(64))
    together = draw_labels(values, keys, 0, 40)
    assert torch.equal(together[10:20], draw_labels(values[10:20], keys[10:20], 0, 40))


def test_padding_is_never_drawn():
    values = logits(300, 40)
    values[:, 35:] = 50.0
    assert draw_labels(values, token_keys(0, 0, torch.arange(300)), 0, 35).max() < 35


@pytest.mark.parametrize("width", [4, 96, 97])
def test_masks_of_tokens_are_uniform_and_depend_on_the_token_alone(width):
    keys = token_keys(1, 3, torch.arange(4000))
    drawn = uniform_int16(keys, width)
    assert drawn.shape == (4000, width) and drawn.dtype == torch.int16
    order = torch.randperm(4000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(uniform_int16(keys[order], width), drawn[order]) and uniform_int16(keys[:0], width).numel() == 0
    dropped = (drawn < -(2**15) + 6554).float()  # a tenth
    deviation = (0.1 * 0.9 / dropped.numel()) ** 0.5
    assert abs(dropped.mean() - 0.1) < 4 * deviation
    both = (dropped[:, 1:] * dropped[:, :-1]).mean()
    assert abs(both - 0.01) < 5 * deviation, "neighbours are independent"


def in_columns(num_columns: int, limit: int) -> list[int]:
    rank, size = dist.get_rank(), dist.get_world_size()
    width = num_columns // size
    own = logits(300, num_columns)[:, rank * width : (rank + 1) * width].contiguous()
    return draw_labels(own, token_keys(0, 0, torch.arange(300)), rank * width, limit, dist.group.WORLD).tolist()


@pytest.mark.parametrize("limit", [40, 29, 19])  # the last rank, and the last two, hold padding alone
def test_ranks_that_share_the_vocabulary_draw_as_one_does(limit):
    alone = draw_labels(logits(300, 40), token_keys(0, 0, torch.arange(300)), 0, limit)
    for labels in ranks.run(4, in_columns, 40, limit):
        assert labels == alone.tolist()


def test_the_loss_of_drawn_labels_is_that_of_these_labels():
    hidden, weight = torch.randn(600, 16), torch.randn(50, 16)
    keys, mask = token_keys(0, 0, torch.arange(600)), torch.ones(600)
    labels = draw_labels(hidden @ weight.t(), keys, 0, 50)
    results = []
    for given, draw in ((keys, True), (labels, False)):
        inputs = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = linear_cross_entropy(*inputs, given, mask, vocab_size=50, draw=draw)
        results.append([loss, *torch.autograd.grad(loss, inputs)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
