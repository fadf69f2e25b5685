import numpy as np
import pytest
import ranks
import tiny
import torch

from igla_mega.evaluate import scoring
from igla_mega.evaluate.scoring import Row

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.01, "bias_update_rate": 1e-3}
DISTRACTORS = (3, 7, 100, 249)


def rows(number: int = 11) -> list[Row]:
    """Of very different lengths, so that they take several passes."""
    draws = np.random.default_rng(5)
    lengths = draws.integers(3, tiny.SEQUENCE + 2, number)
    return [Row(draws.integers(0, tiny.VOCAB, n).tolist(), int(draws.integers(1, n))) for n in lengths]


def recipe(moe: bool = False, **distributed):
    return tiny.recipe(model={"init_std": 0.3}, moe=MOE if moe else None, **distributed)


def scored(moe: bool, distributed: dict):
    engine, _ = tiny.engine(recipe(moe, **distributed))
    found = scoring.score(engine, rows(), DISTRACTORS)
    return [(one.log_prob, one.not_likeliest, one.beaten) for one in found]


def by_whole_logits(moe: bool):
    engine, _ = tiny.engine(recipe(moe))
    model, expected = engine.chunks[0].eval(), []
    for row in rows():
        tokens = torch.tensor([row.tokens])
        with torch.no_grad():
            logits = model(tokens[:, :-1], torch.arange(tokens.size(1) - 1)[None], None)[0].double()
        logits, labels = logits[-row.num_targets :, : tiny.VOCAB], tokens[0, -row.num_targets :]
        chosen = logits.gather(1, labels[:, None])[:, 0]
        others = logits[:, list(DISTRACTORS)].masked_fill(labels[:, None] == torch.tensor(DISTRACTORS), -torch.inf)
        log_prob = (chosen - logits.logsumexp(1)).sum().item()
        missed = (logits.argmax(1) != labels).sum().item()
        expected.append((log_prob, missed, (others >= chosen[:, None]).any(1).sum().item()))
    return expected


LAYOUTS = {
    "one process": (1, {}),
    "tensor 2": (2, {"tensor_parallel": 2}),
    "tensor 2 with sequence parallelism": (2, {"tensor_parallel": 2, "sequence_parallel": True}),
    "pipeline 2": (2, {"pipeline_parallel": 2}),
    "interleaved pipeline 2": (2, {"pipeline_parallel": 2, "virtual_pipeline": 2}),
    "context 2": (2, {"context_parallel": 2}),
    "data 2": (2, {}),
    "FSDP 2": (2, {"strategy": "FSDP"}),
    "tensor 2, context 2": (4, {"tensor_parallel": 2, "context_parallel": 2}),
}


@pytest.fixture(scope="module")
def dense():
    return ranks.run(1, by_whole_logits, False)[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_rank_of_every_layout_gets_the_scores_of_whole_logits(name, dense):
    num_ranks, distributed = LAYOUTS[name]
    for found in ranks.run(num_ranks, scored, False, distributed):
        # Sums of up to 32 log-probabilities in fp32.
        assert [one[0] for one in found] == pytest.approx([one[0] for one in dense], abs=1e-4)
        assert [one[1:] for one in found] == [one[1:] for one in dense]


def test_experts_over_two_ranks_give_the_scores_of_one_process():
    [expected] = ranks.run(1, by_whole_logits, True)
    for found in ranks.run(2, scored, True, {"expert_parallel": 2}):
        assert [one[0] for one in found] == pytest.approx([one[0] for one in expected], abs=1e-4)
        assert [one[1:] for one in found] == [one[1:] for one in expected]


def tied():
    engine, _ = tiny.engine(recipe())
    with torch.no_grad():
        engine.chunks[0].module.output_layer.weight.zero_()
    return [one.not_likeliest for one in scoring.score(engine, [Row([4, 0], 1), Row([4, 5], 1)], (9,))]


def test_of_equally_likely_tokens_only_the_first_counts_as_the_likeliest():
    assert ranks.run(1, tied) == [[0, 1]]


def continued(distributed: dict, temperature: float):
    from functools import partial

    engine, _ = tiny.engine(recipe(**distributed))
    return scoring.draw(
        partial(scoring.next_tokens, engine, temperature=temperature),
        [[5, 6, 7], [1], list(range(30))],
        max_new_tokens=[6, 4, 5],
        seed=3,
        longest=tiny.SEQUENCE,
        ended=lambda place, new: place == 1 and len(new) == 2,
    )


def one_by_one():
    engine, _ = tiny.engine(recipe())
    model, texts = engine.chunks[0].eval(), []
    for prompt, number in (([5, 6, 7], 6), ([1], 2), (list(range(30)), 5)):
        ids = list(prompt)
        for _ in range(number):
            read = torch.tensor([ids[-tiny.SEQUENCE :]])
            with torch.no_grad():
                logits = model(read, torch.arange(read.size(1))[None], None)[0, -1, : tiny.VOCAB]
            ids.append(int(logits.argmax()))
        texts.append(ids[len(prompt) :])
    return texts


@pytest.mark.parametrize("name", ["one process", "tensor 2", "pipeline 2", "context 2", "FSDP 2"])
def test_the_likeliest_continuation_is_the_one_of_token_after_token(name):
    num_ranks, distributed = LAYOUTS[name]
    [expected] = ranks.run(1, one_by_one)
    assert ranks.run(num_ranks, continued, distributed, 0.0) == [expected] * num_ranks


def test_what_is_drawn_belongs_to_the_prompt_and_not_to_the_layout():
    [alone] = ranks.run(1, continued, {}, 1.0)
    assert alone != ranks.run(1, one_by_one)[0], "drawn, not the likeliest"
    for name in ("tensor 2", "data 2"):
        num_ranks, distributed = LAYOUTS[name]
        assert ranks.run(num_ranks, continued, distributed, 1.0) == [alone] * num_ranks


def frequencies():
    engine, _ = tiny.engine(recipe())
    with torch.no_grad():
        engine.chunks[0].module.output_layer.weight.zero_()
    return scoring.next_tokens(engine, [[1]] * 4000, list(range(4000)), temperature=1.0)


def test_draws_of_a_flat_distribution_are_spread_over_the_vocabulary():
    counts = np.bincount(ranks.run(1, frequencies)[0], minlength=tiny.VOCAB)
    # 16 expected each, Poisson: beyond 6 standard deviations once in a million runs.
    assert len(counts) == tiny.VOCAB and counts.max() < 16 + 6 * 4 and counts.min() > 0


class Fp8Layer(torch.nn.Linear):
    """Stands for a layer of Transformer Engine's, whose forward pass writes its largest value down."""

    def __init__(self):
        super().__init__(2, 2)
        held = type("Meta", (), {"amax_history": torch.zeros(4, 2), "scale": torch.ones(2)})()
        self.fp8_meta = {"scaling_fwd": held, "recipe": None}

    def forward(self, x):
        self.fp8_meta["scaling_fwd"].amax_history[0] = x.abs().max()
        return super().forward(x)


def test_random_states_modes_and_scales_are_put_back():
    import random
    from types import SimpleNamespace

    layer = Fp8Layer()
    layer.bias.requires_grad_(False)
    chunk = torch.nn.Sequential(layer, torch.nn.Dropout())
    chunk[1].eval()
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    with scoring.undisturbed(SimpleNamespace(chunks=[chunk])):
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        chunk.eval()(torch.ones(1, 2))
        assert layer.fp8_meta["scaling_fwd"].amax_history[0, 0] == 1
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert layer.training and not chunk[1].training
    assert not layer.fp8_meta["scaling_fwd"].amax_history.any()
