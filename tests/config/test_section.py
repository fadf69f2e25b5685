import pytest

from igla_mega.config.schema import Recipe

RECIPE = Recipe.model_validate({"name": "a", "training": {"batch_size": 4, "total_steps": 9, "learning_rate": 1e-3}})


def test_dotted_keys_are_replaced_and_all_others_kept():
    changed = RECIPE.with_keys({"name": "b", "training.total_steps": 5, "training.sequence_length": 32})
    assert (changed.name, changed.training.total_steps, changed.training.sequence_length) == ("b", 5, 32)
    assert changed.training.learning_rate == 1e-3 and changed.distributed == RECIPE.distributed
    assert (RECIPE.name, RECIPE.training.total_steps) == ("a", 9), "the recipe itself is frozen"


def test_a_section_that_is_not_there_cannot_be_changed():
    with pytest.raises(AttributeError):
        RECIPE.with_keys({"lora.rank": 8})
