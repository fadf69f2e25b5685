"""Shape of the base model for the plan: read if the model exists, else assumed with a note."""

from pathlib import Path
from typing import Any

from igla_mega.checkpoint.hf_config import model_of, read_json
from igla_mega.checkpoint.integrity import MANIFEST
from igla_mega.config import yaml_text
from igla_mega.config.errors import ConfigError
from igla_mega.config.features import Moe
from igla_mega.config.load import base_folder, load_recipe
from igla_mega.config.schema import Model, Recipe

ASSUMED_RECIPE, ASSUMED_MIXTURE = "pretrain_7b", "moe_8x7b"
"""Packaged recipes whose shape is assumed for a missing base model; the second for a recipe that names experts."""
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
        return recipe.with_keys({"model": model, "moe": experts_of(moe, recipe.moe, folder)}), []
    assumed = ASSUMED_MIXTURE if _names_experts(recipe) else ASSUMED_RECIPE
    like = load_recipe(assumed, scale=scale)
    moe = recipe.moe or like.moe
    assert like.model is not None
    notes = [
        f"base_model: {recipe.base_model} not found (--models gives the folder of models); it is assumed to have the "
        f"shape of {assumed}, {like.model.num_parameters(moe) / 1e9:.3g}B parameters."
    ]
    changes: dict[str, Any] = {"model": like.model, "moe": moe}
    tuned = recipe.lora is not None or recipe.sft is not None or recipe.dpo is not None
    if tuned and recipe.sequence_length is None:
        changes["training.sequence_length"] = ASSUMED_ROW
        notes.append(
            f"training.sequence_length: not given; rows of {ASSUMED_ROW:,} tokens are assumed (`train` uses the "
            "maximum of the base model)."
        )
    return recipe.with_keys(changes), notes


def experts_of(base: Moe | None, wanted: Moe | None, folder: Path) -> Moe | None:
    """Return the `moe` section that a run trains with: the recipe's if it fits the base model, else the base's.

    Args:
        base: experts of the base model.
        wanted: the recipe's section.
        folder: the base model, for the error.

    Raises:
        ConfigError: the base model is dense, or its experts differ from the recipe's.
    """
    if wanted is None:
        return base
    if base is None:
        raise ConfigError(
            f"base_model: {folder} is a dense model, but the recipe has {wanted.num_experts} experts a layer.\n"
            f"  Make it a mixture: igla-mega import HF_FOLDER CKPT --upcycle {wanted.num_experts}, and name "
            "CKPT; or set moe=null."
        )
    breaches = []
    for key in ("num_experts", "shared_intermediate_size", "pre_softmax", "scaling_factor"):
        if (value := getattr(wanted, key)) != (has := getattr(base, key)):
            breaches.append(f"moe.{key}: is {value}, but {folder} has {has}. Set it to {has}.")
    if (wanted.bias_update_rate > 0) != (base.bias_update_rate > 0):
        rate, has = wanted.bias_update_rate, "no biases" if base.bias_update_rate == 0 else "biases"
        breaches.append(f"moe.bias_update_rate: is {rate:g}, but {folder} has {has}. Set it as the base model needs.")
    if breaches:
        raise ConfigError(*breaches)
    return wanted


def _names_experts(recipe: Recipe) -> bool:
    """Return True if a recipe has settings that only a mixture of experts can use."""
    where = recipe.distributed
    split = where.expert_parallel not in ("auto", 1) or where.expert_tensor_parallel > 1
    return recipe.moe is not None or split or recipe.training.expert_capacity_factor is not None


def _shape(folder: Path) -> tuple[Model, Moe | None]:
    """Return the shape of a Hugging Face model or a checkpoint, and its experts.

    Raises:
        ConfigError: its configuration cannot be read, or is of a model that cannot be imported.
    """
    if not (folder / MANIFEST).is_file():
        # A shape without a type, which an import refuses, is planned as a Llama's.
        return model_of({"model_type": "llama", **read_json(folder / "config.json")}, folder / "config.json")
    try:
        content = yaml_text.read_mapping(folder / "recipe.yaml")
        experts = content.get("moe")
        return Model(**content["model"]), Moe(**experts) if experts is not None else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"base_model: {folder} has no readable model shape ({error}).") from None
