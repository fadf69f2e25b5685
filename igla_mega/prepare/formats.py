"""Read JSONL, plain text and Parquet, compressed or not, in blocks that depend on the files only.

A block is the unit of work: about BLOCK_BYTES of whole records. The borders of the blocks do not depend on the number
of readers or on where reading resumed, so the output does not depend on them either.
"""

import glob
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from igla_mega.config.errors import ConfigError
from igla_mega.data.ahead import ahead
from igla_mega.data.raw_files import KINDS, LINES, PACKED, ROWS, SUFFIXES, TEXT
from igla_mega.prepare.unpacking import UNPACKERS

fast_loads: Callable[[Any], Any]
try:
    from orjson import loads as fast_loads
except ImportError:
    fast_loads = json.loads

BLOCK_BYTES = 1 << 20
"""Input bytes per unit of work: large enough to hide the cost of a queue, small enough for any memory."""
MAX_DOCUMENT_BYTES = 1 << 30
"""Maximum size of a record; a longer one is an error, typically a file without line ends."""
_ROWS_AT_ONCE = 256
_PACKED_CHUNK = 1 << 16
_LARGE_BYTES = 1 << 24
"""Minimum size of a compressed file that may use a window of gigabytes, as `zstd --long=31` does."""

OnError = Literal["stop", "skip", "quarantine"]


class Position(NamedTuple):
    """Position in the input at which reading continues."""

    file: int
    """Number of the input."""
    offset: int
    """Number of decompressed bytes, or rows, of the input that are done."""
    record: int
    """Number of records of the input that are done."""
    taken: int = 0
    """Number of bytes on disk counted for what is done."""


BEGIN = Position(0, 0, 0)


class Input(NamedTuple):
    """A file, or the whole lines between two offsets of it."""

    path: str
    size: int
    start: int = 0
    stop: int | None = None
    """End offset; None for the end of the file."""

    @property
    def kind(self) -> str:
        """Kind of the records: `LINES`, `TEXT` or `ROWS`."""
        suffixes = [suffix for suffix in Path(self.path).suffixes if suffix not in PACKED]
        return KINDS.get(suffixes[-1] if suffixes else "", LINES)

    @property
    def packing(self) -> str | None:
        """Suffix of the compression, or None."""
        suffix = Path(self.path).suffix
        return suffix if suffix in PACKED else None


@dataclass
class Block:
    """Unit of work: about BLOCK_BYTES of whole records."""

    kind: str
    file: str
    first: int
    """Number of the first record in its file, from 1."""
    data: Any
    """Bytes for lines, a list of (file, bytes) for whole text files, a list of (text or row, language) for rows."""
    after: Position
    """Position at which reading continues after the block."""
    input_bytes: int
    """Number of bytes on disk that the block took."""
    damage: str | None = None
    """Error that ended the file early; the block then holds what could be read."""
    counted_from: int = 0
    """Byte offset in the file from which records are counted."""
    files: tuple[int, int] = (0, 0)
    """Numbers of the first and the last input that the block comes from."""


class Broken(NamedTuple):
    """Record that holds no text."""

    place: str
    reason: str
    record: str
    """Content of the record as text, possibly shortened."""


class Texts(NamedTuple):
    """Texts of a block."""

    texts: list[str]
    languages: list[str | None]
    """Language tag of each text; empty without a language key."""
    empty: int
    """Number of records with an empty text."""
    broken: list[Broken]


class Damaged(Exception):
    """Error for a file whose rest cannot be read."""


def input_files(inputs: Sequence[str | Path]) -> list[Path]:
    """Return the files that paths, patterns (`*`, `**`) and folders refer to, in order.

    Raises:
        ConfigError: lists all files that are missing, empty or need a package that is not installed.
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
                f"{given}: no *.jsonl, *.txt or *.parquet in this folder, or no file matches this pattern.\n"
                "  Give JSONL, plain text or Parquet files; the first two may be compressed (.gz, .zst, .bz2, .xz)."
            )
        for file in found:
            if not file.is_file():
                breaches.append(f"{file}: no such file.\n  Give the path of a text file or a folder of them.")
            elif file.stat().st_size == 0:
                breaches.append(f"{file}: the file is empty.\n  Add text to it, or remove it from the inputs.")
            else:
                breaches += _lacking(file)
                files.append(file)
    if breaches:
        raise ConfigError(*dict.fromkeys(breaches))
    return files


def _lacking(file: Path) -> list[str]:
    """Return an error if a file's format needs a package that is not installed."""
    needed = {".zst": "zstandard", ".parquet": "pyarrow"}.get(file.suffix)
    if needed is not None:
        try:
            __import__(needed)
        except ImportError:
            return [f"{file}: {file.suffix} needs {needed}, which is not installed.\n  pip install 'igla-mega[data]'"]
    return []


def whole(files: Iterable[Path]) -> list[Input]:
    """Return an input for every whole file."""
    return [Input(str(file), file.stat().st_size) for file in files]


def share(files: Sequence[Path], part: int, parts: int) -> list[Input]:
    """Return the inputs of part `part` (from 0) of `parts`; contiguous, and in order the whole.

    An uncompressed JSONL file is split between lines. A compressed, plain text or Parquet file belongs to the part that
    contains its first byte.
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
    """Return the offset of the first line that starts at or after an offset."""
    if offset in (0, size):
        return offset
    with open(file, "rb") as stream:
        stream.seek(offset - 1)  # one byte earlier: a line may start exactly at the offset
        while (piece := stream.readline(BLOCK_BYTES)) and not piece.endswith(b"\n"):
            pass
        return stream.tell()


class How(NamedTuple):
    """Options that determine the records of a file."""

    text_key: str | None = "text"
    """Key or column of the text; None for rows with all their columns."""
    text_documents: str = "file"
    """Unit that forms a document of plain text: `file` or `line`."""
    language_key: str | None = None
    """Key or column of the language tag."""


def blocks(inputs: Sequence[Input], start: Position, how: How, *, files_at_once: int = 1) -> Iterator[Block]:
    """Yield the blocks of all inputs after `start`, in order, read ahead by threads.

    Args:
        files_at_once: number of compressed files that are decompressed concurrently.
    """
    if files_at_once > 1 and any(given.packing for given in inputs):
        yield from _joined(_several_at_once(inputs, start, how, files_at_once))
    else:
        yield from ahead(_joined(blocks_of(inputs, how, start)), 4)


def blocks_of(inputs: Sequence[Input], how: How, start: Position = BEGIN) -> Iterator[Block]:
    """Yield the same blocks without reading ahead and without joining small files."""
    for number in range(start.file, len(inputs)):
        yield from _blocks_of_one(inputs, number, how, start)


def _blocks_of_one(inputs: Sequence[Input], number: int, how: How, start: Position) -> Iterator[Block]:
    """Return the blocks of one input after `start`."""
    given = inputs[number]
    begin = start if number == start.file else Position(number, 0, 0)
    if given.kind == ROWS:
        return _row_blocks(given, begin, how.text_key, how.language_key)
    if given.kind == TEXT and how.text_documents == "file":
        return _text_blocks(given, begin)
    return _line_blocks(given, begin, TEXT if given.kind == TEXT else LINES)


def _several_at_once(inputs: Sequence[Input], start: Position, how: How, files_at_once: int) -> Iterator[Block]:
    """Yield the blocks of all inputs in order, with several inputs being read by their own threads."""
    reading: deque[Iterator[Block]] = deque()
    for number in range(start.file, len(inputs)):
        reading.append(ahead(_blocks_of_one(inputs, number, how, start), 2))
        if len(reading) == files_at_once:
            yield from reading.popleft()
    for one in reading:
        yield from one


def _joined(single: Iterator[Block]) -> Iterator[Block]:
    """Yield the blocks with those of small whole text files joined up to BLOCK_BYTES."""
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
    """Return one block of several blocks of whole text files."""
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
    """Yield blocks of whole lines."""
    chunks = _Chunks(given, begin.offset or given.start)
    offset, record, counted = begin.offset or given.start, begin.record, begin.taken
    number = begin.file
    carried = bytearray()

    def block(data: bytes | bytearray, damage: str | None = None) -> Block:
        """Return a block of the given data and move the position behind it."""
        nonlocal offset, record, counted
        first = record + 1
        offset += len(data)
        record += data.count(b"\n")
        taken, counted = chunks.taken - counted, chunks.taken
        after = Position(number, offset, record, counted) if damage is None else Position(number + 1, 0, 0)
        return Block(kind, given.path, first, data, after, taken, damage, given.start, (number, number))

    try:
        for chunk in chunks:
            cut = chunk.rfind(b"\n") + 1
            view = memoryview(chunk)
            if cut and len(carried) < 8 * BLOCK_BYTES:
                yield block(b"".join((carried, view[:cut])))
                carried = bytearray(view[cut:])
                continue
            # A long document is handed over as the bytearray in which it was collected, without another copy.
            carried += view[:cut]
            if cut:
                yield block(carried)
                carried = bytearray()
            carried += view[cut:]
            if len(carried) > MAX_DOCUMENT_BYTES:
                raise Damaged(f"a line of more than {MAX_DOCUMENT_BYTES:,} bytes")
    except (Damaged, OSError) as error:
        # Whole lines before the damage are kept; `records` drops the line that the damage cuts.
        yield block(bytes(carried), str(error))
        return
    if carried:
        yield block(carried if len(carried) >= 8 * BLOCK_BYTES else bytes(carried))


def _text_blocks(given: Input, begin: Position) -> Iterator[Block]:
    """Yield one block with a whole text file."""
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
    """Decompressed bytes of a file, split at the multiples of BLOCK_BYTES."""

    def __init__(self, given: Input, offset: int):
        """Start at an offset in the decompressed bytes."""
        self.given, self.offset = given, offset
        self.taken = 0
        """Number of bytes read from disk."""

    def __iter__(self) -> Iterator[bytes]:
        """Yield the chunks."""
        with open(self.given.path, "rb") as stream:
            if self.given.packing is None:
                yield from self._plain(stream)
            else:
                yield from self._regular(self._unpacked(stream))

    def _plain(self, stream: Any) -> Iterator[bytes]:
        """Yield the chunks of an uncompressed file."""
        at = stream.seek(self.offset)
        stop = self.given.size if self.given.stop is None else self.given.stop
        while at < stop and (chunk := stream.read(min(BLOCK_BYTES - at % BLOCK_BYTES, stop - at))):
            at += len(chunk)
            self.taken = at - self.given.start
            yield chunk

    def _regular(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        """Yield the pieces from `offset` on as regular chunks; what comes before is decompressed and discarded."""
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
        """Yield the decompressed data of all members of a compressed file."""
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
                # Tapes and block devices pad with zeros after the last member.
                chunk = chunk.lstrip(b"\0") if any_member else chunk
                if not chunk:
                    if stream.tell() >= self.given.size:
                        return
                    continue
                unpacker = UNPACKERS[packing](self.given.size >= _LARGE_BYTES)
            elif not chunk:
                raise Damaged(f"truncated: the {packing} data ends before its end mark")
            try:
                yield from unpacker.pieces(chunk)
            except Exception as error:  # each library raises its own type
                raise Damaged(f"damaged {packing} data ({error})") from None
            if unpacker.eof:
                any_member, rest, unpacker = True, unpacker.unused_data, None


def _row_blocks(given: Input, begin: Position, text_key: str | None, language_key: str | None) -> Iterator[Block]:
    """Yield blocks of Parquet rows."""
    import pyarrow
    from pyarrow import parquet

    number, row, first, counted = begin.file, 0, 0, begin.taken
    data: list[tuple[Any, str | None]] = []

    def block(damage: str | None = None) -> Block:
        """Return a block of the collected rows and start a new collection."""
        nonlocal counted, data
        taken = given.size if damage is not None else given.size * row // max(file.metadata.num_rows, 1)
        rows, data = data, []
        taken, counted = taken - counted, taken
        after = Position(number, row, row, counted) if damage is None else Position(number + 1, 0, 0)
        return Block(ROWS, given.path, first + 1, rows, after, taken, damage, files=(number, number))

    try:
        # Without these two, pyarrow reads whole column chunks, which can be gigabytes.
        file = parquet.ParquetFile(given.path, pre_buffer=False, buffer_size=BLOCK_BYTES)
        schema = file.schema_arrow
    except (pyarrow.ArrowException, OSError, ValueError, MemoryError) as error:
        yield block(f"not a Parquet file, or truncated ({_first_line(error)})")
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
                    texts = batch.to_pylist() if columns is None else batch.column(text_key).to_pylist()
                    tags = batch.column(columns[1]).to_pylist() if columns and len(columns) > 1 else [None] * len(texts)
                    data += zip(texts, tags, strict=True)
                    size += batch.nbytes
                    if size >= BLOCK_BYTES or row == file.metadata.num_rows:
                        yield block()
                        size, first = 0, row
            except (pyarrow.ArrowException, OSError, ValueError, LookupError, MemoryError) as error:
                yield block(f"damaged Parquet data ({_first_line(error)})")
                return
        if row != file.metadata.num_rows:
            yield block(f"damaged Parquet data ({row} rows, but its metadata records {file.metadata.num_rows})")


def _columns(path: str, schema: Any, text_key: str | None, language_key: str | None) -> list[str] | None:
    """Return the columns to read; None for all.

    Raises:
        ConfigError: the text column is missing, ambiguous or not of strings.
    """
    from pyarrow import types

    if text_key is None:
        if len(set(schema.names)) < len(schema.names):
            raise ConfigError(f"{path}: several columns of one name.\n  Rename one of them.")
        return None
    if text_key not in schema.names:
        raise ConfigError(
            f"{path}: no column `{text_key}` (its columns: {', '.join(schema.names[:8]) or 'none'}).\n"
            "  Set data.text_key (--json-keys) to the column of the text."
        )
    if twice := [name for name in (text_key, language_key) if schema.names.count(name) > 1]:
        raise ConfigError(f"{path}: several columns `{twice[0]}`.\n  Set data.text_key (--json-keys) to another.")
    held = schema.field(text_key).type
    held = held.value_type if types.is_dictionary(held) else held
    if not (types.is_string(held) or types.is_large_string(held)):
        raise ConfigError(
            f"{path}: column `{text_key}` contains {held}, not strings.\n"
            "  Set data.text_key (--json-keys) to the column of the text."
        )
    return [text_key, language_key] if language_key in schema.names and language_key else [text_key]


def _first_line(error: Exception) -> str:
    """Return the first line of an error."""
    return (str(error).splitlines() or [type(error).__name__])[0]
