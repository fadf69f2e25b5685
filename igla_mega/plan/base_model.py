"""What a recipe leaves to its base model, for the plan: read where the model is there, else assumed and said."""

from pathlib import Path
from typing import Any

from igla_mega.checkpoint.hf_config import SIZES
from igla_mega.config import json_text, yaml_text
from igla_mega.config.errors import ConfigError
from igla_mega.config.load import base_folder, load_recipe
from igla_mega.config.schema import Model, Recipe

ASSUMED_RECIPE = "pretrain_7b"
ASSUMED_ROW = 2048
"""Tokens of a row of fine-tuning whose recipe names none, while its base is not there to tell its longest."""


def with_base(recipe: Recipe, models: Path | None, scale: str | None = None) -> tuple[Recipe, list[str]]:
    """Return the recipe with the shape of its base model, and what was assumed of it.

    Args:
        models: folder below which it is looked for.
        scale: at which a base that is missing would be made.

    Raises:
        ConfigError: the base model is there and cannot be read.
    """
    if recipe.model is not None or recipe.base_model is None:
        return recipe, []
    try:
        folder: Path | None = base_folder(recipe.base_model, models)
    except ConfigError:
        folder = None
    if folder is not None:
        return recipe.model_copy(update={"model": _shape(folder)}), []
    model = load_recipe(ASSUMED_RECIPE, scale=scale).model
    assert model is not None
    notes = [
        f"base_model: {recipe.base_model} is not here (--models names a folder of models); it is taken to have the "
        f"shape of {ASSUMED_RECIPE}, {model.num_parameters() / 1e9:.3g}B parameters."
    ]
    changes: dict[str, Any] = {"model": model}
    tuned = recipe.lora is not None or recipe.sft is not None or recipe.dpo is not None
    if tuned and recipe.sequence_length is None:
        changes["training"] = recipe.training.model_copy(update={"sequence_length": ASSUMED_ROW})
        notes.append(
            f"training.sequence_length: not given; rows of {ASSUMED_ROW:,} tokens are assumed (`train` takes the base "
            "model's longest)."
        )
    return recipe.model_copy(update=changes), notes


def _shape(folder: Path) -> Model:
    config = folder / "config.json"
    try:
        if config.is_file():
            content = json_text.loads(config.read_text())
            return Model(**{ours: content[theirs] for theirs, ours in SIZES.items() if content.get(theirs)})
        content = yaml_text.read_mapping(folder / "recipe.yaml")
        return Model(**content["model"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"base_model: {folder} does not say its shape ({error}).") from None
