"""Checkpoints on torch's distributed checkpoint (DCP): tensors in pieces, and a reader that trusts no pickle."""

import io
import pickle
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from igla_mega.config.errors import ConfigError


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


class Reader(FileSystemReader):
    """Reads a checkpoint whose index may come from anybody: only DCP's own records are unpickled."""

    _metadata: Metadata | None = None

    def read_metadata(self, *args, **kwargs) -> Metadata:
        if self._metadata is None:
            path = self._get_metadata_path(kwargs.get("rank"))
            with open(path, "rb") as file:
                content = file.read()
            try:
                self._metadata = _IndexUnpickler(io.BytesIO(content)).load()
            except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, ValueError) as error:
                raise ConfigError(f"{path}: not a checkpoint index ({error}).\n  Use another checkpoint.") from error
            if getattr(self._metadata, "storage_meta", None) is None:
                self._metadata.storage_meta = StorageMeta()
        return self._metadata

    def shapes(self) -> dict[str, torch.Size]:
        """Global shape of every tensor in the checkpoint, by name."""
        entries = self.read_metadata().state_dict_metadata
        return {name: entry.size for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


class _IndexUnpickler(pickle.Unpickler):
    _MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
    _NAMES = frozenset(
        {
            ("torch", "Size"),
            ("torch", "device"),
            ("torch.serialization", "_get_layout"),
            ("collections", "OrderedDict"),
            ("pathlib", "PosixPath"),
        }
    )

    def find_class(self, module: str, name: str):
        plain = "." not in name  # a dotted name could climb out of an allowed module
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        known = module in self._MODULES and isinstance(getattr(__import__(module, fromlist=[name]), name, None), type)
        if plain and (dtype or known or (module, name) in self._NAMES):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint index needs")
