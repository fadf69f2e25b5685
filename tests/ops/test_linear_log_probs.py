import pytest
import ranks
import torch
import torch.distributed as dist

from igla_mega.ops import linear_cross_entropy as whole
from igla_mega.ops.linear_log_probs import linear_log_probs

TOKENS, HIDDEN, VOCAB = 700, 32, 250


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype)
    weight = torch.randn(VOCAB + 6, HIDDEN, generator=generator).to(dtype)
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    mask = (torch.rand(TOKENS, generator=generator) < 0.4).float()
    upstream = torch.randn(TOKENS, generator=generator)
    return hidden, weight, labels, mask, upstream


def expected(hidden, weight, labels, mask, upstream):
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = hidden @ weight[:VOCAB].t()
    log_probs = logits.log_softmax(-1).gather(1, labels[:, None]).squeeze(1) * mask
    (log_probs * upstream).sum().backward()
    return log_probs.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)], ids=str)
@pytest.mark.parametrize("frozen", [False, True], ids=["trained projection", "frozen projection"])
def test_values_and_gradients_equal_those_of_log_softmax(dtype, tolerance, frozen):
    hidden, weight, labels, mask, upstream = inputs(dtype)
    reference = expected(hidden, weight, labels, mask, upstream)
    hidden.requires_grad_()
    weight.requires_grad_(not frozen)
    found = linear_log_probs(hidden, weight, labels, mask, vocab_size=VOCAB)
    (found * upstream).sum().backward()
    pairs = [(found, reference[0]), (hidden.grad, reference[1])] + ([] if frozen else [(weight.grad, reference[2])])
    for ours, theirs in pairs:
        assert (ours.double() - theirs).abs().max() < tolerance * max(1.0, theirs.abs().max())
    assert frozen == (weight.grad is None)


def split():
    group = dist.group.WORLD
    hidden, weight, labels, mask, upstream = inputs()
    own = weight.chunk(group.size())[group.rank()].clone().requires_grad_()
    hidden.requires_grad_()
    found = linear_log_probs(hidden, own, labels, mask, vocab_size=VOCAB, group=group)
    (found * upstream).sum().backward()
    dist.all_reduce(hidden.grad)
    return found.detach().numpy(), hidden.grad.numpy(), own.grad.numpy()


def test_a_split_vocabulary_gives_the_same():
    reference = [part.numpy() for part in expected(*inputs())]
    results = ranks.run(2, split)
    for rank, (found, grad_hidden, grad_weight) in enumerate(results):
        half = reference[2][rank * 128 : (rank + 1) * 128]
        for ours, theirs in ((found, reference[0]), (grad_hidden, reference[1]), (grad_weight, half)):
            assert abs(ours - theirs).max() < 1e-5 * max(1.0, abs(theirs).max())


def test_tokens_without_a_target_are_not_projected(monkeypatch):
    hidden, weight, labels, mask, _ = inputs()
    rows = []
    project = whole.project
    monkeypatch.setattr("igla_mega.ops.linear_log_probs.project", lambda h, w: rows.append(len(h)) or project(h, w))
    linear_log_probs(hidden, weight, labels, mask, vocab_size=VOCAB)
    assert sum(rows) == int(mask.sum())
    assert linear_log_probs(hidden, weight, labels, 0 * mask, vocab_size=VOCAB).tolist() == [0.0] * TOKENS
