"""Write and read tensors in pieces with torch's distributed checkpoint (DCP), without unpickling untrusted data."""

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
from igla_mega.config.files import read_bytes, regular

# The classes of DCP's index that may be unpickled.
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
    """The rectangles of one global tensor that this rank writes or reads, for DCP's planner.

    A piece may be given as a function that returns the tensor. It is called when the piece is written, so that one
    piece is in memory at a time.
    """

    pieces: dict[torch.Size, tuple[torch.Size, Tensor | Callable[[], Tensor]]]
    """Size and values of each rectangle, by its offset in the global tensor."""

    @staticmethod
    def __new__(cls, shape: Iterable[int], dtype: torch.dtype, pieces):
        """Create the global tensor of `shape` without memory of its own.

        Args:
            pieces: (offset, size, values) of each rectangle.
        """
        # A Tensor subclass, because DCP's planner handles a Tensor with the three methods below as one that is
        # sharded; it never reads the wrapper's own data.
        self = torch.Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=dtype, device=torch.device("cpu"))
        self.pieces = {torch.Size(offset): (torch.Size(size), values) for offset, size, values in pieces}
        return self

    @classmethod
    def of(cls, shape: Iterable[int], rectangles: Iterable[tuple[tuple[int, ...], Tensor]]) -> "Pieces":
        """Wrap rectangles that are in memory; loading writes into them, also into views."""
        rectangles = list(rectangles)
        dtype = rectangles[0][1].dtype if rectangles else torch.float32
        return cls(shape, dtype, [(offset, piece.shape, piece) for offset, piece in rectangles])

    def made_late(self, offset: torch.Size | None) -> bool:
        """Return True if the piece at this offset is given as a function."""
        assert offset is not None, "DCP names a piece by its offset"
        return callable(self.pieces[offset][1])

    def _chunks(self) -> list[ChunkStorageMetadata]:
        """Return DCP's description of every piece."""
        return [ChunkStorageMetadata(offset, size) for offset, (size, _) in self.pieces.items()]

    def __create_write_items__(self, fqn: str, _) -> list[WriteItem]:
        """Return what this rank writes of the tensor (called by DCP's save planner)."""
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
        """Return what this rank reads of the tensor (called by DCP's load planner)."""
        return self._chunks()

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        """Return the values of one piece, made now if it is given as a function."""
        assert index.offset is not None, "DCP names a piece by its offset"
        values = self.pieces[index.offset][1]
        return values() if callable(values) else values

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        """Reject every operation: the wrapper has no values."""
        raise NotImplementedError(f"Pieces holds no data of its own; {func} was called on it")


class Writer(FileSystemWriter):
    """Writes one file per rank, and computes its digest while writing.

    Args:
        released: called when all pieces given as functions are written; these are written first, because the training
            thread waits for them.
    """

    def __init__(self, path: Path, released: Callable[[], None]):
        super().__init__(path, single_file_per_rank=True, sync_files=True)
        self._released = released
        self.digests: dict[str, str] = {}
        """Digest of the file that this rank has written, by its name."""
        self.num_bytes = 0
        """Size of that file."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's pieces into one file; replaces DCP's own loop.

        DCP's writer keeps the tensors of a file in memory until the file is complete (torch 2.13, filesystem.py:451),
        does not say when the pieces given as functions are done, and has no place to compute the digest.
        """
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
                        # torch.save writes the whole storage behind a view.
                        tensor = tensor.clone()
                    try:
                        written = _write_item(self.transforms, stream, tensor, item, name, self.serialization_format)
                    except RuntimeError as error:
                        # On a failed write torch.save raises about its unfinished zip archive; the cause (such as a
                        # full disk) is the stream's error.
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
    """A file opened for writing that computes the digest of the bytes passed to it.

    The digest is of what should be on the disk, so that reading the file later checks the disk too.
    """

    def __init__(self, file):
        self._file, self.digest = file, integrity.new_digest()
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, content) -> int:
        """Write and digest bytes, keeping an OSError for the caller of torch.save."""
        self.digest.update(content)
        try:
            return self._file.write(content)
        except OSError as error:
            self.error = error
            raise

    def tell(self) -> int:
        return self._file.tell()


class Reader(FileSystemReader):
    """Reads a checkpoint from an untrusted source: its index is a pickle, of which only DCP's own classes are loaded.

    Every file is first checked against its digest, once per process (`integrity.verify`). The tensors themselves are
    loaded by DCP with `weights_only=True`.
    """

    _metadata: Metadata | None = None

    def read_metadata(self, *args, **kwargs) -> Metadata:
        """Return the index, checked against the files of the folder.

        Raises:
            ConfigError: the checkpoint is damaged, or its index is not one of a checkpoint.
        """
        if self._metadata is None:
            # Here too, not only in `read_data`: an error raised there reaches the user wrapped in DCP's own. A folder
            # without a manifest is one that is being written (`store.write_manifest`).
            if (Path(self.path) / integrity.MANIFEST).is_file():
                integrity.verify(Path(self.path))
            path = self._get_metadata_path(kwargs.get("rank"))
            with open(path, "rb", opener=regular) as file:
                content = file.read()
            try:
                metadata = _IndexUnpickler(io.BytesIO(content)).load()
                _check_against_files(metadata, Path(self.path))
            except Exception as error:  # an invalid pickle can raise an exception of any type
                raise ConfigError(f"{path}: not a checkpoint index ({error}).\n  Use another checkpoint.") from error
            if getattr(metadata, "storage_meta", None) is None:
                metadata.storage_meta = StorageMeta()
            self._metadata = metadata
        return self._metadata

    def read_data(self, plan, planner):
        """Read the planned pieces after a check of the digests."""
        integrity.verify(Path(self.path))
        return super().read_data(plan, planner)

    def shapes(self) -> dict[str, torch.Size]:
        """Return the global shape of every tensor in the checkpoint, by name."""
        entries = self.read_metadata().state_dict_metadata
        return {name: entry.size for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


def load(state: Mapping[str, Pieces], reader: Reader, group: dist.ProcessGroup | None = None) -> None:
    """Read the pieces of every tensor from a checkpoint, in place.

    Args:
        group: all ranks that read; None for this process alone.

    Raises:
        ConfigError: a piece of a tensor does not match the index.
    """
    try:
        dcp.load(dict(state), storage_reader=reader, process_group=group, no_dist=group is None)
    except CheckpointException as error:
        cause = next(iter(error.failures.values()), (error,))[0]
        words = (str(cause).splitlines() or [type(cause).__name__])[0]
        raise ConfigError(f"{reader.path}: a tensor cannot be read ({words}).\n  Use another checkpoint.") from error


def _check_against_files(metadata: Any, folder: Path) -> None:
    """Reject an index that its files cannot satisfy, or that names files outside its folder.

    Raises:
        ValueError: the message gives the reason.
    """
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise ValueError("it is not an index of tensors and files")
    _check_files(metadata, folder)
    if (folder / integrity.MANIFEST).is_file():
        named = integrity.read_manifest(read_bytes(folder / integrity.MANIFEST))
        if unlisted := {storage.relative_path for storage in metadata.storage_data.values()} - named.keys():
            raise ValueError(f"{min(unlisted)} is not in {integrity.MANIFEST}, so that nothing has checked it")
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            # DCP would unpickle such an entry without restrictions, and so run code of its author's choice.
            raise ValueError(f"{name} is not a tensor")
        _check_tensor(name, entry, metadata, folder)
    if wrong := _validate_global_plan([], metadata):
        raise ValueError(wrong[0])


def _check_files(metadata: Metadata, folder: Path) -> None:
    """Reject pieces that are stored outside the folder, beyond the end of their file, or in a transformed encoding."""
    sizes: dict[str, int] = {}
    used: Counter = Counter()
    for storage in metadata.storage_data.values():
        name = storage.relative_path
        if not isinstance(name, str) or name != Path(name).name or name in ("", ".."):
            raise ValueError(f"it names the file {name!r}, which is not in the folder")
        if name not in sizes:
            sizes[name] = (folder / name).stat().st_size
        # Also the sum: pieces that overlap in the file would let a small file claim a tensor of any size.
        used[name] += storage.length
        if storage.offset < 0 or storage.length < 0 or max(storage.offset + storage.length, used[name]) > sizes[name]:
            raise ValueError(f"{name} has {sizes[name]} bytes, less than its tensors need")
        if getattr(storage, "transform_descriptors", None):
            raise ValueError(f"{name} is encoded by {storage.transform_descriptors[0]}")


def _check_tensor(name: Any, entry: TensorStorageMetadata, metadata: Metadata, folder: Path) -> None:
    """Reject a tensor whose pieces do not fit its shape, their bytes, or one another."""
    shape, itemsize = tuple(entry.size), entry.properties.dtype.itemsize
    numbers = [*shape, *(n for chunk in entry.chunks for n in (*chunk.sizes, *chunk.offsets))]
    if not all(isinstance(n, int) and 0 <= n < 1 << 63 for n in numbers) or not isinstance(name, str):
        raise ValueError(f"{name} has the shape {list(shape)}")
    for chunk in entry.chunks:
        length = metadata.storage_data[MetadataIndex(name, chunk.offsets)].length
        if math.prod(chunk.sizes) * itemsize > length or not len(shape) == len(chunk.sizes) == len(chunk.offsets):
            raise ValueError(f"a part of {name} claims {list(chunk.sizes)}, in {length} bytes")
    # Together the pieces must cover the tensor: an element in none of them would be loaded as whatever was in
    # memory before. A rank's local checkpoint is exempt: it holds exactly the pieces that this rank reads again.
    volume = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
    if volume != math.prod(shape) and not (folder / integrity.PLACE).is_file():
        raise ValueError(f"the parts of {name} {list(shape)} hold {volume} of its {math.prod(shape)} numbers")


class _IndexUnpickler(pickle.Unpickler):
    """Unpickler that loads only the classes of which DCP's index consists: any other name could run code."""

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
        """Return a class or function that the pickle names, if it is on the list."""
        # Python 3.13 pickles paths under this module, which earlier versions do not have.
        if (module, name) == ("pathlib._local", "PosixPath"):
            module = "pathlib"
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or (module, name) in self._NAMES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint index needs")


def read_whole(reader: Reader, name: str) -> Tensor:
    """Read one whole tensor of a checkpoint, in its stored type, on the CPU."""
    entry: Any = reader.read_metadata().state_dict_metadata[name]
    tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
    pieces = Pieces.of(entry.size, [((0,) * len(entry.size), tensor)])
    load({name: pieces}, reader)
    return tensor


def key_of(name: str, kind: str) -> str:
    """Return the checkpoint's key for a parameter's value of a kind ("master" or an optimizer state)."""
    return name if kind == "master" else f"optimizer.{kind}.{name}"


def kind_of(key: str) -> str:
    """Return the kind of value that a checkpoint's key stands for; the inverse of `key_of`."""
    return key.split(".")[1] if key.startswith("optimizer.") else "master"
