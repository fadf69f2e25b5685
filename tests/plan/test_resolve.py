import dataclasses
from pathlib import Path

import pytest

from igla_mega.config.errors import ConfigError
from igla_mega.config.load import load_recipe
from igla_mega.plan.resolve import Base, resolve, shape_of_base


def test_a_plain_recipe_is_one_part_of_one_stage():
    resolved = resolve(load_recipe("pretrain_7b", scale="laptop"), 2, "cpu")
    assert (len(resolved.parts), len(resolved.stages), resolved.base) == (1, 1, None)
    assert resolved.part_ends == (resolved.total_steps,) == (300,)
    assert resolved.layouts[0].world_size == 2


def test_phases_follow_one_another_in_one_part():
    resolved = resolve(load_recipe("continual_7b", scale="laptop"), 1, "cpu", base=None)
    ends = [stage.last_step for stage in resolved.stages]
    assert ends == sorted(ends) and resolved.part_ends == (ends[-1],) and resolved.first_stage(0) == 0


def test_the_parts_of_stages_have_the_base_model_s_shape_and_ends_of_their_own():
    recipe = load_recipe("sft_dpo_7b", scale="laptop")
    shape = load_recipe("pretrain_7b", scale="laptop").model
    resolved = resolve(recipe, 1, "cpu", base=Base(Path("base"), shape, None), total_steps=lambda recipe, layout: 7)
    assert [part.model for part in resolved.parts] == [shape, shape]
    assert resolved.part_ends == (7, 14) and [resolved.first_stage(part) for part in (0, 1)] == [0, 1]
    assert [part.model for part in resolved.recipe.stages] == [shape, shape], "as the run folder keeps it"


def test_nothing_of_it_can_be_changed():
    resolved = resolve(load_recipe("pretrain_7b", scale="laptop"), 1, "cpu")
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolved.base = None


def test_a_layout_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError):
        resolve(load_recipe("pretrain_7b", scale="laptop", overrides=["distributed.tensor_parallel=3"]), 3, "cpu")


def test_the_shape_of_a_base_model_that_is_not_here_is_assumed_and_said():
    base, notes = shape_of_base(load_recipe("lora_7b"))
    assert base is not None and base.model.hidden_size == load_recipe("pretrain_7b").model.hidden_size
    assert len(notes) == 1 and "llama-7b" in notes[0]
    assert shape_of_base(load_recipe("pretrain_7b")) == (None, [])
