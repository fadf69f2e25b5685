"""Read and write folders of safetensors files, one tensor in memory at a time."""

import contextlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from igla_mega.checkpoint.hf_config import few, read_json
from igla_mega.checkpoint.hf_names import Weight
from igla_mega.checkpoint.pieces import Pieces, Reader, load
from igla_mega.config.errors import ConfigError
from igla_mega.config.schema import Model
from igla_mega.model.shards import is_expert

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Stored:
    """Where a tensor of a Hugging Face folder lies, and what its header says of it."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


def open_folder(hf_dir: Path) -> dict[str, Stored]:
    """Every tensor of the folder, by name; reads headers only."""
    index, whole = hf_dir / "model.safetensors.index.json", hf_dir / "model.safetensors"
    expected: dict[str, str] | None = None
    if whole.is_file():
        files = [whole]
    elif index.is_file():
        expected = read_json(index).get("weight_map")
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


def _header(file: Path) -> Iterator[tuple[str, Stored]]:
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                view = tensors.get_slice(name)
                # A type that is none of ours is refused where the tensor is wanted; int8 stands for all of them.
                yield name, Stored(file, tuple(view.get_shape()), _DTYPES.get(view.get_dtype(), torch.int8))
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


def refuse_other_tensors(folder: dict[str, Stored], weights: list[Weight], model: Model, hf_dir: Path) -> None:
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
        raise ConfigError(*few(breaches), "  Download the folder again, or use another model.")


def lazy(weight: Weight, folder: dict[str, Stored]) -> Pieces:
    dtype = common_type(folder[name].dtype for name in weight.parts)

    def read() -> Tensor:
        return weight.fuse(_tensor(folder, name).to(dtype) for name in weight.parts)

    return Pieces(weight.shape, dtype, [((0,) * len(weight.shape), weight.shape, read)])


def common_type(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The narrowest that holds the values of all."""
    common, *rest = dtypes
    for dtype in rest:
        common = torch.promote_types(common, dtype)
    return common


def stored_types(reader: Reader, weights: list[Weight], checkpoint: Path) -> dict[str, torch.dtype]:
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
        raise ConfigError(*few(breaches), "  Put the recipe that it was trained with beside it (recipe.yaml).")
    return {name: entry.properties.dtype for name, entry in stored.items()}


def split_into_files(sizes: dict[str, int], max_bytes: int) -> list[list[str]]:
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


def read_split(
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


def type_names(dtypes: Iterable[torch.dtype]) -> str:
    return " and ".join(sorted({str(dtype).removeprefix("torch.") for dtype in dtypes}))


def _tensor(folder: dict[str, Stored], name: str) -> Tensor:
    with safe_open(folder[name].file, framework="pt") as tensors:
        return tensors.get_tensor(name)
