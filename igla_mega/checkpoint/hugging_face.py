"""Llama-family folders of Hugging Face, Mixtral's too, to checkpoints and back: one table of names, a walk each way.

Both walks hold one tensor (import) or one shard (export) at a time, on the CPU, in one process.
"""

import contextlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
import torch.distributed.checkpoint as dcp
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from igla_mega.checkpoint import single, store
from igla_mega.checkpoint.pieces import Pieces, Reader, load
from igla_mega.config import json_text, rules
from igla_mega.config.errors import ConfigError
from igla_mega.config.features import Moe
from igla_mega.config.load import dump
from igla_mega.config.schema import Model, Recipe
from igla_mega.data.tokenizer import load_tokenizer
from igla_mega.model.build import drawn
from igla_mega.model.shards import is_expert
from igla_mega.plan import base_model

Say = Callable[[str], None]

# Ours, and what it is made of there. Rows and columns: h hidden, q query heads * head size, k the same of key and
# value heads, f feed-forward, v vocabulary, e experts. In linear_qkv the rows of each key-value group lie together.
_LAYER = (
    ("input_layernorm.weight", (("input_layernorm.weight", "h"),)),
    (
        "self_attention.linear_qkv.weight",
        (("self_attn.q_proj.weight", "qh"), ("self_attn.k_proj.weight", "kh"), ("self_attn.v_proj.weight", "kh")),
    ),
    ("self_attention.linear_proj.weight", (("self_attn.o_proj.weight", "hq"),)),
    ("pre_mlp_layernorm.weight", (("post_attention_layernorm.weight", "h"),)),
)
_DENSE = (
    ("mlp.linear_fc1.weight", (("mlp.gate_proj.weight", "fh"), ("mlp.up_proj.weight", "fh"))),
    ("mlp.linear_fc2.weight", (("mlp.down_proj.weight", "hf"),)),
)
_ROUTER = ("mlp.router.weight", (("block_sparse_moe.gate.weight", "eh"),))
_EXPERT = (
    ("linear_fc1.weight", (("w1.weight", "fh"), ("w3.weight", "fh"))),
    ("linear_fc2.weight", (("w2.weight", "hf"),)),
)
# transformers' Mixtral has none of these: they stay here.
_SHARED = (
    (
        "mlp.shared_experts.linear_fc1.weight",
        (("mlp.shared.gate_proj.weight", "sh"), ("mlp.shared.up_proj.weight", "sh")),
    ),
    ("mlp.shared_experts.linear_fc2.weight", (("mlp.shared.down_proj.weight", "hs"),)),
)
_BIAS = ("mlp.router.expert_bias", (("mlp.router.expert_bias", "e"),))
_EMBEDDING = ("embedding.word_embeddings.weight", (("model.embed_tokens.weight", "vh"),))
_FINAL_NORM = ("decoder.final_layernorm.weight", (("model.norm.weight", "h"),))
_OUTPUT = ("output_layer.weight", (("lm_head.weight", "vh"),))

_SIZES = {**base_model.SIZES, "rms_norm_eps": "norm_epsilon", "initializer_range": "init_std"}
_EXPERTS = {
    "num_local_experts": "num_experts",
    "num_experts_per_tok": "num_experts_per_tok",
    "router_aux_loss_coef": "router_aux_loss_coef",
}
_REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
# What transformers takes where `config.json` is silent.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
    "mistral": {
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "mixtral": {
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 8,
        "rope_theta": 1e6,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.001,
    },
}
_ROPE_SCALING = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_max_position",
}
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

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


@dataclass(frozen=True)
class Weight:
    """One parameter of ours and the tensors that it is made of in a Hugging Face folder."""

    native: str
    parts: dict[str, tuple[int, ...]]
    """Their names and shapes, in the order in which their rows are stacked."""
    groups: int
    """The rows are stacked group by group: each part gives 1 / groups of its rows, in turn."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter."""
        shapes = list(self.parts.values())
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def fuse(self, tensors: Iterable[Tensor]) -> Tensor:
        """The parameter from its parts."""
        return torch.cat([t.unflatten(0, (self.groups, -1)) for t in tensors], dim=1).flatten(0, 1)

    def split(self, whole: Tensor) -> Iterator[Tensor]:
        """The parts of the parameter, each with memory of its own."""
        rows = [shape[0] // self.groups for shape in self.parts.values()]
        for part in whole.unflatten(0, (self.groups, -1)).split(rows, dim=1):
            yield part.flatten(0, 1).clone()


def weights_of(model: Model, moe: Moe | None = None) -> list[Weight]:
    """Every parameter of a model and what it is called on the other side, in the order of the layers."""
    sizes = {
        "h": model.hidden_size,
        "q": model.num_heads * model.head_size,
        "k": model.num_kv_heads * model.head_size,
        "f": model.intermediate_size,
        "v": model.vocab_size,
    }
    rows: tuple = (*_LAYER, *_DENSE)
    if moe is not None:
        sizes |= {"e": moe.num_experts, "s": moe.shared_intermediate_size or 0}
        shared = _SHARED if moe.shared_intermediate_size else ()
        rows = (*_LAYER, _ROUTER, *((_BIAS,) if moe.bias_update_rate > 0 else ()), *shared)

    def weight(row, ours: str = "", theirs: str = "") -> Weight:
        native, parts = row
        shapes = {theirs + name: tuple(sizes[letter] for letter in shape) for name, shape in parts}
        return Weight(ours + native, shapes, model.num_kv_heads if native.endswith("linear_qkv.weight") else 1)

    layers = []
    for n in range(model.num_layers):
        ours, theirs = f"decoder.layers.{n}.", f"model.layers.{n}."
        layers += [weight(row, ours, theirs) for row in rows]
        for e in range(moe.num_experts if moe is not None else 0):
            places = f"{ours}mlp.experts.local_experts.{e}.", f"{theirs}block_sparse_moe.experts.{e}."
            layers += [weight(row, *places) for row in _EXPERT]
    ends = [_FINAL_NORM] if model.tie_embeddings else [_FINAL_NORM, _OUTPUT]
    return [weight(_EMBEDDING), *layers, *map(weight, ends)]


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
    config = _read_json(hf_dir / "config.json")
    model, moe = _model(config, hf_dir / "config.json")
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
    folder = _open(hf_dir)
    # Before anything is made for each layer that config.json claims.
    least = model.num_layers * (moe.num_experts if moe is not None else 1)
    if least > len(folder):
        raise ConfigError(
            f"{hf_dir}: config.json makes it {model.num_layers} layers"
            f"{f' of {moe.num_experts} experts' if moe is not None else ''}, but it holds {len(folder)} tensors.\n"
            "  Download the folder again."
        )
    weights = weights_of(model, moe)
    _same_tensors(folder, weights, model, hf_dir)

    with appearing(checkpoint) as temporary:
        state = {w.native: _lazy(w, folder) for w in weights}
        if upcycle is not None:
            state = _upcycled(state, model, upcycle, recipe.training.seed)
        # A file for each: torch 2.13's writer (filesystem.py:451) keeps the tensors of a file until it is whole.
        writer = dcp.FileSystemWriter(temporary, single_file_per_rank=False, sync_files=True)
        try:
            dcp.save(state, storage_writer=writer, no_dist=True)
        except CheckpointException as error:
            cause = next(iter(error.failures.values()), (error,))
            raise RuntimeError(f"{checkpoint}: could not be written: {cause[0]}") from error
        (temporary / "progress.json").write_text(json.dumps(asdict(store.Progress()), indent=1) + "\n")
        (temporary / "recipe.yaml").write_text(dump(recipe), encoding="utf-8")
        _carry(hf_dir, temporary / single.TOKENIZER)
        _keep_token_ids(config, temporary / single.TOKENIZER)
        store.write_manifest(temporary, {})
    types = _types(folder[name].dtype for w in weights for name in w.parts)
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
    recipe = single.read_recipe(checkpoint)
    model = recipe.model
    assert model is not None, "read_recipe refuses that"
    moe = recipe.moe
    _is_mixtral(moe, checkpoint)
    weights, reader = weights_of(model, moe), Reader(checkpoint)
    stored = _stored(reader, weights, checkpoint)
    types = {w.native: _exported_type(w.native, dtype, stored, recipe) for w in weights}
    sizes = {
        name: torch.Size(shape).numel() * types[w.native].itemsize for w in weights for name, shape in w.parts.items()
    }
    shards = _shards(sizes, max_shard_bytes)
    with appearing(hf_dir) as temporary:
        tensors = _read_split(reader, weights, stored, types, moe.scaling_factor if moe is not None else 1.0)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(shards, 1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
            save_file(dict(islice(tensors, len(names))), temporary / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(names, file)
        if len(shards) > 1:
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
            _write_json(temporary / "model.safetensors.index.json", index)
        tokens = _tokenizer_of(checkpoint, recipe, temporary, say)
        _write_json(temporary / "config.json", {**_config(model, moe, types[weights[0].native]), **tokens})
    files = "1 file" if len(shards) == 1 else f"{len(shards)} files"
    say(f"{hf_dir}: {model.num_parameters(moe):,} parameters, {_types(types.values())}, {files}")


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
    ours, recipe = single.load_single(checkpoint, dtype=torch.float32)
    assert recipe.model is not None, "load_single refuses that"
    folder = _open(hf_dir)
    params = dict(ours.named_parameters())
    # Of adapters that were merged the sum was rounded, which is a part of the difference.
    for weight in weights_of(recipe.model, recipe.moe) if recipe.lora is None else ():
        if not weight.parts.keys() <= folder.keys():
            continue  # an upcycled expert, in the dense model's type from the first
        dtype = _common_type(folder[name].dtype for name in weight.parts)
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
    recipe = single.read_recipe(checkpoint)
    assert recipe.model is not None, "read_recipe refuses that"
    return 2 * 4 * recipe.model.num_parameters(recipe.moe) <= 0.6 * psutil.virtual_memory().available


@dataclass(frozen=True)
class _Stored:
    """Where a tensor of a Hugging Face folder lies, and what its header says of it."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


def _open(hf_dir: Path) -> dict[str, _Stored]:
    """Every tensor of the folder, by name; reads headers only."""
    index, whole = hf_dir / "model.safetensors.index.json", hf_dir / "model.safetensors"
    expected: dict[str, str] | None = None
    if whole.is_file():
        files = [whole]
    elif index.is_file():
        expected = _read_json(index).get("weight_map")
        if not isinstance(expected, dict) or not all(Path(str(file)).name == file for file in expected.values()):
            raise ConfigError(f"{index}: has no `weight_map` of tensor names to files beside it.\n  Download it again.")
        files = [hf_dir / name for name in sorted(set(expected.values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ConfigError(
                f"{hf_dir}: {missing[0]} is missing ({len(missing)} of the {len(files)} shards that {index.name} lists "
                "are).\n  Download the folder again."
            )
    elif any(hf_dir.glob("*.bin")):
        raise ConfigError(
            f"{hf_dir}: holds pickled weights ({next(hf_dir.glob('*.bin')).name}), which could run any code.\n"
            "  Convert the folder to safetensors (`save_pretrained` of transformers writes it)."
        )
    else:
        raise ConfigError(f"{hf_dir}: has neither {whole.name} nor {index.name}.\n  Download the folder again.")
    found = {name: stored for file in files for name, stored in _header(file)}
    lost = [f"{name} is not in {file}" for name, file in (expected or {}).items() if name not in found]
    if lost:
        raise ConfigError(f"{hf_dir}: {lost[0]}, where {index.name} says it is.\n  Download the folder again.")
    return found


def _header(file: Path) -> Iterator[tuple[str, _Stored]]:
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                view = tensors.get_slice(name)
                # A type that is none of ours is refused where the tensor is wanted; int8 stands for all of them.
                yield name, _Stored(file, tuple(view.get_shape()), _DTYPES.get(view.get_dtype(), torch.int8))
        refuse_repeated_names(file)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{file}: not a whole safetensors file ({error}).\n  Download it again.") from None


def refuse_repeated_names(file: Path) -> None:
    """Refuse a header, which the library has found whole, that has a name twice: other readers may take the other one.

    Raises:
        ConfigError: it has.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        repeated = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        if repeated:
            raise ConfigError(f"{file}: has {repeated[0]} twice.\n  Download it again.")
        return dict(pairs)

    with open(file, "rb") as stream:
        json.loads(stream.read(int.from_bytes(stream.read(8), "little")), object_pairs_hook=once)


def _same_tensors(folder: dict[str, _Stored], weights: list[Weight], model: Model, hf_dir: Path) -> None:
    """Refuse a folder that lacks a tensor, has one of another shape or type, or one that a Llama does not have."""
    breaches = []
    wanted = {name: shape for w in weights for name, shape in w.parts.items()}
    for name, shape in wanted.items():
        if name not in folder:
            breaches.append(f"{hf_dir}: has no tensor {name} {list(shape)}.")
        elif folder[name].shape != shape:
            breaches.append(f"{hf_dir}: {name} is {list(folder[name].shape)}, config.json makes it {list(shape)}.")
        elif folder[name].dtype not in _DTYPES.values():
            breaches.append(f"{hf_dir}: {name} is neither float32, bfloat16 nor float16 (a quantized model?).")
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    ignored = {name for name in folder if name.endswith("rotary_emb.inv_freq")}  # old folders; computed
    if model.tie_embeddings and head in folder and embedding in folder:
        ignored.add(head)
        if not torch.equal(_tensor(folder, head), _tensor(folder, embedding)):
            breaches.append(f"{hf_dir}: {head} is not {embedding}, though config.json says tie_word_embeddings.")
    extra = folder.keys() - wanted.keys() - ignored
    breaches += [f"{hf_dir}: holds {name}, which such a model does not have." for name in sorted(extra)]
    if breaches:
        raise ConfigError(*_few(breaches), "  Download the folder again, or use another model.")


def _tensor(folder: dict[str, _Stored], name: str) -> Tensor:
    with safe_open(folder[name].file, framework="pt") as tensors:
        return tensors.get_tensor(name)


def _lazy(weight: Weight, folder: dict[str, _Stored]) -> Pieces:
    dtype = _common_type(folder[name].dtype for name in weight.parts)

    def read() -> Tensor:
        return weight.fuse(_tensor(folder, name).to(dtype) for name in weight.parts)

    return Pieces(weight.shape, dtype, [((0,) * len(weight.shape), weight.shape, read)])


def _common_type(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The narrowest that holds the values of all."""
    common, *rest = dtypes
    for dtype in rest:
        common = torch.promote_types(common, dtype)
    return common


def _stored(reader: Reader, weights: list[Weight], checkpoint: Path) -> dict[str, torch.dtype]:
    """The type of every tensor in the checkpoint; refuses one of another model than `weights`."""
    entries = reader.read_metadata().state_dict_metadata
    stored = {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
    breaches = []
    for w in weights:
        if w.native not in stored:
            breaches.append(f"{checkpoint}: has no {w.native} {list(w.shape)}.")
        elif tuple(stored[w.native].size) != w.shape:
            breaches.append(
                f"{checkpoint}: {w.native} is {list(stored[w.native].size)}, its recipe makes it {list(w.shape)}."
            )
    extra = stored.keys() - {w.native for w in weights}
    breaches += [
        f"{checkpoint}: holds {name}, which such a model does not have."
        for name in sorted(extra)
        if not name.startswith("optimizer.")
    ]
    if breaches:
        raise ConfigError(*_few(breaches), "  Put the recipe that it was trained with beside it (recipe.yaml).")
    return {name: entry.properties.dtype for name, entry in stored.items()}


def _exported_type(native: str, wanted: str | None, stored: dict[str, torch.dtype], recipe: Recipe) -> torch.dtype:
    if wanted is not None:
        return getattr(torch, wanted)
    trained = any(name.startswith("optimizer.") for name in stored)
    return torch.bfloat16 if trained and recipe.distributed.precision != "FP32" else stored[native]


def _shards(sizes: dict[str, int], max_bytes: int) -> list[list[str]]:
    """Cut the tensors, in their order, into files of at most `max_bytes`."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _read_split(
    reader: Reader,
    weights: list[Weight],
    stored: dict[str, torch.dtype],
    types: dict[str, torch.dtype],
    scaling: float = 1.0,
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a Hugging Face folder; experts' outputs are scaled, which Mixtral cannot do by itself."""
    for w in weights:
        whole = torch.empty(w.shape, dtype=stored[w.native])
        state = {w.native: Pieces.of(w.shape, [((0,) * len(w.shape), whole)])}
        load(state, reader)
        if scaling != 1.0 and is_expert(w.native) and w.native.endswith("linear_fc2.weight"):
            whole = whole.float() * scaling
        yield from zip(w.parts, w.split(whole.to(types[w.native])), strict=True)


def _is_mixtral(moe: Moe | None, checkpoint: Path) -> None:
    """Refuse experts that a MixtralForCausalLM does not have."""
    if moe is None:
        return
    told = {
        "moe.shared_intermediate_size": moe.shared_intermediate_size is not None,
        "moe.pre_softmax": moe.pre_softmax,
        "moe.bias_update_rate": moe.bias_update_rate > 0,
    }
    if breaches := [
        f"{checkpoint}: {key}: transformers' Mixtral has no such thing." for key, has in told.items() if has
    ]:
        raise ConfigError(*breaches, "  Such a model can be trained and evaluated here, not exported.")


def _model(config: dict[str, Any], path: Path) -> tuple[Model, Moe | None]:
    """The `model` and `moe` sections of a Hugging Face configuration.

    Raises:
        ConfigError: every trait that this model does not have.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in _DEFAULTS:
        raise ConfigError(
            f"{path}: model_type: {kind} is not a Llama.\n  Models of type {' and '.join(_DEFAULTS)} can be imported."
        )
    given = {**_DEFAULTS[kind], **config}
    if wrong := [key for key in ("rope_scaling", "rope_parameters") if not isinstance(given.get(key) or {}, dict)]:
        raise ConfigError(f"{path}: {wrong[0]}: not a JSON object.\n  Download the folder again.")
    for key in ("sliding_window", "max_position_embeddings"):
        if not isinstance(given.get(key) or 0, int | float):
            raise ConfigError(f"{path}: {key}: {given[key]!r} is not a number.\n  Download the folder again.")
    rope = {**(given.get("rope_scaling") or {}), **(given.get("rope_parameters") or {})}
    breaches = [f"{path}: {key}: not given." for key in _REQUIRED if given.get(key) is None]
    biases = ("attention_bias", "mlp_bias")
    breaches += [f"{path}: {key}: biases are not supported." for key in biases if given.get(key)]
    if given.get("hidden_act", "silu") != "silu":
        breaches.append(f"{path}: hidden_act: {given['hidden_act']} is not supported; silu is.")
    if given.get("quantization_config"):
        breaches.append(f"{path}: quantization_config: quantized weights are not supported; use the full model.")
    window = given.get("sliding_window")
    if kind == "mixtral":
        breaches += [f"{path}: {key}: not given." for key in _EXPERTS if given.get(key) is None]
        if given.get("router_jitter_noise"):
            breaches.append(f"{path}: router_jitter_noise: {given['router_jitter_noise']} is not supported; 0 is.")
    if window is not None and kind in ("mistral", "mixtral") and window < given["max_position_embeddings"]:
        breaches.append(f"{path}: sliding_window: {window} is not supported; null is.")
    if (rope.get("partial_rotary_factor") or given.get("partial_rotary_factor") or 1.0) != 1.0:
        breaches.append(f"{path}: partial_rotary_factor: only 1.0 is supported.")
    scaling_type = rope.get("rope_type") or rope.get("type") or "default"
    if scaling_type not in ("default", "llama3"):
        breaches.append(f"{path}: rope_scaling: type {scaling_type} is not supported; llama3 is.")
    missing = [key for key in _ROPE_SCALING if scaling_type == "llama3" and key not in rope]
    if missing:
        breaches.append(f"{path}: rope_scaling: type llama3 needs {', '.join(missing)}.")
    if breaches:
        raise ConfigError(*breaches, "  Use a plain Llama.")
    section = {ours: given[theirs] for theirs, ours in _SIZES.items() if given.get(theirs) is not None}
    section["rope_theta"] = rope.get("rope_theta") or given.get("rope_theta") or 10000.0
    if scaling_type == "llama3":
        section["rope_scaling"] = {ours: rope[theirs] for theirs, ours in _ROPE_SCALING.items()}
    try:
        moe = None
        if kind == "mixtral":
            moe = Moe.model_validate({ours: given[theirs] for theirs, ours in _EXPERTS.items()})
        return Model.model_validate(section), moe
    except ValidationError as error:
        theirs = {ours: name for name, ours in (_SIZES | _EXPERTS).items()}
        details = [(str(detail["loc"][0]), detail["msg"]) for detail in error.errors()]
        raise ConfigError(
            *(f"{path}: {theirs.get(key, key)}: {section.get(key)!r}: {text}." for key, text in details),
            "  Download the folder again.",
        ) from None


def _config(model: Model, moe: Moe | None, dtype: torch.dtype) -> dict[str, Any]:
    """A LlamaConfig or MixtralConfig in the keys that transformers 4 wrote and 5 still reads."""
    scaling = model.rope_scaling
    own: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "mlp_bias": False}
    if moe is not None:
        own = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "sliding_window": None}
        own |= {theirs: getattr(moe, ours) for theirs, ours in _EXPERTS.items()}
    return {
        **own,
        **{theirs: getattr(model, ours) for theirs, ours in _SIZES.items()},
        "head_dim": model.head_size,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rope_theta": model.rope_theta,
        "rope_scaling": scaling
        and {"rope_type": "llama3", **{theirs: getattr(scaling, ours) for theirs, ours in _ROPE_SCALING.items()}},
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
    }


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
    source = single.tokenizer_of(checkpoint, recipe)
    if source is None:
        say(f"{checkpoint}: its tokenizer ({recipe.data.tokenizer or 'none given'}) is not there; exported without one")
        return dict.fromkeys(_TOKEN_IDS)
    _carry(source if source.is_dir() else source.parent, hf_dir)
    if not (hf_dir / GENERATION).exists() and (hf_dir / "tokenizer.json").exists():
        end = load_tokenizer(hf_dir).eod_id
        _write_json(hf_dir / GENERATION, {"bos_token_id": end, "eos_token_id": end})
    settings = _read_json(hf_dir / GENERATION) if (hf_dir / GENERATION).exists() else {}
    return {key: settings.get(key) for key in _TOKEN_IDS}


@contextlib.contextmanager
def appearing(final: Path) -> Iterator[Path]:
    """A folder under a temporary name, which gets its own when all is well and vanishes when not."""
    final = final.resolve()
    if final.exists() and not (final.is_dir() and not any(final.iterdir())):
        raise ConfigError(f"{final}: exists and is not an empty folder.\n  Give a new one, or remove it.")
    temporary = final.parent / f".writing_{final.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        os.replace(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json_text.loads(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file.\n  Give a Hugging Face folder: config.json and safetensors."
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}).\n  Download it again.") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: not a JSON object.\n  Download it again.")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _few(breaches: list[str]) -> list[str]:
    return breaches if len(breaches) <= 4 else [*breaches[:3], f"... and {len(breaches) - 3} more."]


def _types(dtypes: Iterable[torch.dtype]) -> str:
    return " and ".join(sorted({str(dtype).removeprefix("torch.") for dtype in dtypes}))
