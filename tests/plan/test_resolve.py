import dataclasses
import json
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


LLAMA = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 256, "max_position_embeddings": 64,
}  # fmt: skip
MIXTRAL = {**LLAMA, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}


def tuning(folder: Path, config: dict, **sections):
    """A recipe that tunes a base model, whose folder has this config.json."""
    (folder / "base").mkdir(exist_ok=True)
    (folder / "base" / "config.json").write_text(json.dumps(config))
    training = {"batch_size": 4, "total_steps": 1, "sequence_length": 32}
    recipe = {"name": "tuned", "base_model": str(folder / "base"), "training": training, **sections}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return load_recipe(folder / "recipe.yaml")


def test_the_experts_of_a_base_model_are_those_of_its_configuration(tmp_path):
    recipe = tuning(tmp_path, MIXTRAL, distributed={"expert_parallel": 2, "strategy": "DDP", "tensor_parallel": 1})
    base, notes = shape_of_base(recipe)
    assert notes == [] and (base.moe.num_experts, base.moe.num_experts_per_tok) == (4, 2)
    resolved = resolve(recipe, 2, "cpu", base=base)
    assert resolved.recipe.moe == base.moe and resolved.layouts[0].expert == 2
    with pytest.raises(ConfigError, match=r"distributed\.expert_parallel: 3 does not divide moe\.num_experts 4"):
        resolve(recipe.with_keys({"distributed.expert_parallel": 3}), 3, "cpu", base=base)


def test_experts_that_the_base_model_does_not_have_are_refused(tmp_path):
    recipe = tuning(tmp_path, LLAMA, distributed={"expert_parallel": 2})
    base, _ = shape_of_base(recipe)
    with pytest.raises(ConfigError, match=r"expert_parallel: 2 without `moe:`"):
        resolve(recipe, 2, "cpu", base=base)
    with pytest.raises(ConfigError, match=r"is a dense model, but the recipe has 4 experts"):
        shape_of_base(tuning(tmp_path, LLAMA, moe={"num_experts": 4}))
    with pytest.raises(ConfigError, match=r"moe\.num_experts: is 8, but .* has 4"):
        shape_of_base(tuning(tmp_path, MIXTRAL, moe={"num_experts": 8}))


def test_a_base_model_that_is_not_here_is_assumed_to_have_experts_if_the_recipe_names_some():
    base, [note] = shape_of_base(load_recipe("lora_7b", overrides=["distributed.expert_parallel=2"]))
    assert base.moe.num_experts == 8 and "shape of moe_8x7b, 46.7B" in note
