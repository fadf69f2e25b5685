"""Who wins: a user's file over a scale, an explicit key over those of the same meaning; and what is printed of it."""

import operator

import pytest
import yaml

from igla_mega.config import scales
from igla_mega.config.errors import ConfigError
from igla_mega.config.load import RECIPES, dump, load_recipe, packaged
from igla_mega.config.schema import Recipe

LAPTOP = scales.read_scale("laptop")


@pytest.fixture
def load(tmp_path):
    """Load a recipe of the user's own from text; returns it with the printed lines."""

    def load_text(text: str, *overrides: str, scale: str | None = "laptop"):
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        said: list[str] = []
        return load_recipe(path, scale=scale, overrides=list(overrides), say=said.append), "\n".join(said)

    return load_text


def test_explicit_keys_of_a_file_win_over_a_scale_which_fills_the_rest(load):
    recipe, said = load("extends: pretrain_7b\nmodel: {hidden_size: 64}\ntraining: {total_steps: 60}\n")
    assert (recipe.model.hidden_size, recipe.model.num_layers) == (64, 4)
    assert (recipe.training.total_steps, recipe.num_warmup_steps(60)) == (60, 6)
    assert "--scale laptop leaves what your recipe sets: model.hidden_size=64, training.total_steps=60" in said
    assert "sets model.num_layers=4" in said and "model.hidden_size=256" not in said


def nested(key: str, value) -> dict:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


VALUES = {  # of keys that the overlay sets: another legal value
    "precision": "BF16", "gradient_checkpointing": "full", "keep_freed_memory": False, "num_kv_heads": 4,
    "num_heads": 4,
    "head_dim": 64, "hidden_size": 64, "max_length": 2000, "max_prompt_length": 100,
    "batch_size": 32, "gradient_accumulation": 1, "warmup_ratio": 0.5, "validation_fraction": 0.2,
    "compute_dtype": "bfloat16", "learning_rate": 2e-3, "lr": 2e-3, "min_lr": 1e-5, "total_tokens": 10**6,
    "tokens": 10**5, "scaling_factor": 1.5, "expert_capacity_factor": 3.0, "sequence_length": 128, "max_position": 512,
}  # fmt: skip


@pytest.mark.parametrize("name", packaged())
def test_every_key_that_a_scale_sets_can_be_set_by_a_file_instead(name, load):
    """For each packaged recipe: a child that sets one key gets this key, whatever the scale says of it."""
    if load_recipe(name).stages:
        pytest.skip("its keys are in its stages")
    written = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    tried = 0
    met = [overlay for key, overlay in LAPTOP.items() if key == "always" or scales.value_at(written, key) is not None]
    for key in sorted({key for overlay in met for key in scales.keys_of(overlay)}):
        value = VALUES.get(key.rpartition(".")[2], 7)
        fits = {"training.gradient_accumulation": {"training": {"batch_size": 32}}}.get(key, {})
        child = {"extends": name, **nested(key, value)}
        for section, keys in fits.items():
            child[section] = {**keys, **child.get(section, {})}
        if key == "training.warmup_steps" or key.startswith("curriculum"):
            child.setdefault("training", {}).setdefault("warmup_ratio", None)
        recipe, _ = load(yaml.safe_dump(child))
        if key.startswith("curriculum"):
            assert {getattr(phase, key.rpartition(".")[2]) for phase in recipe.curriculum.phases} == {value}
        else:
            assert operator.attrgetter(key)(recipe) == value, key
        tried += 1
    assert tried >= 8


def test_packaged_recipes_are_scaled_whole():
    recipe = load_recipe("pretrain_7b", scale="laptop")
    assert (recipe.model.hidden_size, recipe.training.total_steps, recipe.training.sequence_length) == (256, 300, 256)


def test_a_recipe_without_a_packaged_parent_gets_only_what_holds_for_all(load):
    model = "{hidden_size: 64, num_layers: 2, num_heads: 4, intermediate_size: 96, vocab_size: 300, max_position: 32}"
    recipe, _ = load(f"model: {model}\ntraining: {{total_steps: 60, batch_size: 4}}\n")
    assert (recipe.model.num_layers, recipe.sequence_length, recipe.training.total_steps) == (2, 32, 60)
    assert (recipe.distributed.precision, recipe.checkpoint.every_steps) == ("FP32", 50)


def test_a_key_bounded_by_one_of_the_files_is_left_too(load):
    recipe, _ = load("extends: pretrain_7b\nmodel: {max_position: 128}\ntraining: {learning_rate: 1e-4}\n")
    assert (recipe.sequence_length, recipe.training.min_lr) == (128, 3e-5)
    recipe, _ = load("extends: pretrain_7b\ntraining: {sequence_length: 512}\n")
    assert recipe.model.max_position == 8192


def test_stages_of_a_file_keep_their_keys_and_get_the_rest(load):
    text = "stages:\n- {base_model: a, sft: {learning_rate: 1e-5, epochs: 1}, checkpoint: {every_steps: 7}}\n"
    recipe, _ = load(text)
    assert (recipe.stages[0].checkpoint.every_steps, recipe.stages[0].sft.learning_rate) == (7, 1e-5)
    assert recipe.stages[0].distributed.precision == "FP32"


@pytest.mark.parametrize("winner", scales.RULES_OUT)
def test_an_explicit_key_drops_those_of_the_same_meaning_below_it_and_says_so(winner):
    values = {"learning_rate": 1e-3, "warmup_ratio": 0.1}
    value = values.get(winner.rpartition(".")[2], 8)
    for loser in scales.RULES_OUT[winner]:
        content = nested(loser, values.get(loser.rpartition(".")[2], 4))
        content = scales.merge(content, nested(winner, value))
        said: list[str] = []
        kept = scales.without_ruled_out(content, {winner}, "--set", said.append)
        assert scales.value_at(kept, loser) is None and scales.value_at(kept, winner) == value
        assert len(said) == 1 and loser in said[0] and winner in said[0] and "--set" in said[0]
        assert scales.without_ruled_out(content, {winner, loser}, "", said.append) == content
        staged = scales.without_ruled_out({"stages": [content, content]}, {f"stages.1.{winner}"}, "", said.append)
        assert staged == {"stages": [content, kept]}


def test_steps_of_the_command_line_win_over_epochs_of_a_recipe(load):
    recipe, said = load("extends: lora_7b\n", "training.total_steps=20", scale=None)
    assert (recipe.training.total_steps, recipe.training.epochs) == (20, None)
    assert said == "training.epochs: 3 is not used: --set sets training.total_steps 20"
    recipe, _ = load("extends: pretrain_7b\ntraining: {epochs: 2}\n")
    assert (recipe.training.total_steps, recipe.training.epochs) == (None, 2)
    with pytest.raises(ConfigError, match="both set the length"):
        load("extends: pretrain_7b\ntraining: {epochs: 2, total_steps: 3}\n")


def test_a_part_of_a_shape_next_to_a_base_model_is_one_error():
    with pytest.raises(ConfigError) as caught:
        load_recipe("continual_7b", scale="laptop", overrides=["model.hidden_size=64"])
    assert str(caught.value).startswith("model.hidden_size: given next to base_model llama-7b-pretrained")


def test_a_scaled_recipe_of_a_run_stays_what_it_is(load):
    """The recipe in a run folder sets every key, so that a scale changes nothing in it."""
    written = dump(load_recipe("pretrain_7b", scale="laptop"))
    recipe, said = load(written)
    assert dump(recipe) == written and "sets" not in said.splitlines()[0].split("leaves")[0]
    assert isinstance(recipe, Recipe)


@pytest.mark.parametrize("scale", [None, "laptop"])
def test_a_key_that_a_child_of_ones_own_drops_from_its_parent_stays_dropped_at_a_scale(load, scale, tmp_path):
    (tmp_path / "parent.yaml").write_text("extends: pretrain_7b\ntraining: {epochs: 2}\n")
    recipe, _ = load("extends: parent.yaml\ntraining: {total_steps: 3000, warmup_steps: 60}\n", scale=scale)
    assert (recipe.training.total_steps, recipe.training.epochs) == (3000, None)
