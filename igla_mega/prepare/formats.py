"""The texts of JSONL, plain text and Parquet, packed or not: read in blocks that depend on the files alone.

A block is the unit of work: about BLOCK_BYTES of whole records. Where blocks end does not depend on who reads them, how
many at once, or where reading was taken up again, so that what is made of them does not either.
"""

import bz2
import glob
import json
import lzma
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from igla_mega.config.errors import ConfigError
from igla_mega.data.ahead import ahead
from igla_mega.data.raw_files import KINDS, LINES, PACKED, ROWS, SUFFIXES, TEXT

fast_loads: Callable[[Any], Any]
try:
    from orjson import loads as fast_loads
except ImportError:
    fast_loads = json.loads

BLOCK_BYTES = 1 << 20
"""Input bytes per unit of work: large enough to hide the hand-over, small enough that a few per worker fit anywhere."""
MAX_DOCUMENT_BYTES = 1 << 30
"""A longer record is broken: no document is that long, a file without line ends is."""
_ROWS_AT_ONCE = 256
_PACKED_CHUNK = 1 << 16
_LARGE_BYTES = 1 << 24
"""A packed file of at least this may ask for gigabytes of window, as `zstd --long=31` does; a smaller one cannot need
them."""

OnError = Literal["stop", "skip", "quarantine"]


class Position(NamedTuple):
    """Where reading goes on."""

    file: int
    """Number of the input."""
    offset: int
    """Bytes, unpacked, or rows of it that are done."""
    record: int
    """Records of it that are done."""
    taken: int = 0
    """Bytes of it, as it lies on disk, that were counted for what is done."""


BEGIN = Position(0, 0, 0)


class Input(NamedTuple):
    """A file, or the whole lines of one between two offsets."""

    path: str
    size: int
    start: int = 0
    stop: int | None = None
    """None: to its end."""

    @property
    def kind(self) -> str:
        suffixes = [suffix for suffix in Path(self.path).suffixes if suffix not in PACKED]
        return KINDS.get(suffixes[-1] if suffixes else "", LINES)

    @property
    def packing(self) -> str | None:
        suffix = Path(self.path).suffix
        return suffix if suffix in PACKED else None


@dataclass
class Block:
    """Whole records."""

    kind: str
    file: str
    first: int
    """Number of the first record in its file, from 1."""
    data: Any
    """Bytes of lines; of whole text files, a list of (file, bytes); of rows, a list of (text or None, language or
    None)."""
    after: Position
    input_bytes: int
    """Of the files, as they lie on disk, that this block took."""
    damage: str | None = None
    """What ended the file before its time; the block holds what could be read until then."""
    counted_from: int = 0
    """Byte of the file from which records are counted."""
    files: tuple[int, int] = (0, 0)
    """Numbers of the first and of the last input that it is of."""


class Broken(NamedTuple):
    """A record that holds no text."""

    place: str
    reason: str
    record: str
    """As far as it can be shown."""


class Texts(NamedTuple):
    texts: list[str]
    languages: list[str | None]
    """Of each text; empty unless a key was given."""
    empty: int
    broken: list[Broken]


class Damaged(Exception):
    """A packed file that ends too soon, or is none."""


def input_files(inputs: Sequence[str | Path]) -> list[Path]:
    """The files behind paths, patterns (`*`, `**`) and folders, in order; every one there and not empty.

    Raises:
        ConfigError: all that is wrong with them, together.
    """
    files: list[Path] = []
    breaches = []
    for given in map(Path, inputs):
        found = [given]
        if given.is_dir():
            found = sorted(file for file in given.rglob("*") if file.name.endswith(SUFFIXES) and file.is_file())
        elif not given.exists() and glob.has_magic(str(given)):
            found = sorted(file for name in glob.glob(str(given), recursive=True) if (file := Path(name)).is_file())
        if not found:
            breaches.append(
                f"{given}: no *.jsonl, *.txt or *.parquet in this folder, or no file of this pattern.\n"
                "  Give JSONL, plain text or Parquet files, packed as .gz, .zst, .bz2 or .xz or not."
            )
        for file in found:
            if not file.is_file():
                breaches.append(f"{file}: no such file.\n  Give the path of a text file or a folder of them.")
            elif file.stat().st_size == 0:
                breaches.append(f"{file}: the file is empty.\n  Give it text, or leave it out.")
            else:
                breaches += _lacking(file)
                files.append(file)
    if breaches:
        raise ConfigError(*dict.fromkeys(breaches))
    return files


def _lacking(file: Path) -> list[str]:
    """What a file needs that is not installed."""
    needed = {".zst": "zstandard", ".parquet": "pyarrow"}.get(file.suffix)
    if needed is not None:
        try:
            __import__(needed)
        except ImportError:
            return [f"{file}: {file.suffix} needs {needed}, which is not installed.\n  pip install 'igla-mega[data]'"]
    return []


def whole(files: Iterable[Path]) -> list[Input]:
    """Every file from its begin to its end."""
    return [Input(str(file), file.stat().st_size) for file in files]


def share(files: Sequence[Path], part: int, parts: int) -> list[Input]:
    """What the `part`-th of `parts` machines (from 0) reads: contiguous, so that parts joined in order are the whole.

    A plain JSONL file is cut between lines; a packed, text or Parquet file belongs to the part that its first byte
    falls into.
    """
    sizes = [file.stat().st_size for file in files]
    low, high = sum(sizes) * part // parts, sum(sizes) * (part + 1) // parts
    inputs, begin = [], 0
    for file, size in zip(files, sizes, strict=True):
        whole_file = Input(str(file), size)
        if whole_file.kind == LINES and whole_file.packing is None:
            start, stop = (line_start(file, min(max(border - begin, 0), size), size) for border in (low, high))
            if start < stop:
                inputs.append(whole_file._replace(start=start, stop=stop))
        elif low <= begin < high:
            inputs.append(whole_file)
        begin += size
    return inputs


def line_start(file: str | Path, offset: int, size: int) -> int:
    """The first line's start at or behind an offset."""
    if offset in (0, size):
        return offset
    with open(file, "rb") as stream:
        stream.seek(offset - 1)
        while (piece := stream.readline(BLOCK_BYTES)) and not piece.endswith(b"\n"):
            pass
        return stream.tell()


class How(NamedTuple):
    """What decides about the records of a file."""

    text_key: str = "text"
    text_documents: str = "file"
    """`file` or `line`: what a document of plain text is."""
    language_key: str | None = None


def blocks(inputs: Sequence[Input], start: Position, how: How, *, files_at_once: int = 1) -> Iterator[Block]:
    """The blocks of all inputs behind `start`, in order, read ahead by threads.

    Args:
        files_at_once: packed files that are unpacked at the same time.
    """
    if files_at_once > 1 and any(given.packing for given in inputs):
        yield from _joined(_several_at_once(inputs, start, how, files_at_once))
    else:
        yield from ahead(_joined(blocks_of(inputs, how, start)), 4)


def blocks_of(inputs: Sequence[Input], how: How, start: Position = BEGIN) -> Iterator[Block]:
    """The same, read when they are asked for, small files each by themselves."""
    for number in range(start.file, len(inputs)):
        yield from _blocks_of_one(inputs, number, how, start)


def _blocks_of_one(inputs: Sequence[Input], number: int, how: How, start: Position) -> Iterator[Block]:
    given = inputs[number]
    begin = start if number == start.file else Position(number, 0, 0)
    if given.kind == ROWS:
        return _row_blocks(given, begin, how.text_key, how.language_key)
    if given.kind == TEXT and how.text_documents == "file":
        return _text_blocks(given, begin)
    return _line_blocks(given, begin, TEXT if given.kind == TEXT else LINES)


def _several_at_once(inputs: Sequence[Input], start: Position, how: How, files_at_once: int) -> Iterator[Block]:
    under_way: deque[Iterator[Block]] = deque()
    for number in range(start.file, len(inputs)):
        under_way.append(ahead(_blocks_of_one(inputs, number, how, start), 2))
        if len(under_way) == files_at_once:
            yield from under_way.popleft()
    for one in under_way:
        yield from one


def _joined(single: Iterator[Block]) -> Iterator[Block]:
    """Join blocks of whole text files, which may be small, up to BLOCK_BYTES."""
    held: list[Block] = []
    size = 0
    for block in single:
        joins = block.kind == TEXT and isinstance(block.data, list) and block.damage is None
        if held and (not joins or size >= BLOCK_BYTES):
            yield _join(held)
            held, size = [], 0
        if joins:
            held.append(block)
            size += len(block.data[0][1])
        else:
            yield block
    if held:
        yield _join(held)


def _join(held: list[Block]) -> Block:
    return Block(
        TEXT,
        held[0].file,
        1,
        [document for block in held for document in block.data],
        held[-1].after,
        sum(block.input_bytes for block in held),
        files=(held[0].files[0], held[-1].files[1]),
    )


def _line_blocks(given: Input, begin: Position, kind: str) -> Iterator[Block]:
    chunks = _Chunks(given, begin.offset or given.start)
    offset, record, said = begin.offset or given.start, begin.record, begin.taken
    number = begin.file
    carried = bytearray()

    def block(data: bytes | bytearray, damage: str | None = None) -> Block:
        nonlocal offset, record, said
        first = record + 1
        offset += len(data)
        record += data.count(b"\n")
        taken, said = chunks.taken - said, chunks.taken
        after = Position(number, offset, record, said) if damage is None else Position(number + 1, 0, 0)
        return Block(kind, given.path, first, data, after, taken, damage, given.start, (number, number))

    try:
        for chunk in chunks:
            cut = chunk.rfind(b"\n") + 1
            view = memoryview(chunk)
            if cut and len(carried) < 8 * BLOCK_BYTES:
                yield block(b"".join((carried, view[:cut])))
                carried = bytearray(view[cut:])
                continue
            carried += view[:cut]
            if cut:  # a long document is not copied once more
                yield block(carried)
                carried = bytearray()
            carried += view[cut:]
            if len(carried) > MAX_DOCUMENT_BYTES:
                raise Damaged(f"a line of more than {MAX_DOCUMENT_BYTES:,} bytes")
    except (Damaged, OSError) as error:
        # What was whole before the damage is text like any other; the line it cuts is not.
        yield block(bytes(carried), str(error))
        return
    if carried:
        yield block(carried if len(carried) >= 8 * BLOCK_BYTES else bytes(carried))


def _text_blocks(given: Input, begin: Position) -> Iterator[Block]:
    if begin.record:
        return
    text = bytearray()
    damage = None
    try:
        for chunk in _Chunks(given, 0):
            text += chunk
            if len(text) > MAX_DOCUMENT_BYTES:
                raise Damaged(f"a document of more than {MAX_DOCUMENT_BYTES:,} bytes; split it, or read it by lines")
    except (Damaged, OSError) as error:
        damage, text = str(error), bytearray()
    number = begin.file
    data = [(given.path, text if len(text) >= 8 * BLOCK_BYTES else bytes(text))] if damage is None else []
    after = Position(number, len(text), 1)
    yield Block(TEXT, given.path, 1, data, after, given.size, damage, files=(number, number))


class _Chunks:
    """Bytes of a file, unpacked, cut at the multiples of BLOCK_BYTES."""

    def __init__(self, given: Input, offset: int):
        self.given, self.offset = given, offset
        self.taken = 0
        """Bytes read of the file as it lies on disk."""

    def __iter__(self) -> Iterator[bytes]:
        with open(self.given.path, "rb") as stream:
            if self.given.packing is None:
                yield from self._plain(stream)
            else:
                yield from self._regular(self._unpacked(stream))

    def _plain(self, stream: Any) -> Iterator[bytes]:
        at = stream.seek(self.offset)
        stop = self.given.size if self.given.stop is None else self.given.stop
        while at < stop and (chunk := stream.read(min(BLOCK_BYTES - at % BLOCK_BYTES, stop - at))):
            at += len(chunk)
            self.taken = at - self.given.start
            yield chunk

    def _regular(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        """From `offset` on; what was done before is unpacked once more, and left out."""
        at, held, size = 0, [], 0
        error: Exception | None = None
        while True:
            try:
                piece = next(pieces, b"")
            except Damaged as damage:
                piece, error = b"", damage
            if not piece:
                break
            begin, at = at, at + len(piece)
            if at <= self.offset:
                continue
            held.append(piece[max(self.offset - begin, 0) :])
            size += len(held[-1])
            while size >= (room := BLOCK_BYTES - (at - size) % BLOCK_BYTES):
                joined = b"".join(held)
                yield joined[:room]
                held, size = [joined[room:]], size - room
        if size:
            yield b"".join(held)
        if error is not None:
            raise error

    def _unpacked(self, stream: Any) -> Iterator[bytes]:
        packing = self.given.packing
        unpacker: Any = None
        rest = b""
        any_member = False
        while True:
            chunk = rest or stream.read(_PACKED_CHUNK)
            if not rest:
                self.taken += len(chunk)
            rest = b""
            if unpacker is None:
                # Tapes and block devices fill up with zeros behind the last member.
                chunk = chunk.lstrip(b"\0") if any_member else chunk
                if not chunk:
                    if stream.tell() >= self.given.size:
                        return
                    continue
                unpacker = _UNPACKERS[packing](self.given.size >= _LARGE_BYTES)
            elif not chunk:
                raise Damaged(f"cut short: the {packing} data ends before its end mark")
            try:
                yield from unpacker.pieces(chunk)
            except Exception as error:  # each library has its own
                raise Damaged(f"damaged {packing} data ({error})") from None
            if unpacker.eof:
                any_member, rest, unpacker = True, unpacker.unused_data, None


class _Bounded:
    """An unpacker whose pieces are small, however much a chunk unpacks to."""

    def __init__(self, unpacker: Any):
        self._unpacker = unpacker

    @property
    def eof(self) -> bool:
        return self._unpacker.eof

    @property
    def unused_data(self) -> bytes:
        return self._unpacker.unused_data

    def pieces(self, chunk: bytes) -> Iterator[bytes]:
        while True:
            piece = self._unpacker.decompress(chunk, BLOCK_BYTES)
            if piece:
                yield piece
            chunk = getattr(self._unpacker, "unconsumed_tail", b"")
            # zlib hands back what it did not take, the others keep it.
            if self.eof or (len(piece) < BLOCK_BYTES and not chunk):
                return


class _Zstandard(_Bounded):
    """Its unpacker takes no bound: 2 KiB at a time, which become 64 MiB at most."""

    _STEP = 1 << 11

    def __init__(self, large: bool):
        import zstandard

        # 128 MiB is what zstd itself allows unless told otherwise.
        window = 1 << 31 if large else 1 << 27
        super().__init__(zstandard.ZstdDecompressor(max_window_size=window).decompressobj())
        self._behind = b""

    @property
    def unused_data(self) -> bytes:
        return self._unpacker.unused_data + self._behind

    def pieces(self, chunk: bytes) -> Iterator[bytes]:
        for begin in range(0, len(chunk), self._STEP):
            if piece := self._unpacker.decompress(chunk[begin : begin + self._STEP]):
                yield piece
            if self.eof:
                self._behind = chunk[begin + self._STEP :]
                return


_UNPACKERS: dict[str | None, Callable[[bool], _Bounded]] = {
    ".gz": lambda large: _Bounded(zlib.decompressobj(wbits=31)),
    ".bz2": lambda large: _Bounded(bz2.BZ2Decompressor()),
    ".xz": lambda large: _Bounded(lzma.LZMADecompressor(memlimit=(1 << 33 if large else 1 << 28))),
    ".zst": _Zstandard,
}


def _row_blocks(given: Input, begin: Position, text_key: str, language_key: str | None) -> Iterator[Block]:
    import pyarrow
    from pyarrow import parquet

    number, row, first, said = begin.file, 0, 0, begin.taken
    data: list[tuple[str | None, str | None]] = []

    def block(damage: str | None = None) -> Block:
        nonlocal said, data
        taken = given.size if damage is not None else given.size * row // max(file.metadata.num_rows, 1)
        rows, data = data, []
        taken, said = taken - said, taken
        after = Position(number, row, row, said) if damage is None else Position(number + 1, 0, 0)
        return Block(ROWS, given.path, first + 1, rows, after, taken, damage, files=(number, number))

    try:
        file = parquet.ParquetFile(given.path, pre_buffer=False, buffer_size=BLOCK_BYTES)
        schema = file.schema_arrow
    except (pyarrow.ArrowException, OSError, ValueError, MemoryError) as error:
        yield block(f"not a Parquet file, or cut short ({_first_line(error)})")
        return
    with file:
        columns = _columns(given.path, schema, text_key, language_key)
        size = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if row + rows <= begin.offset:
                row += rows
                first = row
                continue
            try:
                for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=columns, use_threads=False):
                    row += len(batch)
                    if row <= begin.offset:
                        first = row
                        continue
                    texts = batch.column(text_key).to_pylist()
                    tags = batch.column(columns[1]).to_pylist() if len(columns) > 1 else [None] * len(texts)
                    data += zip(texts, tags, strict=True)
                    size += batch.nbytes
                    if size >= BLOCK_BYTES or row == file.metadata.num_rows:
                        yield block()
                        size, first = 0, row
            except (pyarrow.ArrowException, OSError, ValueError, LookupError, MemoryError) as error:
                yield block(f"damaged Parquet data ({_first_line(error)})")
                return
        if row != file.metadata.num_rows:
            yield block(f"damaged Parquet data ({row} rows where it says {file.metadata.num_rows})")


def _columns(path: str, schema: Any, text_key: str, language_key: str | None) -> list[str]:
    """The columns to read."""
    from pyarrow import types

    if text_key not in schema.names:
        raise ConfigError(
            f"{path}: no column `{text_key}` (there are: {', '.join(schema.names[:8]) or 'none'}).\n"
            "  Name the column of the text: data.text_key (--json-keys)."
        )
    if twice := [name for name in (text_key, language_key) if schema.names.count(name) > 1]:
        raise ConfigError(f"{path}: several columns `{twice[0]}`.\n  Name another: data.text_key (--json-keys).")
    held = schema.field(text_key).type
    held = held.value_type if types.is_dictionary(held) else held
    if not (types.is_string(held) or types.is_large_string(held)):
        raise ConfigError(
            f"{path}: column `{text_key}` holds {held}, not strings.\n"
            "  Name the column of the text: data.text_key (--json-keys)."
        )
    return [text_key, language_key] if language_key in schema.names and language_key else [text_key]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
