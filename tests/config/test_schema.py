import inspect

import jsonschema
import pytest
from pydantic import ValidationError

from igla_mega.config import features, schema
from igla_mega.config.quantities import batch_tokens, tokens, tokens_text
from igla_mega.config.schema import Model, Recipe, Training, json_schema
from igla_mega.config.section import Section

SECTIONS = [
    item
    for module in (schema, features)
    for _, item in inspect.getmembers(module, inspect.isclass)
    if issubclass(item, Section) and item.__module__ == module.__name__
]
SHAPE = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "intermediate_size": 96, "vocab_size": 100}


@pytest.mark.parametrize("section", SECTIONS)
def test_every_field_is_described(section):
    assert [name for name, field in section.model_fields.items() if not field.description] == []


def test_every_number_has_a_range():
    for section, body in json_schema()["$defs"].items():
        for name, field in body["properties"].items():
            for arm in field.get("anyOf", [field]):
                if arm.get("type") in ("integer", "number"):
                    assert {"minimum", "exclusiveMinimum", "enum"} & arm.keys(), f"{section}.{name}"


@pytest.mark.parametrize(
    ("written", "count"),
    [("4M tokens", 4 * 2**20), ("16K tokens", 16384), ("0.5M tokens", 2**19), ("8192 tokens", 8192), (128, None)],
)
def test_a_batch_in_tokens_counts_in_powers_of_two(written, count):
    assert batch_tokens(written) == count


@pytest.mark.parametrize(
    ("written", "count"),
    [("140B", 140_000_000_000), ("1.5T", 1_500_000_000_000), ("200K", 200_000), ("10M tokens", 10_000_000), (7, 7)],
)
def test_a_data_size_counts_in_powers_of_ten(written, count):
    assert tokens(written) == count
    assert tokens(tokens_text(count)) == count


def test_a_data_size_is_written_back_as_it_is_read():
    assert [tokens_text(count) for count in (140_000_000_000, 4_915_200, 123_456_789, 999)] == [
        "140B",
        "4.9152M",
        123_456_789,
        999,
    ]


@pytest.mark.parametrize("bad", ["4X tokens", "4M", "tokens", 0, -1, "0 tokens", 1.5, True, None, [1]])
def test_a_batch_of_another_form_is_refused(bad):
    with pytest.raises(ValidationError):
        Training(batch_size=bad)


@pytest.mark.parametrize("bad", [True, "1e400x", float("nan"), float("inf"), 0, -1e-3])
def test_a_learning_rate_is_a_finite_number_above_zero(bad):
    with pytest.raises(ValidationError):
        Training(learning_rate=bad)


@pytest.mark.parametrize(("written", "means"), [(True, "full"), (False, "none"), ("selective", "selective")])
def test_gradient_checkpointing_true_is_full(written, means):
    recipe = Recipe.model_validate({"distributed": {"gradient_checkpointing": written}})
    assert recipe.distributed.gradient_checkpointing == means


def test_key_value_heads_and_head_size_follow_the_heads():
    model = Model.model_validate(SHAPE)
    assert (model.num_kv_heads, model.head_dim, model.head_size) == (4, None, 16)
    assert Model.model_validate({**SHAPE, "head_dim": 32}).head_size == 32


def test_parameters_are_counted_weight_by_weight():
    model = Model.model_validate({**SHAPE, "num_kv_heads": 2})
    layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96
    assert model.num_parameters() == 2 * 100 * 64 + 2 * (layer + 2 * 64) + 64
    assert model.matmul_parameters() == 100 * 64 + 2 * layer
    tied = model.model_copy(update={"tie_embeddings": True})
    assert tied.num_parameters() == model.num_parameters() - 100 * 64
    assert tied.matmul_parameters() == model.matmul_parameters()


def test_experts_are_all_stored_and_some_visited():
    model, moe = Model.model_validate(SHAPE), features.Moe(num_experts=8, num_experts_per_tok=2)
    expert, router = 3 * 64 * 96, 64 * 8
    assert model.num_parameters(moe) == model.num_parameters() + 2 * (7 * expert + router)
    assert model.matmul_parameters(moe) == model.matmul_parameters() + 2 * (expert + router)


def test_the_warm_up_is_its_steps_or_else_its_share():
    def warmup(**sections) -> int:
        return Recipe.model_validate(sections).num_warmup_steps(1000)

    assert warmup() == 0
    assert warmup(training={"warmup_steps": 7, "warmup_ratio": 0.5}) == 7
    assert warmup(training={"warmup_ratio": 0.03}, scheduler={"warmup_ratio": 0.03}) == 30
    assert warmup(scheduler={"warmup_ratio": 0.02}) == 20


def test_the_schema_for_editors_carries_units_and_allows_what_the_loader_allows():
    sections = json_schema()["$defs"]
    assert "steps" in sections["Training"]["properties"]["total_steps"]["description"]
    assert True in sections["Distributed"]["properties"]["gradient_checkpointing"]["enum"]
    assert sections["Training"]["properties"]["learning_rate"]["exclusiveMinimum"] == 0
    assert sections["Training"]["additionalProperties"] is False


def test_a_recipe_is_frozen():
    with pytest.raises(ValidationError):
        Recipe().training = Training()  # type: ignore[misc]


@pytest.mark.parametrize(
    ("recipe", "place", "word"),
    [
        ({"lora": {"rank": 4, "alfa": 8}}, ["lora"], "alfa"),
        ({"dpo": {"beta": "x"}}, ["dpo", "beta"], "'x'"),
        ({"curriculum": {"phases": [{"name": 3}]}}, ["curriculum", "phases", 0, "name"], "3"),
        ({"stages": [{}, {"sft": {"foo": 1}}]}, ["stages", 1, "sft"], "foo"),
    ],
    ids=str,
)
def test_an_editor_names_the_key_inside_an_optional_section(recipe, place, word):
    [error] = jsonschema.Draft202012Validator(json_schema()).iter_errors(recipe)
    assert list(error.absolute_path) == place and word in error.message


def test_an_editor_allows_null_for_an_optional_section():
    jsonschema.Draft202012Validator(json_schema()).validate({"lora": None, "stages": None})
