"""Tests of the Fisher's definition on models with a closed form, of the penalty, and of merging phases."""

import pytest
import ranks
import tiny
import torch

from igla_mega.config.errors import ConfigError
from igla_mega.objective.ewc import PER_TOKEN, Ewc, FisherAnchor, FisherMetadata, damped, merge
from igla_mega.ops.categorical import draw_labels, token_keys
from igla_mega.ops.fisher import fisher_accumulate_

CLASSES, WIDTH = 3, 4
WEIGHTS = torch.tensor([[0.9, -0.4, 0.3, 0.1], [-0.6, 0.8, -0.2, 0.5], [0.2, -0.1, 0.7, -0.9]], dtype=torch.float64)


def inputs(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, WIDTH, dtype=torch.float64, generator=generator) * torch.tensor([1.0, 2.0, 0.5, 1.0])


def gradients(x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return gradients of each sample's negative log-likelihood under softmax regression, [N, CLASSES, WIDTH]."""
    residual = (x @ WEIGHTS.t()).softmax(-1) - torch.nn.functional.one_hot(labels, CLASSES)
    return residual.unsqueeze(2) * x.unsqueeze(1)


def drawn(x: torch.Tensor, seed: int = 1) -> torch.Tensor:
    return draw_labels((x @ WEIGHTS.t()).float(), token_keys(seed, 0, torch.arange(len(x))), 0, CLASSES)


def closed_form(x: torch.Tensor) -> torch.Tensor:
    """Return the expectation over labels: p_k (1 - p_k) x_i^2, summed over the samples."""
    p = (x @ WEIGHTS.t()).softmax(-1)
    return ((p * (1 - p)).unsqueeze(2) * x.square().unsqueeze(1)).sum(0)


def accumulated(samples: torch.Tensor, at_once: int = 20_000) -> torch.Tensor:
    """Return the sum of squares computed by the op; `at_once` tensors, one per sample, share one buffer."""
    running = torch.zeros(at_once, CLASSES, WIDTH, dtype=torch.float64)
    for part in samples.split(at_once):
        fisher_accumulate_([running[: len(part)]], [part.contiguous()], 1.0)
    return running.sum(0)


def test_labels_drawn_from_the_model_give_the_closed_form_of_softmax_regression():
    x = inputs(200_000)
    assert torch.allclose(accumulated(gradients(x, drawn(x))), closed_form(x), rtol=0.01)


def test_labels_drawn_from_the_model_give_the_closed_form_of_logistic_regression():
    # Two classes of weights w and 0: the logit of the first is w x, and its Fisher p (1 - p) x^2.
    x = inputs(200_000, seed=3)
    logits = torch.stack([x @ WEIGHTS[0], torch.zeros(len(x))], 1)
    labels = draw_labels(logits.float(), token_keys(2, 0, torch.arange(len(x))), 0, 2)
    p = torch.sigmoid(x @ WEIGHTS[0])
    found = (((p - (labels == 0).double()).unsqueeze(1) * x).square()).sum(0)
    assert torch.allclose(found, ((p * (1 - p)).unsqueeze(1) * x.square()).sum(0), rtol=0.01)


@pytest.mark.parametrize("batch", [4, 16, 64, 256])
def test_squaring_the_mean_of_a_batch_loses_the_batch_size(batch):
    # The trap of other implementations: E[(mean over B)^2] is 1/B of the Fisher.
    x = inputs(256 * 800)
    samples = gradients(x, drawn(x))
    means = samples.view(-1, batch, CLASSES, WIDTH).mean(1)
    ratio = means.square().mean(0).sum() / samples.square().mean(0).sum()
    assert abs(ratio * batch - 1) < 0.1


def test_the_square_of_a_sum_over_drawn_labels_is_unbiased():
    # Scores of drawn labels have mean 0, so that cross terms vanish: what lets one sequence give one squared gradient.
    x = inputs(64)
    estimates = torch.stack([gradients(x, drawn(x, seed)).sum(0).square() for seed in range(200)])
    error = estimates.std(0) / 200**0.5
    assert ((estimates.mean(0) - closed_form(x)).abs() < 3 * error).all()


def test_a_loop_over_samples_autograd_and_the_op_agree_in_fp64():
    x = inputs(50)
    labels = drawn(x)

    def loss(weights, row, label):
        return torch.nn.functional.cross_entropy(row @ weights.t(), label)

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(WEIGHTS, x, labels)
    looped = sum(torch.func.grad(loss)(WEIGHTS, x[i], labels[i]).square() for i in range(50))
    for found in (each.square().sum(0), accumulated(each, 7)):
        assert torch.allclose(found, looped, rtol=1e-12, atol=0)


def phases(count: int) -> list[list[FisherAnchor]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        fisher = torch.rand(1000, generator=generator).square()
        fisher[torch.rand(1000, generator=generator) < 0.2] = 0.0
        found.append([FisherAnchor(fisher, torch.randn(1000, generator=generator))])
    return found


def pulls(weights, states) -> torch.Tensor:
    return sum(state[0].fisher.double() * (weights.double() - state[0].anchor.double()) for state in states)


def folded(method: str, states, gamma: float = 1.0) -> list[FisherAnchor]:
    held: list[FisherAnchor] = []
    for state in states:
        held = merge(method, gamma, held, state)
    return held


def test_separate_penalties_are_folded_into_one_exactly():
    states = phases(4)
    held = folded("separate", states)
    for seed in range(3):
        weights = torch.randn(1000, generator=torch.Generator().manual_seed(seed))
        expected = pulls(weights, states)
        assert (pulls(weights, [held]) - expected).abs().max() < 1e-6 * expected.abs().max()


def test_online_decays_what_is_older_and_laplace_does_not_about_the_newest_weights():
    states = phases(3)
    fishers = [state[0].fisher for state in states]
    online, laplace = folded("online", states, 0.5)[0], folded("laplace", states, 0.5)[0]
    assert torch.allclose(online.fisher, fishers[0] / 4 + fishers[1] / 2 + fishers[2])
    assert torch.allclose(laplace.fisher, sum(fishers))
    assert torch.equal(online.anchor, states[2][0].anchor) and torch.equal(laplace.anchor, states[2][0].anchor)


def added_by_damping(recipe) -> list[float]:
    engine, _ = tiny.engine(recipe)
    states = list(engine.optimizer.states())
    fisher = [state.values["master"].square() for state in states]
    after = damped(engine.mesh, states, fisher, 0.5)
    return [float((b - a).double().mean()) for a, b in zip(fisher, after, strict=True) if a.numel()]


def test_damping_adds_a_share_of_the_mean_over_the_whole_model_in_every_layout():
    added = ranks.run(1, added_by_damping, tiny.recipe())[0]
    assert max(added) == pytest.approx(min(added), rel=1e-3)
    layout = {"tensor_parallel": 2, "sequence_parallel": True, "strategy": "FSDP"}
    for other in ranks.run(4, added_by_damping, tiny.recipe(**layout)):
        assert other[0] == pytest.approx(added[0], rel=1e-3)


ORIGIN = FisherMetadata(PER_TOKEN, "model", 1, 1, 1, 0, ("a",), "")


def refusal(kind: str, value: float) -> str:
    engine, _ = tiny.engine(tiny.recipe())
    states = list(engine.optimizer.states())
    ewc = Ewc(engine.mesh, 1.0)
    state = ewc.allocate(states)
    if engine.mesh.rank == engine.mesh.world_size - 1:
        getattr(state[3], kind)[0] = value
    try:
        ewc.hold(states, state, ORIGIN)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("kind", "value"), [("fisher", float("nan")), ("fisher", float("inf")), ("fisher", -1e-9), ("anchor", float("nan"))]
)
def test_what_cannot_hold_a_weight_is_refused_on_every_rank(kind, value):
    said = ranks.run(2, refusal, kind, value)
    assert said[0] == said[1] and kind in said[0].lower() and ".weight" in said[0]
