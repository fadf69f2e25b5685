import pytest

from igla_mega.config.errors import ConfigError
from igla_mega.config.merging import merge
from igla_mega.config.schema import Recipe
from igla_mega.layout.stages import Stage, drawn_data
from igla_mega.plan.choose import stages_of

BASE = {
    "name": "small",
    "model": {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "intermediate_size": 64, "max_position": 256},
    "training": {"batch_size": 8, "sequence_length": 64, "min_lr": 1e-5},
    "data": {"mix": {"web": 0.75, "code": 0.25}},
}
PHASES = [
    {"name": "first", "data": "code", "tokens": 1024, "lr": 1e-3},
    {"name": "web", "tokens": 1500, "lr": 1e-4},
    {"name": "third", "data": "mix", "tokens": "4K", "lr": 1e-4, "sequence_length": 128},
]


def stages(change: dict | None = None, *, phases=PHASES, steps: int = 10, world_size: int = 2) -> list[Stage]:
    given = merge(BASE, {"curriculum": {"phases": phases}} if phases else {"training": {"total_steps": steps}})
    recipe = Recipe.model_validate(merge(given, change or {}))
    return stages_of(recipe, world_size, "cpu", lambda recipe, layout: recipe.training.total_steps)


def test_a_recipe_without_phases_is_one_stage():
    (only,) = stages(phases=None)
    assert (only.name, only.first_step, only.num_steps, only.schedule_steps, only.domain) == ("small", 0, 10, 10, {})
    assert only.mix == {"web": 0.75, "code": 0.25}


def test_phases_follow_each_other_with_their_own_rate_length_and_schedule():
    found = stages()
    assert [(s.name, s.first_step, s.num_steps, s.last_step) for s in found] == [
        ("first", 0, 2, 2),
        ("web", 2, 3, 5),
        ("third", 5, 4, 9),
    ]
    assert [s.recipe.training.learning_rate for s in found] == [1e-3, 1e-4, 1e-4]
    assert [s.layout.sequence_length for s in found] == [64, 64, 128]
    assert [(s.schedule_first, s.schedule_steps) for s in found] == [(0, 2), (2, 3), (5, 4)]
    assert [s.domain for s in found] == [{"code": 1.0}, {"web": 1.0}, {"web": 0.75, "code": 0.25}]


def test_a_budget_that_is_not_whole_batches_is_rounded_up_and_said():
    first, second, _ = stages()
    assert first.notes == ()
    assert second.notes == ("web: 1,500 tokens are rounded up to 3 batches of 512, 1,536 in all.",)


def test_replay_draws_the_share_alike_from_each_earlier_domain():
    found = stages({"continual": {"replay": 0.1}})
    shares = [{name: weight / sum(s.mix.values()) for name, weight in s.mix.items()} for s in found]
    assert shares[0] == {"code": 1.0}  # nothing is earlier
    assert shares[1] == pytest.approx({"web": 0.9, "code": 0.1})
    # Half of the tenth is code's and half web's; nine tenths are the mix.
    assert shares[2] == pytest.approx({"web": 0.9 * 0.75 + 0.05, "code": 0.9 * 0.25 + 0.05})
    assert all(weight == int(weight) for s in found[1:] for weight in s.mix.values()), "exact in the blend"


def test_a_phase_may_replay_otherwise_and_the_base_models_data_are_earlier_too():
    more = [PHASES[0], {**PHASES[1], "replay": 0.5}]
    change = {"base_model": "x", "continual": {"replay": 0.2, "base_data": "books"}}
    first, second = stages(change, phases=more)
    assert {name: weight / sum(first.mix.values()) for name, weight in first.mix.items()} == pytest.approx(
        {"code": 0.8, "books": 0.2}
    )
    assert {name: weight / sum(second.mix.values()) for name, weight in second.mix.items()} == pytest.approx(
        {"web": 0.5, "code": 0.25, "books": 0.25}
    )


def test_phases_on_the_same_data_go_on_where_the_last_one_stopped():
    again = [PHASES[0], PHASES[1], {**PHASES[0], "name": "again"}]
    assert [s.data_step for s in stages(phases=again)] == [0, 0, 2]


def test_consolidation_cuts_a_run_into_stages_of_one_learning_rate_schedule():
    change = {"koshey": {"ewc_enabled": True, "ewc_lambda": 5, "consolidate_every": 2000}}
    found = stages(change, phases=None)
    assert [(s.first_step, s.num_steps, s.data_step) for s in found] == [(0, 4, 0), (4, 4, 4), (8, 2, 8)]
    assert {(s.schedule_first, s.schedule_steps) for s in found} == {(0, 10)}


def test_all_phases_lie_on_the_layout_of_the_longest():
    change = {"koshey": {"ring_attention": True}, "distributed": {"tensor_parallel": 1, "strategy": "DDP"}}
    found = stages(change, world_size=2)
    assert {(s.layout.context, s.layout.tensor, s.layout.data) for s in found} == {(2, 1, 1)}


def test_a_warm_up_longer_than_a_phase_is_refused():
    with pytest.raises(ConfigError, match=r"warmup_steps: 3 is more than the 2 steps of phase first"):
        stages({"training": {"warmup_steps": 3}})


def test_a_source_of_weight_zero_is_drawn_where_a_phase_or_the_fisher_names_it():
    data = {"mix": {"web": 1.0, "code": 0.0, "old": 0}, "sources": {"web": "w", "code": "c", "old": "o"}}

    def drawn(**change) -> set[str]:
        return set(drawn_data(Recipe.model_validate({**BASE, "data": data, **change})).sources)

    assert drawn() == {"web"}
    assert drawn(curriculum={"phases": [PHASES[0]]}) == {"web", "code"}
    assert drawn(base_model="b", continual={"base_data": "old"}) == {"web", "old"}
    assert set(drawn_data(Recipe.model_validate({"data": {"sources": {"a": "a"}}})).sources) == {"a"}
