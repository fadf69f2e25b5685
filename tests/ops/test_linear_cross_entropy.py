"""Tests of the projection and its loss in one pass, against torch's cross entropy over all logits in float64."""

import pytest
import ranks
import torch
import torch.distributed as dist
from torch.nn import functional as F

from igla_mega.ops import linear_cross_entropy as module
from igla_mega.ops.linear_cross_entropy import linear_cross_entropy

TOKENS, HIDDEN, VOCAB = 70, 24, 93


def inputs(vocab_rows: int = VOCAB):
    """Return hidden states, weight rows (beyond VOCAB: padding), labels, and a mask with zeros and fractions."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    weight = torch.randn(vocab_rows, HIDDEN, generator=generator) * 0.5
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    mask = torch.rand(TOKENS, generator=generator) * (torch.rand(TOKENS, generator=generator) < 0.7)
    return hidden, weight, labels, mask


def by_torch(hidden, weight, labels, mask, upstream=1.0):
    """Return loss and gradients in the type of the inputs, without padding rows in the softmax."""
    hidden, weight = (t.detach().clone().requires_grad_() for t in (hidden, weight))
    logits = hidden @ weight[:VOCAB].t()
    losses = F.cross_entropy(logits, labels.clamp(min=0), reduction="none")
    loss = torch.where(mask > 0, losses * mask.to(losses.dtype), 0.0).sum()
    (loss * upstream).backward()
    return loss.detach().double(), hidden.grad.double(), weight.grad.double()


def in_one_pass(hidden, weight, labels, mask, upstream=1.0, **where):
    hidden, weight = (t.detach().clone().requires_grad_() for t in (hidden, weight))
    loss = linear_cross_entropy(hidden, weight, labels, mask, vocab_size=VOCAB, **where)
    (loss * upstream).backward()
    assert loss.dtype == torch.float32 and weight.grad.dtype == weight.dtype
    return loss.detach().double(), hidden.grad.double(), weight.grad.double()


def wide(values):
    hidden, weight, labels, mask = values
    return hidden.double(), weight.double(), labels, mask.double()


@pytest.fixture(params=[1, 7, 35, 69, 70, 71, 256], ids="{} tokens a chunk".format)
def chunk_tokens(request, monkeypatch):
    monkeypatch.setitem(module.CHUNK_TOKENS, "cpu", request.param)


@pytest.mark.parametrize("vocab_rows", [VOCAB, VOCAB + 3], ids=["exact", "padded"])
@pytest.mark.parametrize("upstream", [1.0, 0.125])
def test_loss_and_gradients_are_those_of_float64_torch(vocab_rows, upstream, chunk_tokens):
    values = inputs(vocab_rows)
    expected = by_torch(*wide(values), upstream)
    # Sums of 70 losses of a few nats: 200 nats at fp32's 6e-8, times the roundings of some chunks.
    for ours, exact, tolerance in zip(in_one_pass(*values, upstream), expected, (2e-4, 5e-6, 5e-6), strict=True):
        torch.testing.assert_close(ours, exact, rtol=0, atol=tolerance)


@pytest.mark.parametrize("chunk", [16, 256])
def test_error_in_bf16_is_at_most_twice_torchs_own(chunk, monkeypatch):
    monkeypatch.setitem(module.CHUNK_TOKENS, "cpu", chunk)
    hidden, weight, labels, mask = inputs(VOCAB + 3)
    narrow = (hidden.bfloat16(), weight.bfloat16(), labels, mask)
    exact = by_torch(*wide(narrow))
    for ours, theirs, true in zip(in_one_pass(*narrow), by_torch(*narrow), exact, strict=True):
        assert (ours - true).abs().max() <= 2 * (theirs - true).abs().max()


def test_padding_rows_change_nothing_even_if_not_finite():
    hidden, weight, labels, mask = inputs(VOCAB + 3)
    first = in_one_pass(hidden, weight, labels, mask)
    weight[VOCAB:] = 1e4
    second = in_one_pass(hidden, weight, labels, mask)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert (second[2][VOCAB:] == 0).all()


@pytest.mark.parametrize("label", [-100, 10**6])
def test_a_masked_label_that_is_no_id_changes_nothing(label):
    hidden, weight, labels, mask = inputs()
    expected = in_one_pass(hidden, weight, labels, mask)
    labels = labels.masked_fill(mask == 0, label)
    found = in_one_pass(hidden, weight, labels, mask)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert (found[1][mask == 0] == 0).all()


def test_with_nothing_to_learn_loss_and_gradients_are_zero():
    hidden, weight, labels, mask = inputs()
    assert all((t == 0).all() for t in in_one_pass(hidden, weight, labels, torch.zeros_like(mask)))


def test_without_gradients_the_loss_is_the_same_bit_for_bit():
    hidden, weight, labels, mask = inputs()
    expected = in_one_pass(hidden, weight, labels, mask)[0]
    assert linear_cross_entropy(hidden, weight, labels, mask, vocab_size=VOCAB).double() == expected
    with torch.no_grad():
        loss = linear_cross_entropy(hidden.requires_grad_(), weight, labels, mask, vocab_size=VOCAB)
    assert loss.double() == expected and not loss.requires_grad


def test_a_sum_that_is_given_gets_the_weights_gradient_and_a_pass_without_gradients_leaves_it_alone():
    hidden, weight, labels, mask = inputs()
    _, grad_hidden, grad_weight = in_one_pass(hidden, weight, labels, mask)
    weight, into = weight.requires_grad_(), torch.ones(VOCAB, HIDDEN)
    with torch.no_grad():
        linear_cross_entropy(hidden, weight, labels, mask, vocab_size=VOCAB, into=into)
    assert (into == 1).all()
    linear_cross_entropy(hidden.requires_grad_(), weight, labels, mask, vocab_size=VOCAB, into=into).backward()
    torch.testing.assert_close(into.double() - 1, grad_weight, rtol=0, atol=5e-6)
    assert weight.grad is None and torch.equal(hidden.grad.double(), grad_hidden)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_the_other_input_may_be_frozen(frozen):
    hidden, weight, labels, mask = inputs()
    _, grad_hidden, grad_weight = in_one_pass(hidden, weight, labels, mask)
    learned, expected = (weight, grad_weight) if frozen == "hidden" else (hidden, grad_hidden)
    learned.requires_grad_()
    linear_cross_entropy(hidden, weight, labels, mask, vocab_size=VOCAB).backward()
    assert torch.equal(learned.grad.double(), expected)
    assert (hidden if frozen == "hidden" else weight).grad is None


def of_this_rank(vocab_rows: int):
    """Run on this rank's part of the vocabulary, and sum the gradient of the hidden states as the model does."""
    hidden, weight, labels, mask = inputs(vocab_rows)
    own = weight.chunk(dist.get_world_size())[dist.get_rank()]
    loss, grad_hidden, grad_weight = in_one_pass(hidden, own, labels, mask, 0.5, group=dist.group.WORLD)
    dist.all_reduce(grad_hidden)
    return [t.numpy() for t in (loss, grad_hidden, grad_weight)]


# 96 = 93 + 3 rows: the last rank holds padding; 124: on 4 ranks the last holds nothing else.
@pytest.mark.parametrize(("num_ranks", "vocab_rows"), [(2, 96), (4, 96), (4, 124)])
def test_a_vocabulary_split_over_ranks_gives_what_one_process_gives(num_ranks, vocab_rows):
    expected = by_torch(*wide(inputs(vocab_rows)), 0.5)
    parts = [[torch.from_numpy(t) for t in part] for part in ranks.run(num_ranks, of_this_rank, vocab_rows)]
    for loss, grad_hidden, _ in parts:
        torch.testing.assert_close(loss, expected[0], rtol=0, atol=2e-4)
        torch.testing.assert_close(grad_hidden, expected[1], rtol=0, atol=5e-6)
    torch.testing.assert_close(torch.cat([part[2] for part in parts]), expected[2], rtol=0, atol=5e-6)
