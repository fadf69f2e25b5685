import pytest
import torch
from torch.nn import functional as F

from igla_mega.model.output import SummedLoss, TokenLogProbs

VOCAB, HIDDEN = 11, 8


def inputs(seed: int = 1):
    """Hidden states [S, B, H], weight [V, H], labels and mask [B, S] with half of the tokens no target."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(6, 2, HIDDEN, generator=generator, requires_grad=True)
    weight = torch.randn(VOCAB + 1, HIDDEN, generator=generator, requires_grad=True)
    labels = torch.randint(0, VOCAB, (2, 6), generator=generator)
    mask = (torch.rand(2, 6, generator=generator) < 0.5).float()
    return hidden, weight, labels, mask


def by_hand(hidden, weight, labels):
    """Nats of each label, [S, B], by torch over the true vocabulary."""
    logits = (hidden @ weight[:VOCAB].t()).flatten(0, 1)
    return F.cross_entropy(logits, labels.t().flatten(), reduction="none").view(hidden.shape[:2])


@pytest.mark.parametrize("output", [SummedLoss(), SummedLoss(chunk=5), SummedLoss(sparse_loss_mask=True)])
def test_the_summed_loss_and_its_gradients_are_torch_s(output):
    hidden, weight, labels, mask = inputs()
    loss = output(hidden, weight, labels, mask, group=None, vocab_size=VOCAB)
    found = torch.autograd.grad(loss, (hidden, weight))
    wanted_loss = (by_hand(hidden, weight, labels) * mask.t()).sum()
    wanted = torch.autograd.grad(wanted_loss, (hidden, weight))
    assert float(loss) == pytest.approx(float(wanted_loss), rel=1e-6)
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_the_gradient_goes_into_the_running_sum_where_asked():
    hidden, weight, labels, mask = inputs()
    weight.main_grad = torch.zeros_like(weight)
    direct = SummedLoss()(hidden, weight, labels, mask, group=None, vocab_size=VOCAB)
    direct.backward()
    plain = SummedLoss(into_main_grad=False)(hidden, weight, labels, mask, group=None, vocab_size=VOCAB)
    (wanted,) = torch.autograd.grad(plain, weight)
    assert torch.allclose(weight.main_grad, wanted, atol=1e-5)


def test_log_probabilities_are_those_of_torch_and_zero_where_there_is_no_target():
    hidden, weight, labels, mask = inputs()
    found = TokenLogProbs()(hidden, weight, labels, mask, group=None, vocab_size=VOCAB)
    assert found.shape == (6, 2)
    assert torch.allclose(found, -by_hand(hidden, weight, labels) * mask.t(), atol=1e-5)
