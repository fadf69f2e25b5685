"""Find the checkpoint that a path of the command line refers to, and read its recipe and tokenizer."""

import sys
from pathlib import Path

from igla_mega.checkpoint import integrity, remote, store
from igla_mega.checkpoint.pieces import Reader
from igla_mega.config import json_text
from igla_mega.config.errors import ConfigError
from igla_mega.config.load import load_recipe
from igla_mega.config.schema import Recipe
from igla_mega.data.begin import AddBos

DATA = "data.json"
"""File of a checkpoint: source -> fingerprint of its prepared data, and the entries of the three names below."""
BOS, TOKENIZER_DIGEST, REFERENCE = ".add_bos", ".tokenizer", ".reference"
"""Names of `DATA` that no source can have: the rule `always` or `never`, the sha256 of the tokenizer's files, and the
digest of the base that is the reference of preference optimization."""
TOKENIZER = "tokenizer"
"""Folder with the tokenizer of an imported model, in its checkpoint."""


def resolve_checkpoint(path: Path) -> Path:
    """Return the step folder that a path on the command line refers to.

    Args:
        path: a step folder; or a run folder or its `checkpoints` folder, for the newest checkpoint in it; or the
            address of such a folder in an object store, which is copied once.

    Raises:
        ConfigError: there is no checkpoint, or it is damaged.
    """
    if remote.is_address(path):
        return remote.copied(remote.address_of(path))
    if not path.is_dir():
        raise ConfigError(
            f"{path}: no such folder.\n  Give a checkpoint (step_00000100), or the run folder that contains it."
        )
    if not (path / store.MANIFEST).exists():
        path = _newest(path)
    if store.is_local(path):
        raise ConfigError(
            f"{path}: one rank's part of a checkpoint on a node's own disk, which only a resume of its run can read.\n"
            "  Use a checkpoint below the run's checkpoints folder."
        )
    integrity.verify(path)
    return path


def _newest(folder: Path) -> Path:
    """Return the newest checkpoint of a run folder or of a folder of checkpoints; an error names what is there."""
    for root in (folder / "checkpoints", folder):
        if steps := store.steps_in(root):
            for _, reason in (one for one in integrity.passed_over(root) if one[0] > steps[-1]):
                print(f"{reason}.", file=sys.stderr)
            return store.step_dir(root, steps[-1])
    if (folder / "config.json").is_file():
        raise ConfigError(
            f"{folder}: a Hugging Face folder, not a checkpoint.\n  Convert it: igla-mega import {folder} CKPT."
        )
    if any(folder.glob("**/.writing_*")) or (folder / "progress.json").is_file():
        raise ConfigError(
            f"{folder}: contains only an unfinished checkpoint.\n"
            "  Use another folder, or continue training until the next checkpoint."
        )
    raise ConfigError(
        f"{folder}: holds no checkpoint.\n  Give a checkpoint (step_00000100), or the run folder that contains it."
    )


def read_recipe(checkpoint: Path) -> Recipe:
    """Return the recipe stored in a checkpoint; its `model` section is always set.

    Raises:
        ConfigError: the recipe is invalid, or describes a model that the checkpoint cannot hold.
    """
    recipe = load_recipe(checkpoint / "recipe.yaml")
    if recipe.model is None:
        raise ConfigError(f"{checkpoint / 'recipe.yaml'}: model: not given.\n  Use a checkpoint that `train` wrote.")
    if (checkpoint / ".metadata").is_file():
        _check_against_tensors(recipe, checkpoint)
    return recipe


def _check_against_tensors(recipe: Recipe, checkpoint: Path) -> None:
    """Reject a recipe of a larger model than the checkpoint holds.

    A checkpoint may come from elsewhere: without this check a short text file could make the process allocate any
    amount of memory before the first tensor is read.
    """
    model = recipe.model
    assert model is not None, "the caller rejects that"
    shapes = {name: shape for name, shape in Reader(checkpoint).shapes().items() if not name.startswith("optimizer.")}
    stored = sum(shape.numel() for shape in shapes.values())
    expected = model.num_parameters(recipe.moe)
    # A factor of 2 allows for tied embeddings and padding; `load_weights` compares the shapes exactly.
    if model.num_layers > len(shapes) or (recipe.lora is None and expected > 2 * stored):
        raise ConfigError(
            f"{checkpoint}: its recipe.yaml gives a model of {model.num_layers:,} layers and {expected:,} parameters,"
            f" but it holds {len(shapes):,} tensors of {stored:,} numbers.\n  Use another checkpoint."
        )


def tokenizer_of(checkpoint: Path, recipe: Recipe) -> Path | None:
    """Return a checkpoint's tokenizer (folder or file): the stored one, else the recipe's; None if neither exists."""
    candidates = [checkpoint / TOKENIZER, *([Path(recipe.data.tokenizer)] if recipe.data.tokenizer else [])]
    return next((path for path in candidates if path.exists()), None)


def data_of(checkpoint: Path) -> dict[str, str]:
    """Return what a checkpoint records of its data; empty for an imported one, and before version 0.2.

    Raises:
        ConfigError: the record is damaged.
    """
    file = checkpoint / DATA
    try:
        record = json_text.read(file) if file.is_file() else {}
        return {str(name): str(value) for name, value in record.items()}
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"{file}: not a JSON object ({error}).\n  Use another checkpoint.") from None


def bos_rule_of(checkpoint: Path, recipe: Recipe) -> AddBos:
    """Return the rule for begin-of-text tokens of a checkpoint's texts: that of the data it was trained on, if known.

    Args:
        recipe: the one stored in the checkpoint.
    """
    if not (checkpoint / DATA).is_file() and recipe.data.sources and recipe.data.add_bos == "auto":
        return "never"  # a run before version 0.2, whose data had none
    rule = data_of(checkpoint).get(BOS)
    return rule if rule in ("always", "never") else recipe.data.add_bos  # type: ignore[return-value]
