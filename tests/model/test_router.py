"""What a router does with given logits, what is said of a load, and the grouped products."""

import math

import pytest
import ranks
import tiny
import torch

from igla_mega.config.features import Moe
from igla_mega.model import experts, spec
from igla_mega.model.router import Load, _ranks, routers_of
from igla_mega.train.metrics import ALARM_STEPS, Alarm, _load_metrics

MOE = {"num_experts": 4, "num_experts_per_tok": 2}


def test_the_highest_score_comes_first_and_of_equal_ones_the_first():
    scores = torch.tensor([[0.5, 1.0, 0.5, 2.0], [3.0, 3.0, 3.0, 3.0]]).t()
    assert _ranks(scores, 0).t().tolist() == [[2, 1, 3, 0], [0, 1, 2, 3]]


def routed(moe: dict, factor: float | None, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and visits [T, E] that a router in training makes of logits [S, B, E]."""
    training = {"expert_capacity_factor": factor} if factor else {}
    wanted = tiny.recipe(model={"hidden_size": 8, "head_dim": 2}, moe={**MOE, **moe}, training=training)
    built, _ = tiny.engine(wanted)
    router = next(routers_of(built.chunks))
    with torch.no_grad():
        router.weight.zero_()[:, :4] = torch.eye(4)
    hidden = torch.cat([logits, torch.zeros_like(logits)], -1)
    weights, routing_map = router(hidden)
    return weights.detach(), routing_map


LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 3.0, 1.0, 0.0], [1.0, 2.0, 0.5, 0.0], [0.0, 4.0, 0.0, 1.0]])[
    :, None
]


def test_weights_are_the_softmax_over_the_chosen_or_over_all():
    after, routing_map = ranks.run(1, routed, {}, None, LOGITS)[0]
    before, _ = ranks.run(1, routed, {"pre_softmax": True}, None, LOGITS)[0]
    assert routing_map.sum(1).tolist() == [2, 2, 2, 2] and routing_map[0].tolist() == [
        True,
        True,
        False,
        False,
    ]
    assert after[0].tolist()[:2] == pytest.approx([math.e / (1 + math.e), 1 / (1 + math.e)])
    assert torch.allclose(before, LOGITS[:, 0].softmax(-1) * routing_map)


def test_an_expert_keeps_its_most_probable_tokens():
    # All four want expert 1; a fair share is 4 * 2 / 4 = 2.
    weights, routing_map = ranks.run(1, routed, {}, 1.0, LOGITS)[0]
    full, _ = ranks.run(1, routed, {}, None, LOGITS)[0]
    kept = full[:, 1].argsort(descending=True)[:2].sort().values
    assert routing_map[:, 1].nonzero().flatten().tolist() == kept.tolist()
    assert torch.equal(weights, full * routing_map), "the remaining weights are not normalized again"


def test_filling_up_makes_every_expert_equally_long():
    weights, routing_map = ranks.run(1, routed, {"capacity_over": "rank", "pad_to_capacity": True}, 1.0, LOGITS)[0]
    plain, kept = ranks.run(1, routed, {"capacity_over": "rank"}, 1.0, LOGITS)[0]
    assert routing_map.sum(0).tolist() == [2, 2, 2, 2] and (routing_map | ~kept).all() and torch.equal(weights, plain)


def test_forced_balance_sends_tokens_in_turn():
    _, routing_map = ranks.run(1, routed, {"force_balanced": True}, None, LOGITS)[0]
    assert routing_map.sum(0).tolist() == [2, 2, 2, 2]


def lose(wanted, grouped: bool) -> tuple[list, list]:
    if grouped:
        spec.use_experts = lambda layer, moe, grouped: experts.use_experts(layer, moe, grouped=True)
    built, _ = tiny.engine(wanted)
    names = {type(layer.mlp.experts).__name__ for layer in built.chunks[0].module.decoder.layers}
    return tiny.steps(built, 0, 3, 1e-3), sorted(names)


@pytest.mark.parametrize("num_ranks, layout", [(1, {}), (2, {"expert_parallel": 2})])
def test_grouped_products_are_those_of_one_expert_after_the_other(num_ranks, layout):
    wanted = tiny.recipe(moe=MOE, **layout)
    plain, names = ranks.run(num_ranks, lose, wanted, False)[0]
    grouped, grouped_names = ranks.run(num_ranks, lose, wanted, True)[0]
    assert (names, grouped_names) == (["SequentialMLP"], ["GroupedExperts"])
    assert max(abs(a - b) for x, y in zip(plain, grouped, strict=True) for a, b in zip(x, y, strict=True)) < 1e-5


LOAD = Load([[0.97, 0.01, 0.01, 0.01], [0.25] * 4], [0.5, 0.0], [0.1, 1.38], [3.0, 1.0])


def test_a_load_says_who_starves_and_what_is_dropped():
    moe = Moe.model_validate({**MOE, "alarm_load": 0.1, "alarm_drop_rate": 0.3})
    assert LOAD.max_violation == pytest.approx([2.88, 0.0])
    written = _load_metrics(LOAD, moe)
    assert written["moe_alarms"] == {"starving": ["0.1", "0.2", "0.3"], "dropping": [0]}
    assert (written["moe_aux_loss"], written["moe_drop_rate"]) == (2.0, 0.25)
    assert written["expert_load"] == LOAD.tokens_per_expert and written["moe_layers"]["aux_loss"] == [3.0, 1.0]
    calm = Load([[0.25] * 4], [0.0], [1.38], [1.0])
    assert "moe_alarms" not in _load_metrics(calm, moe)


def test_an_alarm_is_said_once_until_it_has_been_quiet_for_a_while():
    moe = Moe.model_validate({**MOE, "alarm_load": 0.1, "alarm_drop_rate": 0.3})
    calm, alarm = Load([[0.25] * 4] * 2, [0.0] * 2, [1.38] * 2, [1.0] * 2), Alarm(moe)
    starving, dropping = alarm.lines(1, LOAD)
    assert "experts get too few tokens: 1 of layer 0 (1.00%)" in starving and "fair share is 25.0%" in starving
    assert "layer 0 50.0%" in dropping and "alarm_drop_rate 0.3" in dropping
    assert list(alarm.lines(2, LOAD)) == list(alarm.lines(3, calm)) == list(alarm.lines(4, LOAD)) == []
    assert len(list(alarm.lines(4 + ALARM_STEPS, LOAD))) == 2
