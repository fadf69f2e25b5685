"""Adapters as PEFT stores them (`adapter_config.json`, `adapter_model.safetensors`), both ways, and merged weights."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from igla_mega.checkpoint import store
from igla_mega.checkpoint.hugging_face import Weight, appearing, refuse_repeated_names, weights_of
from igla_mega.checkpoint.pieces import Pieces, Reader, load
from igla_mega.config import json_text
from igla_mega.config.errors import ConfigError
from igla_mega.config.features import Lora, Moe
from igla_mega.config.schema import Model
from igla_mega.model.lora import is_adapter, scaling
from igla_mega.model.nf4 import Nf4
from igla_mega.model.projections import STACKS
from igla_mega.model.shards import Shard, local_values

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE = "base.json"
"""In a checkpoint of adapters: which base they belong to."""
_PREFIX = "base_model.model.model.layers."
_PATHS = {name: path for path, names in STACKS.items() for name in names}
_MIXTRAL = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_MODULES = {"self_attention": "self_attn", "mlp": "mlp"}
_MATRICES = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_magnitude": "lora_magnitude_vector"}
_THEIRS = re.compile(
    rf"{re.escape(_PREFIX)}(\d+)\.(?:self_attn|mlp)\.(\w+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.weight)?"
)


def peft_name(name: str) -> str:
    """What PEFT calls one of our adapters' matrices."""
    layer, block, _, projection, matrix = name.removeprefix("decoder.layers.").split(".")
    return f"{_PREFIX}{layer}.{_MODULES[block]}.{projection}.{_MATRICES[matrix]}"


def native_name(name: str) -> str | None:
    """What we call one of PEFT's tensors; None where it is no adapter of a Llama's projection."""
    match = _THEIRS.fullmatch(name)
    if match is None or match[2] not in _PATHS:
        return None
    return f"decoder.layers.{match[1]}.{_PATHS[match[2]]}.{match[2]}.{match[3].removesuffix('_vector')}"


def export_folder(adapters: Mapping[str, Tensor], lora: Lora, folder: Path, *, base_model: str) -> None:
    """Write a folder that PEFT's `PeftModel.from_pretrained` opens.

    Args:
        adapters: whole matrices by their names in every layout.
        folder: whole or not there at all.
        base_model: name or path that PEFT looks the base up by.

    Raises:
        ConfigError: `folder` is taken.
    """
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": list(lora.target_modules),
        "use_rslora": lora.use_rslora,
        "use_dora": lora.use_dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }
    with appearing(folder) as temporary:
        tensors = {peft_name(name): tensor.contiguous() for name, tensor in adapters.items()}
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        (temporary / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def import_folder(folder: Path, model: Model) -> tuple[Lora, dict[str, Tensor]]:
    """Read a PEFT folder.

    Returns:
        The `lora` section that describes it, and its whole matrices by our names.

    Raises:
        ConfigError: not a plain LoRA or DoRA of a Llama's projections, or one of a model of another shape.
    """
    settings = _settings(folder)
    try:
        tensors = load_file(folder / WEIGHTS)
        refuse_repeated_names(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{folder / WEIGHTS}: cannot be read ({error}).\n  Save the adapter as safetensors."
        ) from None
    adapters, breaches = {}, []
    for name, tensor in tensors.items():
        native = native_name(name)
        if native is None:
            breaches.append(f"{folder / WEIGHTS}: {name} is no adapter of a Llama's projection.")
        else:
            adapters[native] = tensor
    targets = sorted({name.split(".")[-2] for name in adapters}, key=list(_PATHS).index)
    try:
        lora = Lora(
            rank=settings["r"],
            alpha=settings["lora_alpha"],
            dropout=settings.get("lora_dropout", 0.0),
            target_modules=tuple(targets),  # type: ignore[arg-type]
            use_rslora=settings.get("use_rslora", False),
            use_dora=settings.get("use_dora", False),
        )
    except (KeyError, TypeError, ValidationError) as error:
        raise ConfigError(f"{folder / CONFIG}: {error}.\n  Save the adapter again.") from None
    shapes = shapes_of(model, lora)
    for name, shape in shapes.items():
        if name not in adapters:
            breaches.append(f"{folder / WEIGHTS}: has no {peft_name(name)} {list(shape)}.")
        elif tuple(adapters[name].shape) != shape:
            found = list(adapters[name].shape)
            breaches.append(f"{folder / WEIGHTS}: {peft_name(name)} is {found}, this base takes {list(shape)}.")
    breaches += [f"{folder / WEIGHTS}: {peft_name(n)} is beyond the base's layers." for n in adapters.keys() - shapes]
    if breaches:
        raise ConfigError("The adapter is of another base:", *breaches[:4], "  Use the base it was trained on.")
    return lora, adapters


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        settings = json_text.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}).\n  Give a folder that PEFT saved.") from None
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        raise ConfigError(f"{path}: not a LoRA adapter.\n  Adapters of type LORA can be read.")
    asked = ("rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform", "trainable_token_indices")
    breaches = [
        f"{path}: {key}: {settings[key]} is not supported." for key in (*asked, "lora_bias") if settings.get(key)
    ]
    if settings.get("bias", "none") != "none":
        breaches.append(f"{path}: bias: {settings['bias']} is not supported; none is.")
    if breaches:
        raise ConfigError(*breaches, "  Use an adapter of one rank on whole projections.")
    return settings


def shapes_of(model: Model, lora: Lora, moe: Moe | None = None) -> dict[str, tuple[int, ...]]:
    """Name and whole shape of every matrix that the adapters of a model have."""
    shapes: dict[str, tuple[int, ...]] = {}
    for weight in weights_of(model, moe):
        for projection, theirs in _projections(weight).items():
            if projection in lora.target_modules:
                stem = f"{weight.native.removesuffix('.weight')}.{projection}"
                outputs, inputs = weight.parts[theirs]
                shapes[f"{stem}.lora_A"] = (lora.rank, inputs)
                shapes[f"{stem}.lora_B"] = (outputs, lora.rank)
                if lora.use_dora:
                    shapes[f"{stem}.lora_magnitude"] = (outputs,)
    return shapes


def _projections(weight: Weight) -> dict[str, str]:
    """The projections stacked in a parameter, and their tensors' names in a Hugging Face folder."""
    named = {name.split(".")[-2]: name for name in weight.parts}
    return {ours: name for theirs, name in named.items() if (ours := _MIXTRAL.get(theirs, theirs)) in _PATHS}


def place(adapters: Mapping[str, Tensor], pairs: Iterable[tuple[Shard, Tensor]]) -> None:
    """Copy whole matrices into the parameters of their names; others are left alone."""
    for shard, param in pairs:
        if shard.name in adapters:
            values, start = local_values(param)
            for offset, piece in shard.rectangles(values, start):
                window = tuple(slice(o, o + n) for o, n in zip(offset, piece.shape, strict=True))
                piece.copy_(adapters[shard.name][window])


def read(checkpoint: Path) -> dict[str, Tensor]:
    """The whole matrices of the adapters that a checkpoint holds, by name."""
    reader = Reader(checkpoint)
    names = [name for name in reader.shapes() if is_adapter(name) and not name.startswith("optimizer.")]
    return {name: _whole(reader, name) for name in names}


def _whole(reader: Reader, name: str) -> Tensor:
    entry: Any = reader.read_metadata().state_dict_metadata[name]
    tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
    pieces = Pieces.of(entry.size, [((0,) * len(entry.size), tensor)])
    load({name: pieces}, reader)
    return tensor


@torch.no_grad()
def merged(weight: Tensor, stem: str, adapters: Mapping[str, Tensor], lora: Lora) -> Tensor:
    """A projection's weight [O, I] with its adapter added (and, with DoRA, rescaled), in fp32.

    Args:
        stem: of the adapter's names, up to its matrix.
    """
    a, b = adapters[f"{stem}.lora_A"].float(), adapters[f"{stem}.lora_B"].float()
    total = weight.float() + scaling(lora) * (b @ a)
    if lora.use_dora:
        total *= (adapters[f"{stem}.lora_magnitude"].float() / total.norm(dim=1))[:, None]
    return total


def merge(
    base: Path,
    adapters: Mapping[str, Tensor],
    lora: Lora,
    model: Model,
    checkpoint: Path,
    *,
    moe: Moe | None = None,
    quantized: torch.dtype | None = None,
    double: bool = True,
) -> None:
    """Write the checkpoint of the base with the adapters merged into it, one tensor in memory at a time.

    Args:
        base: checkpoint of the base.
        checkpoint: folder to write; whole or not there at all.
        quantized: the type that was quantized to NF4, when the adapters were trained on codes: their values are merged
            into, not the weights that were coded.
        double: whether the scales were coded too.

    Raises:
        ConfigError: `checkpoint` is taken.
        RuntimeError: it could not be written.
    """
    reader = Reader(base)
    weights = weights_of(model, moe)

    def lazy(weight: Weight) -> Pieces:
        def make() -> Tensor:
            whole = _whole(reader, weight.native)
            names = _projections(weight)
            if not names or (quantized is None and not any(name in lora.target_modules for name in names)):
                return whole.float()
            parts = []
            for name, part in zip(names, weight.split(whole), strict=True):
                if quantized is not None:
                    part = Nf4(part.to(quantized), dim=0, double=double).weight(torch.float32)
                stem = f"{weight.native.removesuffix('.weight')}.{name}"
                parts.append(merged(part, stem, adapters, lora) if name in lora.target_modules else part.float())
            return weight.fuse(parts)

        return Pieces(weight.shape, torch.float32, [((0,) * len(weight.shape), weight.shape, make)])

    with appearing(checkpoint) as temporary:
        writer = dcp.FileSystemWriter(temporary, single_file_per_rank=False, sync_files=True)
        dcp.save({w.native: lazy(w) for w in weights}, storage_writer=writer, no_dist=True)
        (temporary / "progress.json").write_text(json.dumps(asdict(store.Progress()), indent=1) + "\n")
        (temporary / "recipe.yaml").write_text((base / "recipe.yaml").read_text())
        store.write_manifest(temporary, {})


def read_base(checkpoint: Path) -> dict[str, Any] | None:
    """What a checkpoint of adapters says of its base: `base_model` as the recipe named it, `checkpoint`, `digest`.

    Returns:
        None for a checkpoint of a whole model.
    """
    file = checkpoint / BASE
    if not file.is_file():
        return None
    try:
        note = json_text.loads(file.read_bytes())
        if not all(isinstance(note[key], str) for key in ("checkpoint", "digest")):
            raise ValueError("`checkpoint` and `digest` are not both texts")
        return {"base_model": None, **note}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file}: does not name a base ({error}).\n  Use another checkpoint.") from None


def digest_of_checkpoint(base: Path, rank: int = 0, size: int = 1, group: dist.ProcessGroup | None = None) -> str:
    """`digest_of` a checkpoint's weights, each of `size` ranks reading some of them."""
    reader = Reader(base)
    names = sorted(name for name in reader.shapes() if not name.startswith("optimizer."))

    def runs() -> Iterator[tuple[Shard, Tensor, int]]:
        for name in names[rank::size]:
            whole = _whole(reader, name)
            shape = tuple(whole.shape)
            yield Shard(name, shape, shape, None, 0, 1, 1, sequence_parallel=False), whole.view(-1), 0

    return digest_of(runs(), group)


def digest_of(runs: Iterable[tuple[Shard, Tensor, int]], group: dist.ProcessGroup | None = None) -> str:
    """16 hex digits that name a base's weights, the same in every layout and in fp32 and bf16.

    Each element, rounded to bf16, is multiplied by numbers drawn from its name and place; the ranks' sums are added.

    Args:
        runs: as for `build.initialize`; adapters among them are left out. Each element of the model once over `group`
            (`Shard.is_first_copy`, one data-parallel rank).
        group: the ranks that hold parts; None when this one holds all.
    """
    total = torch.zeros(1, dtype=torch.int64)
    for shard, values, start in runs:
        if not is_adapter(shard.name):
            for offset, piece in shard.rectangles(values, start):
                total += _digest_piece(shard, offset, piece).cpu()
    if group is not None:
        dist.all_reduce(total, group=group)
    return f"{int(total.item()) & (2**64 - 1):016x}"


def _digest_piece(shard: Shard, offset: tuple[int, ...], piece: Tensor) -> Tensor:
    seed = hashlib.blake2b(shard.name.encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(seed, "big"))
    factors = []
    for size, first, length in zip(shard.shape, offset, piece.shape, strict=True):
        drawn = torch.empty(size, dtype=torch.int64).random_(-(2**63), None, generator=generator) | 1
        factors.append(drawn[first : first + length].to(piece.device))
    bits = piece.bfloat16().view(torch.int16)
    total = torch.zeros(1, dtype=torch.int64, device=piece.device)
    if piece.dim() == 1:
        return total + (bits.long() * factors[0]).sum()
    for rows in range(0, len(bits), 256):  # int64 is four times the size
        block = (bits[rows : rows + 256].long() * factors[1]).sum(1)
        total += (block * factors[0][rows : rows + 256]).sum()
    return total
