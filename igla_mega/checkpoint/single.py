"""A checkpoint's model in one process: for `generate`, `eval` and the check of an export."""

from pathlib import Path

import torch

from igla_mega import host, parallel
from igla_mega.checkpoint import store
from igla_mega.config.errors import ConfigError
from igla_mega.config.load import load_recipe
from igla_mega.config.schema import Model, Recipe
from igla_mega.model.build import CausalLM, build_chunks, materialize, transformer_config
from igla_mega.model.shards import named_shards, shards_of
from igla_mega.plan.layout import Layout

TOKENIZER = "tokenizer"
"""Folder in an imported checkpoint with the tokenizer it came with."""


def resolve_checkpoint(path: Path) -> Path:
    """The step folder that a path on the command line means.

    Args:
        path: a step folder, or a run folder or its `checkpoints` folder, whose newest is meant.

    Raises:
        ConfigError: there is none, or it is damaged.
    """
    if not path.is_dir():
        raise ConfigError(
            f"{path}: no such folder.\n  Give a checkpoint (step_00000100), or the run folder it lies in."
        )
    if not (path / store.MANIFEST).exists():
        path = _newest(path)
    reason = store.damage(path)
    if reason is not None:
        raise ConfigError(f"{reason}.\n  Use another checkpoint, or restore this one from a backup.")
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
    return recipe


def tokenizer_of(checkpoint: Path, recipe: Recipe) -> Path | None:
    """Folder or file of the checkpoint's tokenizer: its own if it came with one, else the recipe's; None if gone."""
    candidates = [checkpoint / TOKENIZER, *([Path(recipe.data.tokenizer)] if recipe.data.tokenizer else [])]
    return next((path for path in candidates if path.exists()), None)


def load_single(checkpoint: Path, *, dtype: torch.dtype = torch.float32) -> tuple[CausalLM, Recipe]:
    """Build the whole model of a checkpoint in this process, in evaluation mode, on CUDA where there is one.

    Joins process groups of this process alone unless they were joined before; `parallel.stop` leaves them.

    Args:
        dtype: of the weights as the modules see them.

    Raises:
        ConfigError: not a checkpoint, or one of another model than its recipe says.
    """
    recipe = read_recipe(checkpoint)
    model = recipe.model
    assert model is not None, "read_recipe refuses that"
    device = host.prepare()
    layout = _alone(model)
    mesh = parallel.alone(layout, device, recipe.training.seed)
    config = transformer_config(model, layout, dtype=dtype, device=device)
    chunks = build_chunks(config, model)
    materialize(chunks, device)
    shards = shards_of(chunks, mesh, model.vocab_size)
    store.load_weights(checkpoint, named_shards([*chunks], shards), group=None)
    return chunks[0].eval(), recipe


def _alone(model: Model) -> Layout:
    return Layout(
        tensor=1,
        pipeline=1,
        virtual_pipeline=1,
        context=1,
        expert=1,
        data=1,
        sequence_parallel=False,
        strategy="DDP",
        distributed_optimizer=False,
        micro_batch_size=1,
        num_microbatches=1,
        global_batch=1,
        sequence_length=model.max_position,
    )
