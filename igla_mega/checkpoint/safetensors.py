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
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from igla_mega.checkpoint.hf_config import few, read_json
from igla_mega.checkpoint.hf_names import Weight
from igla_mega.checkpoint.integrity import last_line
from igla_mega.checkpoint.pieces import Pieces, Reader, load
from igla_mega.config.errors import ConfigError
from igla_mega.config.files import refuse_special, regular, replace_durably
from igla_mega.config.schema import Model
from igla_mega.model.shards import is_expert

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Stored:
    """A tensor of a Hugging Face folder: its file, and its shape and type from the file's header."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


def open_folder(hf_dir: Path) -> dict[str, Stored]:
    """Return every tensor of a Hugging Face folder, by name; only the headers are read.

    Raises:
        ConfigError: files are missing or damaged, or hold pickled weights.
    """
    index, whole = hf_dir / "model.safetensors.index.json", hf_dir / "model.safetensors"
    expected: dict[str, str] | None = None
    if whole.is_file():
        files = [whole]
    elif index.is_file():
        expected = read_json(index).get("weight_map")
        if not isinstance(expected, dict) or not all(Path(str(file)).name == file for file in expected.values()):
            raise ConfigError(f"{index}: has no `weight_map` of tensor names to file names.\n  Download it again.")
        files = [hf_dir / name for name in sorted(set(expected.values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ConfigError(
                f"{hf_dir}: {missing[0]} is missing ({len(missing)} of the {len(files)} files in {index.name} are).\n"
                "  Download the folder again."
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
        raise ConfigError(f"{hf_dir}: {lost[0]}, though {index.name} names it.\n  Download the folder again.")
    return found


def _header(file: Path) -> Iterator[tuple[str, Stored]]:
    """Yield the tensors of a file from its header."""
    try:
        refuse_special(file)
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                view = tensors.get_slice(name)
                # Types that are not supported become int8, for `refuse_other_tensors` to reject: a file may also hold
                # tensors that are not read, of any type.
                yield name, Stored(file, tuple(view.get_shape()), _DTYPES.get(view.get_dtype(), torch.int8))
        refuse_repeated_names(file)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{file}: not a complete safetensors file ({error}).\n  Download it again.") from None


def refuse_repeated_names(file: Path) -> None:
    """Reject a safetensors header that contains a name twice: two programs may then read different tensors.

    The safetensors library accepts such a header. Call this after it has found the file to be valid.

    Raises:
        ConfigError: a name occurs twice.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """Return a JSON object's pairs as a dictionary."""
        repeated = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        if repeated:
            raise ConfigError(f"{file}: has {repeated[0]} twice.\n  Download it again.")
        return dict(pairs)

    with open(file, "rb", opener=regular) as stream:
        json.loads(stream.read(int.from_bytes(stream.read(8), "little")), object_pairs_hook=once)


def refuse_other_tensors(folder: dict[str, Stored], weights: list[Weight], model: Model, hf_dir: Path) -> None:
    """Reject a folder that lacks a tensor, has one of another shape or type, or one that the model does not have.

    Raises:
        ConfigError: names the first of these tensors.
    """
    breaches = []
    expected = {name: shape for w in weights for name, shape in w.parts.items()}
    for name, shape in expected.items():
        if name not in folder:
            breaches.append(f"{hf_dir}: has no tensor {name} {list(shape)}.")
        elif folder[name].shape != shape:
            breaches.append(f"{hf_dir}: {name} is {list(folder[name].shape)}, config.json makes it {list(shape)}.")
        elif folder[name].dtype not in _DTYPES.values():
            breaches.append(f"{hf_dir}: {name} is neither float32, bfloat16 nor float16 (a quantized model?).")
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    # Folders of older transformers versions hold these; they are computed from rope_theta.
    ignored = {name for name in folder if name.endswith("rotary_emb.inv_freq")}
    if model.tie_embeddings and head in folder and embedding in folder:
        ignored.add(head)
        if not torch.equal(_tensor(folder, head), _tensor(folder, embedding)):
            breaches.append(f"{hf_dir}: {head} differs from {embedding}, but config.json has tie_word_embeddings.")
    extra = folder.keys() - expected.keys() - ignored
    breaches += [f"{hf_dir}: holds {name}, which such a model does not have." for name in sorted(extra)]
    if breaches:
        raise ConfigError(*few(breaches), "  Download the folder again, or use another model.")


def lazy(weight: Weight, folder: dict[str, Stored]) -> Pieces:
    """Return a parameter of a Hugging Face folder as a piece that is read when it is written."""
    dtype = common_type(folder[name].dtype for name in weight.parts)

    def read() -> Tensor:
        """Read the parts and stack them; raise ConfigError on a value that is not finite."""
        return weight.fuse(finite(_tensor(folder, name), name, folder[name].file).to(dtype) for name in weight.parts)

    return Pieces(weight.shape, dtype, [((0,) * len(weight.shape), weight.shape, read)])


def finite(tensor: Tensor, name: str, file: Path) -> Tensor:
    """Return a tensor of somebody's file unchanged.

    Raises:
        ConfigError: it contains NaN or infinite values.
    """
    # The sum of finite bf16 or fp32 values may overflow, so the values themselves are looked at.
    if not (valid := torch.isfinite(tensor)).all():
        count = tensor.numel() - int(valid.sum())
        raise ConfigError(
            f"{file}: {name}: {count:,} of {tensor.numel():,} values are NaN or infinite.\n"
            "  Download the file again; if it was written like this, use another checkpoint."
        )
    return tensor


def common_type(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Return the narrowest type that holds the values of all types."""
    common, *rest = dtypes
    for dtype in rest:
        common = torch.promote_types(common, dtype)
    return common


def stored_types(reader: Reader, weights: list[Weight], checkpoint: Path) -> dict[str, torch.dtype]:
    """Return the type of every tensor in a checkpoint.

    Raises:
        ConfigError: the checkpoint is not of the model of `weights`.
    """
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
        raise ConfigError(*few(breaches), "  Put the recipe of its training into its folder (recipe.yaml).")
    return {name: entry.properties.dtype for name, entry in stored.items()}


def split_into_files(sizes: dict[str, int], max_bytes: int) -> list[list[str]]:
    """Divide tensors, in their order, into files of at most `max_bytes`; a larger tensor gets its own file.

    Args:
        sizes: bytes of each tensor, by name.
    """
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
    """Yield the tensors of a Hugging Face folder, read from a checkpoint one parameter at a time.

    Args:
        stored: the type of every tensor in the checkpoint.
        types: the type of every parameter in the folder.
        scaling: factor for the experts' outputs. Mixtral has no such setting, so the factor is multiplied into the
            last matrix of each expert.
    """
    for w in weights:
        whole = torch.empty(w.shape, dtype=stored[w.native])
        state = {w.native: Pieces.of(w.shape, [((0,) * len(w.shape), whole)])}
        load(state, reader)
        if scaling != 1.0 and is_expert(w.native) and w.native.endswith("linear_fc2.weight"):
            whole = whole.float() * scaling
        yield from zip(w.parts, w.split(whole.to(types[w.native])), strict=True)


def refuse_existing(final: Path) -> None:
    """Raise ConfigError if a folder to write exists and is not empty."""
    if final.exists() and not (final.is_dir() and not any(final.iterdir())):
        raise ConfigError(f"{final}: exists and is not an empty folder.\n  Give a new folder, or remove this one.")


@contextlib.contextmanager
def appearing(final: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `final` on success, and deleted on an error.

    Raises:
        ConfigError: `final` exists and is not an empty folder.
    """
    final = final.resolve()
    refuse_existing(final)
    temporary = final.parent / f".writing_{final.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        # safetensors creates files that only their owner may read; the others follow the umask, as the folder does.
        mode = temporary.stat().st_mode & 0o666
        # Flush before the rename: file systems may write the rename to the disk before the files' data.
        for path in [*temporary.rglob("*"), temporary]:
            if path.is_file():
                path.chmod(mode)
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        replace_durably(temporary, final)
    except CheckpointException as error:  # a BaseException, with one failure of each rank
        shutil.rmtree(temporary, ignore_errors=True)
        cause: Any = next(iter(error.failures.values()), (error,))[0]
        if isinstance(cause, ConfigError):
            raise cause from error
        raise RuntimeError(
            f"{final}: could not be written: {last_line(error)}.\n  Free some space there, or give another path."
        ) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def type_names(dtypes: Iterable[torch.dtype]) -> str:
    """Return the names of types for a message, such as "bfloat16 and float32"."""
    return " and ".join(sorted({str(dtype).removeprefix("torch.") for dtype in dtypes}))


def _tensor(folder: dict[str, Stored], name: str) -> Tensor:
    """Read one tensor."""
    with safe_open(folder[name].file, framework="pt") as tensors:
        return tensors.get_tensor(name)
