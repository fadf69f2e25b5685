"""Llama-family folders of Hugging Face, Mixtral's too, to checkpoints and back: one table of names, a walk each way.

Both walks hold one tensor (import) or one shard (export) at a time, on the CPU, in one process.
"""

import importlib.util
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException

from igla_mega.checkpoint import load_model, store
from igla_mega.checkpoint.folder import TOKENIZER, read_recipe, tokenizer_of
from igla_mega.checkpoint.hf_config import config_of, is_mixtral, model_of, read_json
from igla_mega.checkpoint.hf_names import weights_of
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
from igla_mega.data.tokenizer import load_tokenizer
from igla_mega.model.build import drawn

Say = Callable[[str], None]


_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

GENERATION = "generation_config.json"
_CARRIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    GENERATION,
)


def import_folder(hf_dir: Path, checkpoint: Path, *, say: Say, upcycle: Moe | None = None) -> Recipe:
    """Turn a Hugging Face folder into a checkpoint, each weight in the type that it has there.

    Args:
        checkpoint: the folder to write; whole or not there at all.
        upcycle: make a mixture of experts of a dense model (Komatsuzaki et al. 2022, arXiv:2212.05055): each expert
            starts as its feed-forward network, and the routers as `train` draws them, so that it computes the same.

    Returns:
        The recipe beside it: the folder's name and its model.

    Raises:
        ConfigError: not a Llama-family folder of safetensors, or one with something missing; or `checkpoint` is taken.
        RuntimeError: it could not be written.
    """
    config = read_json(hf_dir / "config.json")
    model, moe = model_of(config, hf_dir / "config.json")
    if upcycle is not None and moe is not None:
        raise ConfigError(f"{hf_dir}: has {moe.num_experts} experts already.\n  Leave --upcycle out.")
    # A recipe must have a batch and a length; the default batch, in tokens, need not be whole sequences here.
    recipe = Recipe.model_validate(
        {
            "name": hf_dir.resolve().name,
            "model": model.model_dump(exclude_none=True),
            "training": {"batch_size": 1, "total_steps": 1},
            **({"moe": experts.model_dump(exclude_none=True)} if (experts := upcycle or moe) is not None else {}),
        }
    )
    rules.check(recipe)
    folder = open_folder(hf_dir)
    # Before anything is made for each layer that config.json claims.
    least = model.num_layers * (moe.num_experts if moe is not None else 1)
    if least > len(folder):
        raise ConfigError(
            f"{hf_dir}: config.json makes it {model.num_layers} layers"
            f"{f' of {moe.num_experts} experts' if moe is not None else ''}, but it holds {len(folder)} tensors.\n"
            "  Download the folder again."
        )
    weights = weights_of(model, moe)
    refuse_other_tensors(folder, weights, model, hf_dir)

    with appearing(checkpoint) as temporary:
        state = {w.native: lazy(w, folder) for w in weights}
        if upcycle is not None:
            state = _upcycled(state, model, upcycle, recipe.training.seed)
        # A file for each: torch 2.13's writer (filesystem.py:451) keeps the tensors of a file until it is whole.
        writer = dcp.FileSystemWriter(temporary, single_file_per_rank=False, sync_files=True)
        try:
            dcp.save(state, storage_writer=writer, no_dist=True)
        except CheckpointException as error:
            cause = next(iter(error.failures.values()), (error,))
            raise RuntimeError(f"{checkpoint}: could not be written: {cause[0]}") from error
        (temporary / "progress.json").write_text(json.dumps(asdict(Progress()), indent=1) + "\n")
        (temporary / "recipe.yaml").write_text(dump(recipe), encoding="utf-8")
        _carry(hf_dir, temporary / TOKENIZER)
        _keep_token_ids(config, temporary / TOKENIZER)
        store.write_manifest(temporary, {})
    types = type_names(folder[name].dtype for w in weights for name in w.parts)
    say(f"{checkpoint}: {model.num_parameters(recipe.moe):,} parameters, {types}")
    return recipe


def _upcycled(state: Mapping[str, Pieces], model: Model, moe: Moe, seed: int) -> dict[str, Pieces]:
    """The tensors of a mixture of experts, from those of a dense model."""
    made: dict[str, Pieces] = {}
    for name, pieces in state.items():
        layer, _, linear = name.partition(".mlp.")
        if not linear:
            made[name] = pieces
            continue
        [(offset, (size, read))] = pieces.pieces.items()
        for e in range(moe.num_experts):
            made[f"{layer}.mlp.experts.local_experts.{e}.{linear}"] = Pieces(size, pieces.dtype, [(offset, size, read)])
        router = f"{layer}.mlp.router.weight"
        if router not in made:
            shape = (moe.num_experts, model.hidden_size)
            draw = partial(drawn, router, shape, model.init_std, seed)
            made[router] = Pieces(shape, pieces.dtype, [((0, 0), shape, lambda d=draw, t=pieces.dtype: d().to(t))])
    return made


def export_folder(
    checkpoint: Path,
    hf_dir: Path,
    *,
    dtype: Literal["bfloat16", "float32"] | None = None,
    max_shard_bytes: int = 5 * 2**30,
    say: Say,
) -> None:
    """Turn a checkpoint into a folder that `transformers` (4 and 5) opens, as a LlamaForCausalLM or MixtralForCausalLM.

    Args:
        hf_dir: the folder to write; whole or not there at all.
        dtype: of the weights. None: as stored; for the fp32 masters of a training run, the type that it computed in.
        max_shard_bytes: a file is no larger, unless for a single tensor. About what the export holds in memory.

    Raises:
        ConfigError: the checkpoint is of another model than its recipe says, or `hf_dir` is taken.
    """
    recipe = read_recipe(checkpoint)
    model = recipe.model
    assert model is not None, "read_recipe refuses that"
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
            _write_json(temporary / "model.safetensors.index.json", index)
        tokens = _tokenizer_of(checkpoint, recipe, temporary, say)
        _write_json(
            temporary / "config.json",
            {**config_of(model, moe, str(types[weights[0].native]).removeprefix("torch.")), **tokens},
        )
    files = "1 file" if len(shards) == 1 else f"{len(shards)} files"
    say(f"{hf_dir}: {model.num_parameters(moe):,} parameters, {type_names(types.values())}, {files}")


@torch.no_grad()
def logit_difference(checkpoint: Path, hf_dir: Path, *, num_tokens: int = 32) -> float:
    """Largest absolute difference between the fp32 logits of a checkpoint and of its Hugging Face folder.

    The checkpoint's weights are first rounded to the folder's type, where that is narrower: what is compared is the
    two models, not their precision.

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
    assert recipe.model is not None, "load_single refuses that"
    folder = open_folder(hf_dir)
    params = dict(ours.named_parameters())
    # Of adapters that were merged the sum was rounded, which is a part of the difference.
    for weight in weights_of(recipe.model, recipe.moe) if recipe.lora is None else ():
        if not weight.parts.keys() <= folder.keys():
            continue  # an upcycled expert, in the dense model's type from the first
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
    """Whether `logit_difference` leaves room: both models in fp32 within 60% of the memory available."""
    recipe = read_recipe(checkpoint)
    assert recipe.model is not None, "read_recipe refuses that"
    return 2 * 4 * recipe.model.num_parameters(recipe.moe) <= 0.6 * psutil.virtual_memory().available


def _exported_type(native: str, wanted: str | None, stored: dict[str, torch.dtype], recipe: Recipe) -> torch.dtype:
    if wanted is not None:
        return getattr(torch, wanted)
    trained = any(name.startswith("optimizer.") for name in stored)
    return torch.bfloat16 if trained and recipe.distributed.precision != "FP32" else stored[native]


def _carry(source: Path, target: Path) -> None:
    """Copy the tokenizer's and the generation's files that there are."""
    target.mkdir(exist_ok=True)
    for name in _CARRIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _keep_token_ids(config: dict[str, Any], target: Path) -> None:
    """Keep the ids of the first and last token, of which a recipe knows nothing, where no file says them already."""
    ids = {key: config[key] for key in _TOKEN_IDS if config.get(key) is not None}
    if ids and not (target / GENERATION).exists():
        _write_json(target / GENERATION, ids)


def _tokenizer_of(checkpoint: Path, recipe: Recipe, hf_dir: Path, say: Say) -> dict[str, Any]:
    """Put the tokenizer and the generation's settings into the folder; returns the token ids for its `config.json`."""
    source = tokenizer_of(checkpoint, recipe)
    if source is None:
        say(f"{checkpoint}: its tokenizer ({recipe.data.tokenizer or 'none given'}) is not there; exported without one")
        return dict.fromkeys(_TOKEN_IDS)
    _carry(source if source.is_dir() else source.parent, hf_dir)
    if not (hf_dir / GENERATION).exists() and (hf_dir / "tokenizer.json").exists():
        end = load_tokenizer(hf_dir).eod_id
        _write_json(hf_dir / GENERATION, {"bos_token_id": end, "eos_token_id": end})
    settings = read_json(hf_dir / GENERATION) if (hf_dir / GENERATION).exists() else {}
    return {key: settings.get(key) for key in _TOKEN_IDS}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def print_logit_difference(checkpoint: Path, hf_dir: Path) -> None:
    """Compare the logits of a checkpoint and its Hugging Face folder if possible, and print the result."""
    if not fits_in_memory(checkpoint):
        print("logits not compared: both models together do not fit into memory")
    elif importlib.util.find_spec("transformers") is None:
        print("logits not compared: transformers is not installed (the extra `hf`)")
    else:
        difference = logit_difference(checkpoint, hf_dir)
        print(f"largest difference of the fp32 logits, this engine to transformers: {difference:.1e}")
