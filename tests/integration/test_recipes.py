"""The card's recipes, cut out of it verbatim, and the packaged ones."""

import json
import re
from pathlib import Path

import pytest

from igla_mega.config import rules
from igla_mega.config.load import RECIPES, dump, load_recipe, packaged
from igla_mega.config.scales import scales
from igla_mega.config.schema import Recipe, json_schema
from igla_mega.plan.choose import choose_layout

CARD = (Path(__file__).parents[1] / "data" / "IGLA_TRAINING_RECIPES.md").read_text(encoding="utf-8")
NAMES = ["pretrain_7b", "koshey_7b", "lora_7b", "qlora_7b", "dpo_7b", "sft_dpo_7b", "moe_8x7b", "continual_7b"]


def card_blocks(number: int) -> list[str]:
    section = re.split(r"^## ", CARD, flags=re.MULTILINE)[number]
    assert section.startswith(f"Recipe {number}:")
    return re.findall(r"```yaml\n(.*?)```", section, flags=re.DOTALL)


def card_yaml(name: str) -> str:
    """Return a recipe of the card as one document: recipe 1's two blocks joined, recipe 6's two as stages."""
    blocks = card_blocks(NAMES.index(name) + 1)
    if name != "sft_dpo_7b":
        return "\n".join(blocks)
    items = [block.rstrip().replace("\n", "\n    ") for block in blocks]
    return "stages:\n" + "".join(f"  - {item}\n" for item in items)


def load_text(folder: Path, text: str, **options) -> Recipe:
    path = folder / "card.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path, **options)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_of_the_card_passes_check_verbatim(name, tmp_path):
    rules.check(load_text(tmp_path, card_yaml(name)))


@pytest.mark.parametrize("stage", [0, 1])
def test_a_stage_of_recipe_6_passes_check_alone(stage, tmp_path):
    recipe = load_text(tmp_path, card_blocks(6)[stage])
    assert (recipe.sft is not None, recipe.dpo is not None) == (stage == 0, stage == 1)


def test_both_blocks_of_recipe_6_in_one_file_are_its_stages(tmp_path):
    recipe = load_text(tmp_path, "\n---\n".join(card_blocks(6)))
    assert recipe.model_dump() == {**load_text(tmp_path, card_yaml("sft_dpo_7b")).model_dump(), "name": recipe.name}


@pytest.mark.parametrize("name", NAMES)
def test_a_packaged_recipe_says_what_the_card_says(name, tmp_path):
    of_card = load_text(tmp_path, card_yaml(name)).model_dump()
    assert load_recipe(name).model_dump() == {**of_card, "name": name}


def test_recipe_1_reads_the_cards_numbers(tmp_path):
    recipe = load_text(tmp_path, card_yaml("pretrain_7b"))
    assert recipe.training.learning_rate == 3e-4
    assert recipe.training.batch_tokens == 512 * 8192
    assert recipe.data.total_tokens == 140_000_000_000
    assert recipe.optimizer.epsilon == 1e-8
    assert recipe.distributed.gradient_checkpointing == "full"
    assert recipe.model is not None
    assert recipe.model.num_parameters() == 5_933_109_248


def test_all_eight_are_packaged_in_the_cards_order_each_with_its_line():
    assert list(packaged()) == NAMES
    assert [line.split(":")[0] for line in packaged().values()] == [f"Recipe {n}" for n in range(1, 9)]


@pytest.mark.parametrize("name", NAMES)
def test_a_packaged_recipe_is_short_and_names_its_schema(name):
    lines = (RECIPES / f"{name}.yaml").read_text().splitlines()
    assert len(lines) <= 60
    assert lines[0] == "# yaml-language-server: $schema=recipe.schema.json"


@pytest.mark.parametrize("scale", [None, "laptop"])
@pytest.mark.parametrize("name", NAMES)
def test_the_resolved_recipe_loads_again_as_the_same(name, scale, tmp_path):
    recipe = load_recipe(name, scale=scale)
    assert load_text(tmp_path, dump(recipe)) == recipe


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_has_a_layout_on_a_laptops_two_ranks(name):
    recipe = load_recipe(name, scale="laptop")
    for stage in recipe.stages or [recipe]:
        layout = choose_layout(stage, world_size=2, device="cpu")
        assert layout.world_size == 2
        assert layout.sequence_length == 256
        if stage.model is not None:
            sizes = {"koshey_7b": (1, 2, 1), "moe_8x7b": (1, 1, 2)}.get(name, (2, 1, 1))
            assert (layout.tensor, layout.context, layout.expert) == sizes


@pytest.mark.parametrize(("name", "gpus"), [("pretrain_7b", 64), ("koshey_7b", 16), ("moe_8x7b", 256)])
def test_a_pretraining_recipe_has_a_layout_on_the_cards_gpus(name, gpus):
    # Recipe 2's batch is 16 sequences: its 128 GPUs need eight-fold context parallelism.
    assert choose_layout(load_recipe(name), world_size=gpus, device="cuda").world_size == gpus


def test_recipe_7_has_the_cards_parameters_and_eight_ranks_share_its_experts():
    recipe = load_recipe("moe_8x7b")
    assert recipe.model is not None
    assert recipe.model.num_parameters(recipe.moe) == 46_702_792_704
    assert recipe.model.active_parameters(recipe.moe) == 12_879_925_248
    layout = choose_layout(recipe, world_size=256, device="cuda")
    assert (layout.data, layout.expert, layout.distributed_optimizer) == (256, 8, True)


def test_recipe_2_has_a_layout_on_the_cards_128_gpus_with_context_parallelism():
    recipe = load_recipe("koshey_7b", overrides=["distributed.context_parallel=8"])
    layout = choose_layout(recipe, world_size=128, device="cuda")
    assert (layout.data, layout.global_batch, layout.num_microbatches) == (16, 16, 1)


def test_these_are_built_so_far():
    assert [name for name in NAMES if not rules.not_yet(load_recipe(name))] == NAMES


def test_the_laptop_scale_keeps_a_recipes_strategy_and_names():
    assert load_recipe("pretrain_7b", scale="laptop").distributed.strategy == "FSDP"
    curriculum = load_recipe("continual_7b", scale="laptop").curriculum
    assert curriculum is not None
    assert [(phase.name, phase.tokens) for phase in curriculum.phases] == [
        ("domain_1", 80_000),
        ("domain_2", 80_000),
        ("domain_3", 80_000),
    ]
    assert scales() == ["laptop"]


def test_the_schema_for_editors_is_up_to_date():
    def essence(schema: dict) -> dict:
        # Not the whole text: its spelling changes with pydantic's version.
        kept = ("description", "default", "minimum", "maximum", "exclusiveMinimum", "enum", "pattern")
        sections = {**schema["$defs"]}
        return {
            section: {
                key: {word: field[word] for word in kept if word in field} for key, field in body["properties"].items()
            }
            for section, body in sections.items()
        }

    committed = json.loads((RECIPES / "recipe.schema.json").read_text())
    assert essence(committed) == essence(json_schema()), (
        'Run: python -c "import json; from igla_mega.config.schema import json_schema; '
        'print(json.dumps(json_schema(), indent=2))" > igla_mega/recipes/recipe.schema.json'
    )
