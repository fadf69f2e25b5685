"""Read and write adapters in PEFT's format (`adapter_config.json`, `adapter_model.safetensors`), and merge them."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from igla_mega.checkpoint import store
from igla_mega.checkpoint.base import BASE, base_note, base_of, digest_of_checkpoint, read_base
from igla_mega.checkpoint.folder import DATA, read_recipe
from igla_mega.checkpoint.hf_names import Weight, weights_of
from igla_mega.checkpoint.hf_tokenizer import export_tokenizer
from igla_mega.checkpoint.pieces import Pieces, Reader, read_whole
from igla_mega.checkpoint.progress import Progress
from igla_mega.checkpoint.safetensors import appearing, finite, refuse_repeated_names
from igla_mega.config import json_text
from igla_mega.config.errors import ConfigError
from igla_mega.config.features import Lora, Moe
from igla_mega.config.files import read_bytes, read_text, refuse_special
from igla_mega.config.load import dump
from igla_mega.config.schema import Model
from igla_mega.model.lora import is_adapter, scaling
from igla_mega.model.nf4 import Nf4
from igla_mega.model.projections import STACKS
from igla_mega.model.shards import Shard, is_expert, local_values
from igla_mega.model.spec import DTYPES

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model.model.layers."
_PATHS = {name: path for path, names in STACKS.items() for name in names}
_MIXTRAL = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_MODULES = {"self_attention": "self_attn", "mlp": "mlp"}
_MATRICES = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_magnitude": "lora_magnitude_vector"}
_USED = frozenset({"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "init_lora_weights"})
_NEUTRAL = frozenset({
    # Of the file, the loader or the training task.
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "runtime_config", "megatron_core", "eva_config",
    # Which modules have adapters: the names of the tensors say so.
    "target_modules", "exclude_modules", "layers_pattern",
    # Details of a feature that another key switches on, which is refused then.
    "qalora_group_size",
})  # fmt: skip
"""Settings of PEFT that change nothing in the result of stored matrices."""
_OFF: tuple[Any, ...] = (None, False, {}, [], "none")
"""Values of any other setting that mean that it is not in use; anything else is refused, known or not."""
_INITIALIZATIONS: tuple[Any, ...] = (True, False, "gaussian", "orthogonal", "eva")
"""Initializations that leave the base as it is; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change it."""
_PEFT_NAME = re.compile(
    rf"{re.escape(_PREFIX)}(\d+)\.(?:self_attn|mlp)\.(\w+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.weight)?"
)


def peft_name(name: str) -> str:
    """Return PEFT's name of an adapter matrix, from its name in a checkpoint."""
    layer, block, _, projection, matrix = name.removeprefix("decoder.layers.").split(".")
    return f"{_PREFIX}{layer}.{_MODULES[block]}.{projection}.{_MATRICES[matrix]}"


def native_name(name: str) -> str | None:
    """Return the checkpoint's name of a tensor of PEFT; None if it is not an adapter of a Llama projection."""
    match = _PEFT_NAME.fullmatch(name)
    if match is None or match[2] not in _PATHS:
        return None
    return f"decoder.layers.{match[1]}.{_PATHS[match[2]]}.{match[2]}.{match[3].removesuffix('_vector')}"


def export_folder(
    adapters: Mapping[str, Tensor],
    lora: Lora,
    folder: Path,
    *,
    base_model: str,
    more: Callable[[Path], object] = lambda folder: None,
) -> None:
    """Write a folder that PEFT's `PeftModel.from_pretrained` opens.

    Args:
        adapters: whole matrices, by their names in a checkpoint.
        folder: folder to write, completely or not at all.
        base_model: name or path by which PEFT finds the base.
        more: writes what else the folder gets.

    Raises:
        ConfigError: `folder` exists and is not empty.
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
        more(temporary)


def import_folder(folder: Path, model: Model) -> tuple[Lora, dict[str, Tensor]]:
    """Read a PEFT folder.

    Returns:
        The `lora` section that describes it, and its whole matrices by their names in a checkpoint.

    Raises:
        ConfigError: not a plain LoRA or DoRA of Llama projections, or one of a model of another shape.
    """
    settings = _settings(folder)
    try:
        refuse_special(folder / WEIGHTS)
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
            breaches.append(f"{folder / WEIGHTS}: {name} is not an adapter of a Llama projection.")
        else:
            adapters[native] = finite(tensor, name, folder / WEIGHTS)
    # From the tensors, not from `target_modules` of the settings, which may also be a regular expression.
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
    layers = {int(name.split(".")[2]) for name in adapters}
    if missing := sorted(set(range(model.num_layers)) - layers):
        breaches.append(f"{folder / WEIGHTS}: has adapters on {len(layers)} layers, none on layer {missing[0]}.")
    for name, shape in shapes.items():
        if name not in adapters:
            breaches.append(f"{folder / WEIGHTS}: has no {peft_name(name)} {list(shape)}.")
        elif tuple(adapters[name].shape) != shape:
            found = list(adapters[name].shape)
            breaches.append(f"{folder / WEIGHTS}: {peft_name(name)} is {found}, this base needs {list(shape)}.")
    breaches += [f"{folder / WEIGHTS}: {peft_name(n)} is beyond the base's layers." for n in adapters.keys() - shapes]
    if breaches:
        raise ConfigError(
            "The adapter does not fit this base:",
            *breaches[:4],
            "  Use the base it was trained on, and an adapter on every layer.",
        )
    return lora, adapters


def _settings(folder: Path) -> dict[str, Any]:
    """Return the settings of a PEFT folder.

    Raises:
        ConfigError: the file cannot be read, or has a setting that changes the result and is not supported.
    """
    path = folder / CONFIG
    try:
        settings = json_text.read(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}).\n  Give a folder that PEFT saved.") from None
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        raise ConfigError(f"{path}: not a LoRA adapter.\n  Use an adapter of type LORA.")
    breaches = [
        f"{path}: {key}: {value} is not supported."
        for key, value in settings.items()
        if key not in _USED | _NEUTRAL and value not in _OFF
    ]
    initialization = settings.get("init_lora_weights", True)
    if initialization not in _INITIALIZATIONS:
        breaches.append(f"{path}: init_lora_weights: {initialization} is not supported: it may change the base.")
    if breaches:
        raise ConfigError(
            *breaches,
            "  Use a plain LoRA or DoRA adapter: one rank on every layer, no other weights, an unchanged base. "
            "PEFT converts PiSSA, OLoRA and CorDA: save_pretrained(..., path_initial_model_for_weight_conversion=...).",
        )
    return settings


def shapes_of(model: Model, lora: Lora, moe: Moe | None = None) -> dict[str, tuple[int, ...]]:
    """Return the name and whole shape of every adapter matrix of a model.

    `lora_A` is [rank, inputs], `lora_B` [outputs, rank], and with DoRA `lora_magnitude` [outputs].
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for weight in weights_of(model, moe):
        for projection, hf_name in _projections(weight).items():
            if projection in lora.target_modules:
                stem = f"{weight.native.removesuffix('.weight')}.{projection}"
                outputs, inputs = weight.parts[hf_name]
                shapes[f"{stem}.lora_A"] = (lora.rank, inputs)
                shapes[f"{stem}.lora_B"] = (outputs, lora.rank)
                if lora.use_dora:
                    shapes[f"{stem}.lora_magnitude"] = (outputs,)
    return shapes


def _projections(weight: Weight) -> dict[str, str]:
    """Return the projections stacked in a parameter, each with its tensor's name in a Hugging Face folder."""
    named = {name.split(".")[-2]: name for name in weight.parts}
    return {ours: name for module, name in named.items() if (ours := _MIXTRAL.get(module, module)) in _PATHS}


def place(adapters: Mapping[str, Tensor], pairs: Iterable[tuple[Shard, Tensor]]) -> None:
    """Copy this rank's part of whole matrices into the parameters of the same names; others are unchanged."""
    for shard, param in pairs:
        if shard.name in adapters:
            values, start = local_values(param)
            for offset, piece in shard.rectangles(values, start):
                window = tuple(slice(o, o + n) for o, n in zip(offset, piece.shape, strict=True))
                piece.copy_(adapters[shard.name][window])


def read(checkpoint: Path) -> dict[str, Tensor]:
    """Return the whole adapter matrices in a checkpoint, by name."""
    reader = Reader(checkpoint)
    names = [name for name in reader.shapes() if is_adapter(name) and not name.startswith("optimizer.")]
    return {name: read_whole(reader, name) for name in names}


@torch.no_grad()
def merged(weight: Tensor, stem: str, adapters: Mapping[str, Tensor], lora: Lora) -> Tensor:
    """Return a projection's weight [O, I] with its adapter added and, with DoRA, rescaled, in fp32.

    `W + s B A` (Hu et al. 2021, arXiv:2106.09685, eq. 3); with DoRA (Liu et al. 2024, arXiv:2402.09353, eq. 5) each row
    is scaled to its trained magnitude.

    Args:
        stem: the adapter's name, without the matrix's.
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
    data: Path | None = None,
) -> None:
    """Write a checkpoint of the base with the adapters merged into it, one tensor in memory at a time.

    Args:
        base: checkpoint of the base.
        checkpoint: folder to write, completely or not at all.
        quantized: type from which the base was quantized to NF4, if the adapters were trained on such a base; the
            adapters are then merged into the dequantized values, which are the ones they were trained with.
        double: True if the NF4 scales were quantized too.
        data: checkpoint whose record of the data it was trained on is copied.

    Raises:
        ConfigError: `checkpoint` exists and is not empty.
        RuntimeError: the checkpoint could not be written.
    """
    reader = Reader(base)
    weights = weights_of(model, moe)

    def lazy(weight: Weight) -> Pieces:
        """Return a parameter of the merged model as a piece that is made when it is written."""

        def make() -> Tensor:
            """Read the parameter, merge each projection stacked in it, and stack them again."""
            whole = read_whole(reader, weight.native)
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
        # One file per tensor: DCP's writer keeps the tensors of a file in memory until the file is complete.
        writer = dcp.FileSystemWriter(temporary, single_file_per_rank=False, sync_files=True)
        dcp.save({w.native: lazy(w) for w in weights}, storage_writer=writer, no_dist=True)
        (temporary / "progress.json").write_text(json.dumps(asdict(Progress()), indent=1) + "\n")
        (temporary / "recipe.yaml").write_text(read_text(base / "recipe.yaml"))
        _copy_record(data or base, temporary)
        store.write_manifest(temporary, {})


def merge_adapters(checkpoint: Path, merged: Path, base: Path | None = None) -> None:
    """Write the whole model of a checkpoint of adapters as a separate checkpoint.

    Args:
        merged: folder to write.
        base: checkpoint of the base; None: the one named in the checkpoint of adapters.

    Raises:
        ConfigError: the base does not exist, or `merged` exists and is not empty.
    """
    recipe = read_recipe(checkpoint)
    assert recipe.lora is not None and recipe.model is not None, "a checkpoint of adapters"
    quantization = recipe.quantization
    merge(
        base or base_of(checkpoint),
        read(checkpoint),
        recipe.lora,
        recipe.model,
        merged,
        moe=recipe.moe,
        quantized=DTYPES[recipe.distributed.precision] if quantization is not None else None,
        double=quantization is None or quantization.double_quant,
        data=checkpoint,
    )


def _copy_record(checkpoint: Path, folder: Path) -> None:
    """Copy what a checkpoint records of the data it was trained on, if anything."""
    if (checkpoint / DATA).is_file():
        (folder / DATA).write_bytes(read_bytes(checkpoint / DATA))


def export_adapters(checkpoint: Path, folder: Path) -> None:
    """Write the adapters of a checkpoint in PEFT's format.

    Raises:
        ConfigError: `folder` exists and is not empty, or the adapters are of experts.
    """
    recipe = read_recipe(checkpoint)
    assert recipe.lora is not None, "a checkpoint of adapters"
    note = read_base(checkpoint) or {}
    matrices = read(checkpoint)
    if any(is_expert(name) for name in matrices):
        raise ConfigError(
            f"{checkpoint}: has adapters of experts. transformers stores the experts of a layer as one tensor, for "
            "which PEFT has no adapters.\n  Export them merged into their base: --merge."
        )
    tokenizer = partial(export_tokenizer, checkpoint, recipe, say=print)
    export_folder(matrices, recipe.lora, folder, base_model=note.get("base_model") or "", more=tokenizer)
    count = sum(matrix.numel() for matrix in matrices.values())
    print(f"{folder}: {len(matrices)} matrices, {count:,} parameters, as PEFT's PeftModel.from_pretrained opens them")


def import_adapters(folder: Path, base: Path, checkpoint: Path) -> None:
    """Convert a PEFT folder to a checkpoint of adapters of a base.

    Raises:
        ConfigError: the adapter is of another base or not plain LoRA or DoRA, or `checkpoint` exists and is not empty.
    """
    recipe = read_recipe(base)
    assert recipe.model is not None, "read_recipe rejects that"
    section, matrices = import_folder(folder, recipe.model)
    changes = {"name": folder.resolve().name, "base_model": str(base.resolve()), "lora": section}
    # These sections describe how the base was trained, which is not how the adapters were.
    own = {key: None for key in ("continual", "koshey", "curriculum", "dpo", "sft", "stages")}
    texts = {
        "progress.json": json.dumps(asdict(Progress()), indent=1) + "\n",
        "recipe.yaml": dump(recipe.with_keys({**own, **changes})),
        BASE: base_note(base, digest_of_checkpoint(base), str(base)),
    }
    with appearing(checkpoint) as temporary:
        pieces = {n: Pieces.of(tuple(t.shape), [((0,) * t.dim(), t.float())]) for n, t in matrices.items()}
        dcp.save(pieces, storage_writer=dcp.FileSystemWriter(temporary, sync_files=True), no_dist=True)
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")
        _copy_record(base, temporary)
        store.write_manifest(temporary, {})
    print(f"{checkpoint}: {len(matrices)} matrices of rank {section.rank}, for the base {base}")
