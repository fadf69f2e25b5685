"""A checkpoint's model in one process: for `generate`, `eval` and the check of an export."""

from pathlib import Path

import torch

from igla_mega import host, parallel
from igla_mega.checkpoint import integrity, remote, store
from igla_mega.checkpoint.pieces import Reader
from igla_mega.config.errors import ConfigError
from igla_mega.config.load import load_recipe
from igla_mega.config.schema import Model, Recipe
from igla_mega.model.build import CausalLM, build_chunks, materialize, transformer_config
from igla_mega.model.shards import named_shards, shards_of
from igla_mega.plan.layout import Layout

DTYPES = {"BF16": torch.bfloat16, "FP32": torch.float32, "FP8": torch.bfloat16}
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


def base_of(checkpoint: Path) -> Path:
    """The checkpoint of the base that a checkpoint of adapters belongs to.

    Raises:
        ConfigError: it is not where it was, or other weights lie there.
    """
    from igla_mega.checkpoint import adapters  # which exports through this module

    note = adapters.read_base(checkpoint)
    if note is None:
        raise ConfigError(f"{checkpoint}: does not say which base its adapters belong to ({adapters.BASE} is missing).")
    base = Path(note["checkpoint"])
    if not (base / store.MANIFEST).is_file():
        raise ConfigError(
            f"{checkpoint / adapters.BASE}: checkpoint: {base} is not there.\n  Put it back, or write where it is."
        )
    if (found := adapters.digest_of_checkpoint(base)) != note["digest"]:
        raise ConfigError(
            f"{base}: not the base of these adapters: its digest is {found}, theirs has {note['digest']}.\n"
            f"  Write in {checkpoint / adapters.BASE} where theirs is."
        )
    return base


def load_single(checkpoint: Path, *, dtype: torch.dtype = torch.float32) -> tuple[CausalLM, Recipe]:
    """Build the whole model of a checkpoint in this process, in evaluation mode, on CUDA where there is one.

    Of adapters, with their base, which is coded in 4 bits where it was in training.

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
    layout = alone(model)
    mesh = parallel.alone(layout, device, recipe.training.seed)
    config = transformer_config(model, layout, dtype=dtype, device=device, moe=recipe.moe)
    chunks = build_chunks(config, model, moe=recipe.moe)
    if recipe.lora is None:
        materialize(chunks, device)
        shards = shards_of(chunks, mesh, model.vocab_size)
        store.load_weights(checkpoint, named_shards([*chunks], shards), group=None)
        return chunks[0].eval(), recipe
    from igla_mega.checkpoint import tuned  # which exports through this module

    base, coded_from = base_of(checkpoint), DTYPES[recipe.distributed.precision]
    tuned.attach(chunks, recipe.lora, recipe.quantization, base, mesh, model.vocab_size, coded_from)
    materialize(chunks, device)
    shards = shards_of(chunks, mesh, model.vocab_size)
    store.load_weights(base, tuned.frozen(chunks, shards), None, partly=True)
    store.load_weights(checkpoint, tuned.trained(chunks, shards), None, partly=True)
    return chunks[0].eval(), recipe


def alone(model: Model) -> Layout:
    """The layout of a process that runs a whole model by itself, a sequence at a time."""
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
