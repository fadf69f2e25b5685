"""Find a checkpoint folder from a path of the command line, and read what lies in it beside the tensors."""

from pathlib import Path

from igla_mega.checkpoint import integrity, remote, store
from igla_mega.checkpoint.pieces import Reader
from igla_mega.config.errors import ConfigError
from igla_mega.config.load import load_recipe
from igla_mega.config.schema import Recipe

TOKENIZER = "tokenizer"
"""Folder in an imported checkpoint with the tokenizer it came with."""


def resolve_checkpoint(path: Path) -> Path:
    """The step folder that a path on the command line means.

    Args:
        path: a step folder, or a run folder or its `checkpoints` folder, whose newest is meant; or the address of
            such a folder in an object store, which is copied once.

    Raises:
        ConfigError: there is none, or it is damaged.
    """
    if remote.is_address(path):
        return remote.copied(remote.address_of(path))
    if not path.is_dir():
        raise ConfigError(
            f"{path}: no such folder.\n  Give a checkpoint (step_00000100), or the run folder it lies in."
        )
    if not (path / store.MANIFEST).exists():
        path = _newest(path)
    if store.is_local(path):
        raise ConfigError(
            f"{path}: one rank's part of a checkpoint that a node keeps for itself, good for a resume alone.\n"
            "  Use one below the run's checkpoints folder."
        )
    integrity.verify(path)
    return path


def _newest(folder: Path) -> Path:
    for root in (folder / "checkpoints", folder):
        if steps := store.steps_in(root):
            return store.step_dir(root, steps[-1])
    if (folder / "config.json").is_file():
        raise ConfigError(
            f"{folder}: a Hugging Face folder, not a checkpoint.\n  Turn it into one: igla-mega import {folder} CKPT."
        )
    if any(folder.glob("**/.writing_*")) or (folder / "progress.json").is_file():
        raise ConfigError(f"{folder}: its checkpoint was never finished.\n  Use another, or train on to the next one.")
    raise ConfigError(
        f"{folder}: holds no checkpoint.\n  Give a checkpoint (step_00000100), or the run folder it lies in."
    )


def read_recipe(checkpoint: Path) -> Recipe:
    """The recipe that lies in a checkpoint; its `model` is always given."""
    recipe = load_recipe(checkpoint / "recipe.yaml")
    if recipe.model is None:
        raise ConfigError(f"{checkpoint / 'recipe.yaml'}: model: not given.\n  Use a checkpoint that `train` wrote.")
    if (checkpoint / ".metadata").is_file():
        _hold_to_tensors(recipe, checkpoint)
    return recipe


def _hold_to_tensors(recipe: Recipe, checkpoint: Path) -> None:
    """Refuse a recipe of more than the checkpoint holds, before anything is made as large as it says."""
    model = recipe.model
    assert model is not None, "the caller refuses that"
    shapes = {name: shape for name, shape in Reader(checkpoint).shapes().items() if not name.startswith("optimizer.")}
    held = sum(shape.numel() for shape in shapes.values())
    told = model.num_parameters(recipe.moe)
    # Twice: what is beyond that is no other way of counting.
    if model.num_layers > len(shapes) or (recipe.lora is None and told > 2 * held):
        raise ConfigError(
            f"{checkpoint}: its recipe.yaml makes it a model of {model.num_layers:,} layers and {told:,} parameters,"
            f" but it holds {len(shapes):,} tensors of {held:,} numbers.\n  Use another checkpoint."
        )


def tokenizer_of(checkpoint: Path, recipe: Recipe) -> Path | None:
    """Folder or file of the checkpoint's tokenizer: its own if it came with one, else the recipe's; None if gone."""
    candidates = [checkpoint / TOKENIZER, *([Path(recipe.data.tokenizer)] if recipe.data.tokenizer else [])]
    return next((path for path in candidates if path.exists()), None)
