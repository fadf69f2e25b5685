"""Decompress gzip, bzip2, xz and zstd in pieces of bounded size, however much a chunk expands to."""

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import Any

PIECE_BYTES = 1 << 20
"""Maximum size of a piece; zstd's may be larger."""
MAX_DENSE_BYTES, MAX_EXPANSION = 1 << 26, 200
"""A record of more bytes that were packed more densely than this many to one is no text but a decompression bomb."""


class Damaged(Exception):
    """Error for a file whose rest cannot be read."""


def is_dense(size: int, packed: int) -> bool:
    """Return True for data of a size, in bytes, that no text needs so few packed bytes for."""
    return size > MAX_DENSE_BYTES and size > MAX_EXPANSION * packed


def bomb(what: str, size: int, packed: int) -> Damaged:
    """Return the error for a record that `is_dense`."""
    return Damaged(f"a {what} of more than {size:,} bytes unpacked from {packed:,}: a decompression bomb")


class Unpacker:
    """Decompressor of one member of a compressed file, whose pieces are small however much a chunk expands to."""

    def __init__(self, unpacker: Any):
        self._unpacker = unpacker

    @property
    def eof(self) -> bool:
        """True if the member has ended."""
        return self._unpacker.eof

    @property
    def unused_data(self) -> bytes:
        """Bytes after the end of the member."""
        return self._unpacker.unused_data

    def pieces(self, chunk: bytes) -> Iterator[bytes]:
        """Yield the decompressed data of a chunk in pieces."""
        while True:
            piece = self._unpacker.decompress(chunk, PIECE_BYTES)
            if piece:
                yield piece
            # zlib returns the input that it did not consume; bz2 and lzma keep it.
            chunk = getattr(self._unpacker, "unconsumed_tail", b"")
            if self.eof or (len(piece) < PIECE_BYTES and not chunk):
                return


class Zstandard(Unpacker):
    """Decompressor of zstd, whose library takes no bound on its output: 512 bytes of input become 16 MiB at most."""

    _STEP = 1 << 9  # a block of four bytes may hold 128 KiB

    def __init__(self, large: bool):
        """Set the memory limit by the size of the file."""
        import zstandard

        # 128 MiB is the limit of the zstd command too, unless it is run with --long.
        window = 1 << 31 if large else 1 << 27
        super().__init__(zstandard.ZstdDecompressor(max_window_size=window).decompressobj())
        self._rest = b""

    @property
    def unused_data(self) -> bytes:
        """Bytes after the end of the member."""
        return self._unpacker.unused_data + self._rest

    def pieces(self, chunk: bytes) -> Iterator[bytes]:
        """Yield the decompressed data of a chunk in pieces."""
        for begin in range(0, len(chunk), self._STEP):
            if piece := self._unpacker.decompress(chunk[begin : begin + self._STEP]):
                yield piece
            if self.eof:
                self._rest = chunk[begin + self._STEP :]
                return


UNPACKERS: dict[str | None, Callable[[bool], Unpacker]] = {
    ".gz": lambda large: Unpacker(zlib.decompressobj(wbits=31)),
    ".bz2": lambda large: Unpacker(bz2.BZ2Decompressor()),
    ".xz": lambda large: Unpacker(lzma.LZMADecompressor(memlimit=(1 << 33 if large else 1 << 28))),
    ".zst": Zstandard,
}
"""Suffix -> constructor of a decompressor; the argument is True for a large file, which may need more memory."""
