"""Convert Hugging Face folders of the Llama family, Mixtral included, to checkpoints and back.

Both directions use the table in `hf_names`, run on the CPU in one process, and hold one tensor (import) or one file
(export) in memory at a time.
"""

import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

import psutil
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from igla_mega.checkpoint import load_model, store
from igla_mega.checkpoint.folder import TOKENIZER, read_recipe
from igla_mega.checkpoint.hf_config import config_of, is_mixtral, model_of, read_json
from igla_mega.checkpoint.hf_names import weights_of
from igla_mega.checkpoint.hf_tokenizer import carry, export_tokenizer, keep_token_ids, write_json
from igla_mega.checkpoint.pieces import Pieces, Reader
from igla_mega.checkpoint.progress import Progress
from igla_mega.checkpoint.safetensors import (
    appearing,
    common_type,
    lazy,
    open_folder,
    read_split,
    refuse_other_tensors,
    split_into_files,
    stored_types,
    type_names,
)
from igla_mega.config import rules
from igla_mega.config.errors import ConfigError
from igla_mega.config.features import Moe
from igla_mega.config.load import dump
from igla_mega.config.schema import Model, Recipe
from igla_mega.model.build import drawn

Say = Callable[[str], None]
"""Function that shows one line to the user."""


def import_folder(hf_dir: Path, checkpoint: Path, *, say: Say, upcycle: Moe | None = None) -> Recipe:
    """Convert a Hugging Face folder to a checkpoint; each weight keeps its type.

    Args:
        checkpoint: folder to write, completely or not at all.
        upcycle: convert a dense model to this mixture of experts (Komatsuzaki et al. 2022, arXiv:2212.05055). Each
            expert starts as a copy of the feed-forward network, so the model computes the same as before; the routers
            start as in `train`.

    Returns:
        The recipe written into the checkpoint: the folder's name and its model.

    Raises:
        ConfigError: not a complete Llama-family folder of safetensors, or `checkpoint` exists and is not empty.
        RuntimeError: the checkpoint could not be written.
    """
    config = read_json(hf_dir / "config.json")
    model, moe = model_of(config, hf_dir / "config.json")
    if upcycle is not None and moe is not None:
        raise ConfigError(f"{hf_dir}: has {moe.num_experts} experts already.\n  Omit --upcycle.")
    recipe = _recipe_of(hf_dir, model, upcycle or moe)
    folder = open_folder(hf_dir)
    # Before the list of weights is made: config.json may come from anyone and name any number of layers.
    min_tensors = model.num_layers * (moe.num_experts if moe is not None else 1)
    if min_tensors > len(folder):
        raise ConfigError(
            f"{hf_dir}: config.json gives {model.num_layers} layers"
            f"{f' of {moe.num_experts} experts' if moe is not None else ''}, but the folder holds {len(folder)} "
            "tensors.\n"
            "  Download the folder again."
        )
    weights = weights_of(model, moe)
    refuse_other_tensors(folder, weights, model, hf_dir)

    with appearing(checkpoint) as temporary:
        state = {w.native: lazy(w, folder) for w in weights}
        if upcycle is not None:
            state = _upcycled(state, model, upcycle, recipe.training.seed)
        # One file per tensor: torch 2.13's writer (filesystem.py:451) keeps the tensors of a file in memory until the
        # file is complete.
        writer = dcp.FileSystemWriter(temporary, single_file_per_rank=False, sync_files=True)
        dcp.save(state, storage_writer=writer, no_dist=True)
        (temporary / "progress.json").write_text(json.dumps(asdict(Progress()), indent=1) + "\n")
        (temporary / "recipe.yaml").write_text(dump(recipe), encoding="utf-8")
        carry(hf_dir, temporary / TOKENIZER)
        keep_token_ids(config, temporary / TOKENIZER)
        store.write_manifest(temporary, {})
    types = type_names(folder[name].dtype for w in weights for name in w.parts)
    say(f"{checkpoint}: {model.num_parameters(recipe.moe):,} parameters, {types}")
    return recipe


def _recipe_of(hf_dir: Path, model: Model, moe: Moe | None) -> Recipe:
    """Return the recipe of an imported model, checked."""
    # A recipe must have a batch and a length. The default batch, in tokens, may not be whole sequences of this model.
    recipe = Recipe.model_validate(
        {
            "name": hf_dir.resolve().name,
            "model": model.model_dump(exclude_none=True),
            "training": {"batch_size": 1, "total_steps": 1},
            **({"moe": moe.model_dump(exclude_none=True)} if moe is not None else {}),
        }
    )
    rules.check(recipe)
    return recipe


def _upcycled(state: Mapping[str, Pieces], model: Model, moe: Moe, seed: int) -> dict[str, Pieces]:
    """Return the tensors of a mixture of experts, from those of a dense model."""
    tensors: dict[str, Pieces] = {}
    for name, pieces in state.items():
        layer, _, linear = name.partition(".mlp.")
        if not linear:
            tensors[name] = pieces
            continue
        # The same function for every expert: the file is read again for each, and one copy is in memory at a time.
        [(offset, (size, read))] = pieces.pieces.items()
        for e in range(moe.num_experts):
            expert = f"{layer}.mlp.experts.local_experts.{e}.{linear}"
            tensors[expert] = Pieces(size, pieces.dtype, [(offset, size, read)])
        router = f"{layer}.mlp.router.weight"
        if router not in tensors:
            shape = (moe.num_experts, model.hidden_size)
            draw = partial(drawn, router, shape, model.init_std, seed)
            tensors[router] = Pieces(shape, pieces.dtype, [((0, 0), shape, lambda d=draw, t=pieces.dtype: d().to(t))])
    return tensors


def export_folder(
    checkpoint: Path,
    hf_dir: Path,
    *,
    dtype: Literal["bfloat16", "float32"] | None = None,
    max_shard_bytes: int = 5 * 2**30,
    tuned: Path | None = None,
    say: Say,
) -> None:
    """Convert a checkpoint to a folder for LlamaForCausalLM or MixtralForCausalLM of `transformers` 4 and 5.

    Args:
        hf_dir: folder to write, completely or not at all.
        dtype: type of the weights. None: the stored type, or for the fp32 masters of a training run the type that it
            computed in.
        max_shard_bytes: maximum size of a file, unless it holds a single tensor. The export needs about as much memory.

        tuned: checkpoint of the adapters that `checkpoint` contains merged; its run decides on tokenizer and template.

    Raises:
        ConfigError: the checkpoint does not match its recipe, or `hf_dir` exists and is not empty.
    """
    recipe = read_recipe(checkpoint)
    model = recipe.model
    assert model is not None, "read_recipe rejects that"
    moe = recipe.moe
    is_mixtral(moe, checkpoint)
    weights, reader = weights_of(model, moe), Reader(checkpoint)
    stored = stored_types(reader, weights, checkpoint)
    types = {w.native: _exported_type(w.native, dtype, stored, recipe) for w in weights}
    sizes = {
        name: torch.Size(shape).numel() * types[w.native].itemsize for w in weights for name, shape in w.parts.items()
    }
    shards = split_into_files(sizes, max_shard_bytes)
    with appearing(hf_dir) as temporary:
        tensors = read_split(reader, weights, stored, types, moe.scaling_factor if moe is not None else 1.0)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(shards, 1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
            save_file(dict(islice(tensors, len(names))), temporary / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(names, file)
        if len(shards) > 1:
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
            write_json(temporary / "model.safetensors.index.json", index)
        own = tuned or checkpoint
        tokens = export_tokenizer(own, read_recipe(own), temporary, say)
        write_json(
            temporary / "config.json",
            {**config_of(model, moe, str(types[weights[0].native]).removeprefix("torch.")), **tokens},
        )
    files = "1 file" if len(shards) == 1 else f"{len(shards)} files"
    say(f"{hf_dir}: {model.num_parameters(moe):,} parameters, {type_names(types.values())}, {files}")


@torch.no_grad()
def logit_difference(checkpoint: Path, hf_dir: Path, *, num_tokens: int = 32) -> float:
    """Return the largest absolute difference between the fp32 logits of a checkpoint and of its Hugging Face folder.

    The checkpoint's weights are first rounded to the folder's type if that is narrower, so that the difference is one
    of the two models and not of their precision.

    Args:
        num_tokens: length of the random sequence on which the logits are compared.

    Raises:
        ConfigError: `transformers` is not installed.
    """
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError:
        raise ConfigError(
            "transformers is not installed, so the logits cannot be compared.\n  pip install 'igla-mega[hf]'"
        ) from None
    logging.disable_progress_bar()
    ours, recipe = load_model.load_model(checkpoint, dtype=torch.float32)
    assert recipe.model is not None, "load_model rejects that"
    folder = open_folder(hf_dir)
    params = dict(ours.named_parameters())
    # Not for merged adapters: the export rounds the sum of base and adapter, and here they are separate, so the
    # rounding remains a part of the difference.
    for weight in weights_of(recipe.model, recipe.moe) if recipe.lora is None else ():
        if not weight.parts.keys() <= folder.keys():
            continue  # an upcycled expert: the folder is the dense model, whose type the expert has already
        dtype = common_type(folder[name].dtype for name in weight.parts)
        params[weight.native].copy_(params[weight.native].to(dtype))
    device = next(ours.parameters()).device
    safe = {"trust_remote_code": False, "use_safetensors": True, "local_files_only": True}
    theirs = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32, **safe).to(device).eval()
    length = min(num_tokens, recipe.model.max_position)
    generator = torch.Generator().manual_seed(recipe.training.seed)
    tokens = torch.randint(0, recipe.model.vocab_size, (1, length), generator=generator).to(device)
    positions = torch.arange(length, device=device)[None]
    difference = ours(tokens, positions, None) - theirs(tokens).logits
    return difference.abs().max().item()


def fits_in_memory(checkpoint: Path) -> bool:
    """Return True if both models of `logit_difference`, in fp32, take at most 60% of the available memory."""
    recipe = read_recipe(checkpoint)
    assert recipe.model is not None, "read_recipe rejects that"
    return 2 * 4 * recipe.model.num_parameters(recipe.moe) <= 0.6 * psutil.virtual_memory().available


def _exported_type(native: str, requested: str | None, stored: dict[str, torch.dtype], recipe: Recipe) -> torch.dtype:
    """Return the type in which a parameter is exported."""
    if requested is not None:
        return getattr(torch, requested)
    # A checkpoint with optimizer state is one of a training run, whose fp32 masters the model computed with as bf16.
    trained = any(name.startswith("optimizer.") for name in stored)
    return torch.bfloat16 if trained and recipe.distributed.precision != "FP32" else stored[native]


def print_logit_difference(checkpoint: Path, hf_dir: Path) -> None:
    """Compare the logits of a checkpoint and its Hugging Face folder if possible, and print the result."""
    if not fits_in_memory(checkpoint):
        print("logits not compared: both models together do not fit into memory")
    elif importlib.util.find_spec("transformers") is None:
        print("logits not compared: transformers is not installed (the extra `hf`)")
    else:
        difference = logit_difference(checkpoint, hf_dir)
        print(f"largest difference of the fp32 logits, this engine to transformers: {difference:.1e}")
