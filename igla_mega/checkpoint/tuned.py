"""What an engine with adapters needs besides: its frozen base, and how a checkpoint names it."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from igla_mega.checkpoint import adapters, hugging_face, single, store
from igla_mega.checkpoint.pieces import Pieces
from igla_mega.config import load
from igla_mega.config.errors import ConfigError
from igla_mega.config.features import Lora, Quantization
from igla_mega.config.schema import Model
from igla_mega.model import lora, nf4
from igla_mega.model.shards import Shard, Shards, is_expert, local_runs, named_shards, shards_of
from igla_mega.parallel import Mesh

COMPUTE = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def attach(
    chunks: Sequence[Any],
    section: Lora,
    quantization: Quantization | None,
    base: Path | None,
    mesh: Mesh,
    vocab_size: int,
    dtype: torch.dtype,
) -> lora.Switch:
    """Freeze chunks on the meta device, code their projections in 4 bits where that is asked for, and add adapters.

    Args:
        base: checkpoint of the base; one linear at a time is read from it, this rank's part.
        dtype: of the weights that are coded.
    """
    if quantization is not None:
        assert base is not None, "a base of random weights is not worth coding"
        by_name = {shard.name: shard for shard in shards_of(chunks, mesh, vocab_size).values()}

        def read(name: str) -> Tensor:
            part = torch.empty(by_name[name].local_shape, dtype=dtype, device=where)
            store.load_weights(base, [(by_name[name], part)], None, partly=True)  # type: ignore[arg-type]
            return part

        where = "cuda" if torch.cuda.is_available() else "cpu"
        compute, double = COMPUTE[quantization.compute_dtype], quantization.double_quant
        nf4.quantize_chunks(chunks, read, compute_dtype=compute, double=double)
    return lora.attach(chunks, section, context=(mesh.context.rank, mesh.context.size))


def frozen(chunks: Sequence[Any], shards: Shards) -> list[tuple[Shard, nn.Parameter]]:
    """The parameters of the base."""
    return [(shard, param) for shard, param in named_shards(chunks, shards) if not lora.is_adapter(shard.name)]


def trained(chunks: Sequence[Any], shards: Shards) -> list[tuple[Shard, nn.Parameter]]:
    """The parameters that a checkpoint of adapters holds."""
    return [(shard, param) for shard, param in named_shards(chunks, shards) if lora.is_adapter(shard.name)]


def fill(chunks: Sequence[Any], shards: Shards, section: Lora, model: Model, base: Path | None, seed: int) -> None:
    """Give the base its weights and the adapters their first values."""
    if base is not None:
        store.load_weights(base, frozen(chunks, shards), None, partly=True)
    lora.initialize(local_runs(chunks, shards), seed)
    lora.initialize_magnitudes(chunks)
    if section.adapter is not None:
        given, matrices = adapters.import_folder(Path(section.adapter), model)
        for key in ("rank", "alpha", "use_rslora", "use_dora"):
            if getattr(given, key) != getattr(section, key):
                raise ConfigError(
                    f"lora.{key}: {getattr(section, key)}, and {section.adapter} has {getattr(given, key)}.\n"
                    "  Set it to what the adapter has."
                )
        if set(given.target_modules) != set(section.target_modules):
            raise ConfigError(
                f"lora.target_modules: {', '.join(section.target_modules)}, and {section.adapter} has "
                f"{', '.join(given.target_modules)}.\n  Set them to what the adapter has."
            )
        with torch.no_grad():
            adapters.place(matrices, named_shards(chunks, shards))


def base_note(base: Path, digest: str, name: str | None) -> str:
    """What `base.json` says."""
    return json.dumps({"base_model": name, "checkpoint": str(base.resolve()), "digest": digest}, indent=1) + "\n"


def refuse_other_base(checkpoint: Path, base: Path, digest: str) -> None:
    """Refuse to go on with adapters on another base than they were trained on."""
    note = adapters.read_base(checkpoint)
    if note is not None and note["digest"] != digest:
        raise ConfigError(
            f"{checkpoint}: adapters of another base: theirs has the digest {note['digest']}, {base} has {digest}.\n"
            f"  Use {note['base_model'] or note['checkpoint']}, or start in a new run folder."
        )


def merge_adapters(checkpoint: Path, merged: Path, base: Path | None = None) -> None:
    """Write the whole model that a checkpoint of adapters stands for, as a checkpoint of its own.

    Args:
        base: where its base is; by default where the checkpoint says.

    Raises:
        ConfigError: the base is not there, or `merged` is taken.
    """
    recipe = single.read_recipe(checkpoint)
    assert recipe.lora is not None and recipe.model is not None, "a checkpoint of adapters"
    coded = recipe.quantization
    adapters.merge(
        base or single.base_of(checkpoint),
        adapters.read(checkpoint),
        recipe.lora,
        recipe.model,
        merged,
        moe=recipe.moe,
        quantized=single.DTYPES[recipe.distributed.precision] if coded is not None else None,
        double=coded is None or coded.double_quant,
    )


def export_adapters(checkpoint: Path, folder: Path) -> None:
    """Write the adapters of a checkpoint as PEFT saves them.

    Raises:
        ConfigError: `folder` is taken.
    """
    recipe = single.read_recipe(checkpoint)
    assert recipe.lora is not None, "a checkpoint of adapters"
    note = adapters.read_base(checkpoint) or {}
    matrices = adapters.read(checkpoint)
    if any(is_expert(name) for name in matrices):
        raise ConfigError(
            f"{checkpoint}: adapters of experts, which transformers keeps as one tensor a layer and PEFT cannot name.\n"
            "  Export them with their base: --merge."
        )
    adapters.export_folder(matrices, recipe.lora, folder, base_model=note.get("base_model") or "")
    count = sum(matrix.numel() for matrix in matrices.values())
    print(f"{folder}: {len(matrices)} matrices, {count:,} parameters, as PEFT's PeftModel.from_pretrained opens them")


def import_adapters(folder: Path, base: Path, checkpoint: Path) -> None:
    """Turn a folder of PEFT's into a checkpoint of adapters of a base.

    Raises:
        ConfigError: of another base, not plain LoRA or DoRA, or `checkpoint` is taken.
    """
    recipe = single.read_recipe(base)
    assert recipe.model is not None, "read_recipe refuses that"
    section, matrices = adapters.import_folder(folder, recipe.model)
    changes = {"name": folder.resolve().name, "base_model": str(base.resolve()), "lora": section}
    own = {key: None for key in ("continual", "koshey", "curriculum", "dpo", "sft", "stages")}
    texts = {
        "progress.json": json.dumps(asdict(store.Progress()), indent=1) + "\n",
        "recipe.yaml": load.dump(recipe.model_copy(update={**own, **changes})),
        adapters.BASE: base_note(base, adapters.digest_of_checkpoint(base), str(base)),
    }
    with hugging_face.appearing(checkpoint) as temporary:
        pieces = {n: Pieces.of(tuple(t.shape), [((0,) * t.dim(), t.float())]) for n, t in matrices.items()}
        dcp.save(pieces, storage_writer=dcp.FileSystemWriter(temporary, sync_files=True), no_dist=True)
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")
        store.write_manifest(temporary, {})
    print(f"{checkpoint}: {len(matrices)} matrices of rank {section.rank}, for the base {base}")
