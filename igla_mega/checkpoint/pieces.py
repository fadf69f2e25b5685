"""Checkpoints on torch's distributed checkpoint (DCP): tensors in pieces, and a reader that trusts no pickle."""

import io
import math
import os
import pickle
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import _validate_global_plan
from torch.distributed.checkpoint.filesystem import _write_item
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from igla_mega.checkpoint import integrity
from igla_mega.config.errors import ConfigError

_RECORDS = (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)


class Pieces(Tensor):
    """The rectangles of one global tensor that this rank writes or reads; DCP plans with their offsets.

    A piece may be given as a function: it is then made when it is written, so that one exists at a time.
    """

    pieces: dict[torch.Size, tuple[torch.Size, Tensor | Callable[[], Tensor]]]

    @staticmethod
    def __new__(cls, shape: Iterable[int], dtype: torch.dtype, pieces):
        # DCP asks for a torch.Tensor, and never looks at its data.
        self = torch.Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=dtype, device=torch.device("cpu"))
        self.pieces = {torch.Size(offset): (torch.Size(size), values) for offset, size, values in pieces}
        return self

    @classmethod
    def of(cls, shape: Iterable[int], rectangles: Iterable[tuple[tuple[int, ...], Tensor]]) -> "Pieces":
        """Wrap rectangles that exist (views are written into when loading)."""
        rectangles = list(rectangles)
        dtype = rectangles[0][1].dtype if rectangles else torch.float32
        return cls(shape, dtype, [(offset, piece.shape, piece) for offset, piece in rectangles])

    def made_late(self, offset: torch.Size | None) -> bool:
        """Whether the piece there is given as a function."""
        assert offset is not None, "DCP names a piece by its offset"
        return callable(self.pieces[offset][1])

    def _chunks(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offset, size) for offset, (size, _) in self.pieces.items()]

    def __create_write_items__(self, fqn: str, _) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                MetadataIndex(fqn, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.size()),
            )
            for chunk in self._chunks()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return self._chunks()

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None, "DCP names a piece by its offset"
        values = self.pieces[index.offset][1]
        return values() if callable(values) else values

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        raise NotImplementedError(f"Pieces holds no data of its own; {func} was called on it")


class Writer(FileSystemWriter):
    """Writes one file a rank, and digests it on the way.

    Args:
        released: called when every piece that was given as a function is written; those are written first.
    """

    def __init__(self, path: Path, released: Callable[[], None]):
        super().__init__(path, single_file_per_rank=True, sync_files=True)
        self._released = released
        self.digests: dict[str, str] = {}
        """Of the file that this rank has written, by its name."""
        self.num_bytes = 0
        """It has."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        name = f"{plan.storage_data.prefix}0.distcp"
        state: dict[str, Any] = planner.state_dict  # type: ignore[attr-defined]
        late: list[WriteItem] = []
        staged: list[WriteItem] = []
        for item in plan.items:
            (late if state[item.index.fqn].made_late(item.index.offset) else staged).append(item)
        results = []
        with open(Path(self.path) / name, "wb") as file:
            stream: Any = _Digested(file)
            for items in (late, staged):
                for item in items:
                    tensor: Any = planner.resolve_data(item)
                    tensor = tensor.detach().cpu()
                    if tensor.untyped_storage().nbytes() != tensor.nbytes:
                        tensor = tensor.clone()  # of a view, torch.save writes all that lies behind it
                    try:
                        written = _write_item(self.transforms, stream, tensor, item, name, self.serialization_format)
                    except RuntimeError as error:  # torch.save's own, about what it could not end
                        raise stream.error or error from None
                    results.append(written)
                if items is late:
                    self._released()
            file.flush()
            os.fsync(file.fileno())
            self.num_bytes = file.tell()
        self.digests[name] = stream.digest.hexdigest()
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


class _Digested(io.RawIOBase):
    """A file opened for writing that is digested meanwhile: what reached the disk is then held to what was meant."""

    def __init__(self, file):
        self._file, self.digest = file, integrity.new_digest()
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, content) -> int:
        self.digest.update(content)
        try:
            return self._file.write(content)
        except OSError as error:
            self.error = error
            raise

    def tell(self) -> int:
        return self._file.tell()


class Reader(FileSystemReader):
    """Reads a checkpoint whose index may come from anybody: only DCP's own records are unpickled.

    Before anything is read, every file is held to its digest, once in a process (`integrity.verify`).
    """

    _metadata: Metadata | None = None

    def read_metadata(self, *args, **kwargs) -> Metadata:
        if self._metadata is None:
            if (Path(self.path) / integrity.MANIFEST).is_file():  # DCP would wrap what `read_data` says
                integrity.verify(Path(self.path))
            path = self._get_metadata_path(kwargs.get("rank"))
            with open(path, "rb") as file:
                content = file.read()
            try:
                metadata = _IndexUnpickler(io.BytesIO(content)).load()
                _hold_to_files(metadata, Path(self.path))
            except Exception as error:  # a pickle can fail in any way
                raise ConfigError(f"{path}: not a checkpoint index ({error}).\n  Use another checkpoint.") from error
            if getattr(metadata, "storage_meta", None) is None:
                metadata.storage_meta = StorageMeta()
            self._metadata = metadata
        return self._metadata

    def read_data(self, plan, planner):
        integrity.verify(Path(self.path))
        return super().read_data(plan, planner)

    def shapes(self) -> dict[str, torch.Size]:
        """Global shape of every tensor in the checkpoint, by name."""
        entries = self.read_metadata().state_dict_metadata
        return {name: entry.size for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


def load(state: Mapping[str, Pieces], reader: Reader, group: dist.ProcessGroup | None = None) -> None:
    """Read what the pieces ask for into them.

    Args:
        group: of all ranks that read; None for this process alone.

    Raises:
        ConfigError: a part of a tensor is not what the index says.
    """
    try:
        dcp.load(dict(state), storage_reader=reader, process_group=group, no_dist=group is None)
    except CheckpointException as error:
        cause = next(iter(error.failures.values()), (error,))[0]
        words = (str(cause).splitlines() or [type(cause).__name__])[0]
        raise ConfigError(f"{reader.path}: a tensor cannot be read ({words}).\n  Use another checkpoint.") from error


def _hold_to_files(metadata: Any, folder: Path) -> None:
    """Refuse an index that claims what its files cannot hold, or names others than those of its folder.

    Raises:
        ValueError: in words.
    """
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise ValueError("no record of tensors and files")
    sizes: dict[str, int] = {}
    claimed: Counter = Counter()
    for place in metadata.storage_data.values():
        name = place.relative_path
        if not isinstance(name, str) or name != Path(name).name or name in ("", ".."):
            raise ValueError(f"it names the file {name!r}, which is not in the folder")
        if name not in sizes:
            sizes[name] = (folder / name).stat().st_size
        claimed[name] += place.length
        if place.offset < 0 or place.length < 0 or max(place.offset + place.length, claimed[name]) > sizes[name]:
            raise ValueError(f"{name} has {sizes[name]} bytes, less than its tensors take")
        if getattr(place, "transform_descriptors", None):
            raise ValueError(f"{name} is packed by {place.transform_descriptors[0]}")
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise ValueError(f"{name} is no tensor")  # but pickled: DCP would run what it says
        shape, itemsize = tuple(entry.size), entry.properties.dtype.itemsize
        numbers = [*shape, *(n for chunk in entry.chunks for n in (*chunk.sizes, *chunk.offsets))]
        if not all(isinstance(n, int) and 0 <= n < 1 << 63 for n in numbers) or not isinstance(name, str):
            raise ValueError(f"{name} has the shape {list(shape)}")
        for chunk in entry.chunks:
            length = metadata.storage_data[MetadataIndex(name, chunk.offsets)].length
            if math.prod(chunk.sizes) * itemsize > length or not len(shape) == len(chunk.sizes) == len(chunk.offsets):
                raise ValueError(f"a part of {name} claims {list(chunk.sizes)}, in {length} bytes")
        # Each number of a tensor lies in exactly one part: else what is loaded would be what was in memory before.
        # Of a node's own checkpoint, the parts are those that this rank asks for again.
        volume = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
        if volume != math.prod(shape) and not (folder / integrity.PLACE).is_file():
            raise ValueError(f"the parts of {name} {list(shape)} hold {volume} of its {math.prod(shape)} numbers")
    if wrong := _validate_global_plan([], metadata):
        raise ValueError(wrong[0])


class _IndexUnpickler(pickle.Unpickler):
    _NAMES = frozenset(
        {
            *(("torch.distributed.checkpoint.metadata", kept.__name__) for kept in _RECORDS),
            ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("torch", "Size"),
            ("torch", "device"),
            ("torch.serialization", "_get_layout"),
            ("collections", "OrderedDict"),
            ("pathlib", "PosixPath"),
        }
    )

    def find_class(self, module: str, name: str):
        if (module, name) == ("pathlib._local", "PosixPath"):
            module = "pathlib"  # as Python 3.13 writes it
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or (module, name) in self._NAMES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint index needs")


def read_whole(reader: Reader, name: str) -> Tensor:
    entry: Any = reader.read_metadata().state_dict_metadata[name]
    tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
    pieces = Pieces.of(entry.size, [((0,) * len(entry.size), tensor)])
    load({name: pieces}, reader)
    return tensor


def key_of(name: str, kind: str) -> str:
    return name if kind == "master" else f"optimizer.{kind}.{name}"


def kind_of(key: str) -> str:
    return key.split(".")[1] if key.startswith("optimizer.") else "master"
