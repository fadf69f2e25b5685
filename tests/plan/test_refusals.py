"""What `train` refuses by the recipe alone, `check` refuses: one function for both."""

import json
import random

import pytest

from igla_mega.config.errors import ConfigError
from igla_mega.config.load import RECIPES, load_recipe, packaged
from igla_mega.config.merging import merge
from igla_mega.config.schema import Recipe
from igla_mega.plan.refusals import refusals
from igla_mega.plan.resolve import resolve

MODEL = {"hidden_size": 64, "num_layers": 4, "num_heads": 4, "intermediate_size": 64, "vocab_size": 300}
PLAIN = {"name": "r", "model": {**MODEL, "max_position": 64}, "training": {"total_steps": 10, "batch_size": 8}}
TUNED = {"name": "r", "base_model": "b", "training": {"total_steps": 10, "batch_size": 8, "sequence_length": 64}}
SOURCES = {"data": {"sources": {"web": "web.jsonl"}, "mix": {"web": 1.0}, "prepared": "p", "tokenizer": "t"}}
PAIRS = {"data": {"sources": {"web": "web.jsonl"}, "prepared": "p", "tokenizer": "t"}}
PHASE = {"name": "web", "tokens": 1024, "lr": 1e-3}


def said(*changes) -> list[str]:
    recipe: dict = {}
    for change in changes:
        recipe = merge(recipe, change)
    return refusals(Recipe.model_validate(recipe))


def test_the_packaged_recipes_are_sound_at_both_scales():
    for name in packaged():
        for scale in (None, "laptop"):
            assert refusals(load_recipe(name, scale=scale)) == []


@pytest.mark.parametrize("under", [[PLAIN], [PLAIN, SOURCES], [TUNED, PAIRS, {"sft": {}}], [TUNED, PAIRS, {"dpo": {}}]])
def test_a_sound_recipe_is_not_refused(under):
    assert said(*under) == []


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ([PLAIN, {"training": {"min_lr": 1e-2}}], "training.min_lr: 0.01 is above training.learning_rate 0.0003"),
        ([TUNED, {"training": {"min_lr": 1e-4}, "sft": {"learning_rate": 1e-5}}], "is above sft.learning_rate 1e-05"),
        ([TUNED, {"training": {"min_lr": 1e-4}, "dpo": {"learning_rate": 1e-6}}], "is above dpo.learning_rate 1e-06"),
        (
            [{"stages": [TUNED, merge(TUNED, {"training": {"min_lr": 1e-4}, "dpo": {"learning_rate": 1e-6}})]}],
            "stages.1.training.min_lr",
        ),
        (
            [PLAIN, {"training": {"total_steps": None, "min_lr": 1e-2}, "curriculum": {"phases": [PHASE]}}],
            "training.min_lr: 0.01 is above training.learning_rate 0.001",
        ),
        (
            [PLAIN, {"training": {"total_steps": None, "warmup_steps": 9}}, {"curriculum": {"phases": [PHASE]}}],
            "training.warmup_steps: 9 is more than the 2 steps of phase web",
        ),
        ([PLAIN, SOURCES, {"data": {"prepared": None}}], "data.prepared: not set"),
        ([TUNED, PAIRS, {"sft": {}, "data": {"prepared": None}}], "data.prepared: not set"),
        ([TUNED, PAIRS, {"sft": {"data": "other"}}], "data.sources.other: no path for a source used by `sft.data`"),
        ([PLAIN, SOURCES, {"data": {"document_packing": "best_fit"}}], "data.document_packing: best_fit"),
        ([PLAIN, SOURCES, {"data": {"tokenizer": None}, "evaluation": {"prompts": ["a"]}}], "data.tokenizer: not"),
        ([PLAIN, {"koshey": {"dynamic_batching": True}}], "koshey.dynamic_batching"),
        ([PLAIN, {"moe": {"num_experts": 4, "dispatcher": "flex"}}], "moe.dispatcher: flex needs deep_ep"),
        ([PLAIN, {"distributed": {"micro_batch_size": 3}}], "distributed.micro_batch_size: 3 does not divide"),
        ([TUNED, {"sft": {"batch_size": 6}, "distributed": {"micro_batch_size": 4}}], "micro_batch_size: 4 does not"),
        ([TUNED, {"training": {"batch_size": "192 tokens"}, "dpo": {}}], "192 tokens is not a whole number of pairs"),
        ([PLAIN, {"distributed": {"pipeline_parallel": 3}}], "distributed.pipeline_parallel"),
        ([PLAIN, {"distributed": {"context_parallel": 3}}], "context_parallel"),
        (
            [PLAIN, {"moe": {"num_experts": 4}, "distributed": {"expert_parallel": 3}}],
            "distributed.expert_parallel",
        ),
        (
            [PLAIN, {"distributed": {"pipeline_parallel": 2, "virtual_pipeline": 2}, "training": {"batch_size": 5}}],
            "training.batch_size: 5 gives each data-parallel rank 5 sequences, not divisible by pipeline_parallel 2",
        ),
    ],
)  # fmt: skip
def test_what_no_run_could_train_is_refused_by_its_key(changes, key):
    assert any(sentence.startswith(key) or key in sentence.split("\n")[0] for sentence in said(*changes))


def test_a_source_that_is_an_indexed_dataset_needs_no_folder(tmp_path):
    (tmp_path / "set.idx").touch()
    assert said(PLAIN, {"data": {"sources": {"web": str(tmp_path / "set")}, "mix": {"web": 1.0}}}) == []
    assert said(PLAIN, {"data": {"sources": {"web": "s3://bucket/set"}, "mix": {"web": 1.0}}}) == [], "not looked up"
    assert said(PLAIN, {"data": {"sources": {"web": "s3://bucket/a.jsonl"}, "mix": {"web": 1.0}}}) != []


def leaves() -> dict[str, list]:
    """Return each key of a section with values of its type, from the JSON Schema."""
    schema = json.loads((RECIPES / "recipe.schema.json").read_text())
    found = {}
    for section, entry in schema["$defs"]["Recipe"]["properties"].items():
        names = [one["$ref"] for one in (entry, *entry.get("anyOf", ())) if "$ref" in one]
        for key, field in schema["$defs"][names[0].split("/")[-1]]["properties"].items() if names else ():
            values: list = []
            for one in (field, *field.get("anyOf", ())):
                values += one.get("enum", [])
                values += {"integer": [1, 2, 3, 5, 8, 64, 300], "number": [0.0, 1e-5, 1e-3, 0.5, 1.0, 2.0]}.get(
                    one.get("type"), []
                )
                values += {"boolean": [True, False], "null": [None]}.get(one.get("type"), [])
            if values and section not in ("logging", "checkpoint"):
                found[f"{section}.{key}"] = values
    return found


def test_what_passes_check_is_trained_on_some_number_of_ranks():
    """Random single and double changes of the packaged recipes: none passes `check` and fails on every world size."""
    draw, known = random.Random(1), leaves()
    shape = load_recipe("pretrain_7b", scale="laptop").model
    counts = {"refused": 0, "sound": 0, "invalid": 0}
    for _ in range(600):
        name, keys = draw.choice(sorted(packaged())), draw.sample(sorted(known), draw.choice([1, 2]))
        changes = [f"{key}={json.dumps(draw.choice(known[key]))}" for key in keys]
        try:
            recipe = load_recipe(name, scale="laptop", overrides=changes)
        except ConfigError:
            counts["invalid"] += 1
            continue
        if recipe.stages is None and recipe.base_model is not None:
            recipe = recipe.with_keys({"model": shape})
        if refusals(recipe):
            counts["refused"] += 1
            continue
        errors = []
        for world_size in (1, 2, 3, 4, 5, 6, 8, 16, 24, 64, 128, 300, 600):
            try:
                resolve(recipe, world_size, "cpu")
                break
            except ConfigError as error:
                errors.append(error.breaches[0])
        else:
            assert all("gpu" in one.lower() or "cuda" in one.lower() for one in errors), (name, changes, errors)
        counts["sound"] += 1
    assert min(counts.values()) > 10, counts
