"""What the laptop scale supplies, without making any of it."""

import pytest

from igla_mega.config.errors import ConfigError
from igla_mega.config.load import load_recipe
from igla_mega.prepare import laptop


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("IGLA_CACHE", str(tmp_path))
    return tmp_path


def test_a_missing_base_and_its_data_are_those_of_recipe_1(cache):
    recipe = laptop.with_base(load_recipe("continual_7b", scale="laptop"), None, num_ranks=1, make=False)
    assert recipe.base_model == str(cache / "models" / "pretrain_7b-laptop-half")
    assert list(recipe.data.sources) == ["web", "code", "books", "academic", "conversation"]
    assert recipe.continual is not None and recipe.continual.base_data == "mix"


def test_phases_of_unknown_names_learn_a_source_each_and_it_is_said(cache, capsys):
    recipe = load_recipe("continual_7b", scale="laptop", overrides=["curriculum.phases.1.data=web"])
    (cache / "models" / "pretrain_7b-laptop-half").mkdir(parents=True)
    found = laptop.with_base(recipe, None, num_ranks=1, make=False)
    assert found.curriculum is not None
    assert [phase.source for phase in found.curriculum.phases] == ["code", "web", "books"]
    laptop._with_domains(found.model_copy(update={"curriculum": recipe.curriculum}), say=True)
    assert "domain_1 is code, domain_3 is books" in capsys.readouterr().err


def test_a_base_and_data_of_the_users_own_stay_as_they_are(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    recipe = load_recipe("continual_7b", scale="laptop", overrides=["base_model=mine"])
    assert laptop.with_base(recipe, tmp_path, num_ranks=1) == recipe


def test_a_base_given_by_a_path_that_is_not_there_is_not_replaced():
    recipe = load_recipe("continual_7b", scale="laptop", overrides=["base_model=./absent"])
    with pytest.raises(ConfigError, match="absent not found here"):
        laptop.with_base(recipe, None, num_ranks=1)


def test_data_of_a_base_model_has_its_tokenizer_whatever_the_recipe_says_of_the_model(cache):
    model = "{hidden_size: 64, num_layers: 2, num_heads: 4, intermediate_size: 96, vocab_size: 9000}"
    recipe = load_recipe("continual_7b", scale="laptop", overrides=[f"model={model}"])
    supplied = laptop.supplied(recipe, None, num_ranks=1, make=False)
    assert supplied.data.tokenizer is not None and supplied.data.tokenizer.endswith("tokenizer_4096")


def test_prepared_data_is_kept_apart_by_what_it_depends_on(cache):
    def folder(*overrides: str) -> str | None:
        recipe = load_recipe("pretrain_7b", scale="laptop", overrides=list(overrides))
        return laptop.with_data(recipe, make=False).data.prepared

    folders = [
        folder(),
        folder("model.vocab_size=5000"),
        folder("data.cleaning={exact_duplicates: true}"),
        folder("data.cleaning={min_characters: 10}"),
        folder("data.text_key=body"),
    ]
    assert len(set(folders)) == len(folders) and str(folders[0]).endswith("prepared_4096")
    assert folder("training.learning_rate=1e-3") == folders[0]
