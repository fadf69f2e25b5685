"""Shape of the base model for the plan: read if the model exists, else assumed with a note."""

from pathlib import Path
from typing import Any

from igla_mega.checkpoint.hf_config import SIZES, model_of
from igla_mega.config import json_text, yaml_text
from igla_mega.config.errors import ConfigError
from igla_mega.config.features import Moe
from igla_mega.config.load import base_folder, load_recipe
from igla_mega.config.schema import Model, Recipe

ASSUMED_RECIPE = "pretrain_7b"
"""Packaged recipe whose shape is assumed for a missing base model."""
ASSUMED_ROW = 2048
"""Assumed tokens per row of fine-tuning, if neither the recipe nor an existing base model gives a length."""


def with_base(recipe: Recipe, models: Path | None, scale: str | None = None) -> tuple[Recipe, list[str]]:
    """Return the recipe with the shape of its base model, and notes on the assumptions.

    Args:
        models: folder with base models.
        scale: scale of the packaged recipe whose shape is assumed for a missing base model.

    Raises:
        ConfigError: the base model exists but cannot be read.
    """
    if recipe.model is not None or recipe.base_model is None:
        return recipe, []
    try:
        folder: Path | None = base_folder(recipe.base_model, models)
    except ConfigError:
        folder = None
    if folder is not None:
        model, moe = _shape(folder)
        return recipe.with_keys({"model": model, "moe": recipe.moe or moe}), []
    assumed = load_recipe(ASSUMED_RECIPE, scale=scale).model
    assert assumed is not None
    notes = [
        f"base_model: {recipe.base_model} not found (--models gives the folder of models); it is assumed to have the "
        f"shape of {ASSUMED_RECIPE}, {assumed.num_parameters() / 1e9:.3g}B parameters."
    ]
    changes: dict[str, Any] = {"model": assumed}
    tuned = recipe.lora is not None or recipe.sft is not None or recipe.dpo is not None
    if tuned and recipe.sequence_length is None:
        changes["training.sequence_length"] = ASSUMED_ROW
        notes.append(
            f"training.sequence_length: not given; rows of {ASSUMED_ROW:,} tokens are assumed (`train` uses the "
            "maximum of the base model)."
        )
    return recipe.with_keys(changes), notes


def _shape(folder: Path) -> tuple[Model, Moe | None]:
    """Return the shape of a Hugging Face model or a checkpoint, and its experts.

    Raises:
        ConfigError: its configuration cannot be read.
    """
    config = folder / "config.json"
    try:
        if config.is_file():
            content = json_text.read(config)
            try:
                return model_of(content, config)
            except ConfigError:  # a model that cannot be imported can still be planned by its sizes
                return Model(**{ours: content[theirs] for theirs, ours in SIZES.items() if content.get(theirs)}), None
        content = yaml_text.read_mapping(folder / "recipe.yaml")
        return Model(**content["model"]), Moe(**content["moe"]) if content.get("moe") else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"base_model: {folder} has no readable model shape ({error}).") from None
