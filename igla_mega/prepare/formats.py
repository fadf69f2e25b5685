"""Read JSONL, plain text, Parquet and Arrow, in blocks that depend on the files only.

A block is the unit of work: about BLOCK_BYTES of whole records. The borders of the blocks do not depend on the number
of readers or on where reading resumed, so the output does not depend on them either.
"""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from igla_mega.config.files import regular
from igla_mega.data.ahead import ahead
from igla_mega.data.raw_files import KINDS, LINES, PACKED, ROWS, TEXT
from igla_mega.prepare.raw.rows import read_rows
from igla_mega.prepare.raw.unpacking import UNPACKERS, Damaged, bomb, is_dense

fast_loads: Callable[[Any], Any]
try:
    from orjson import loads as fast_loads
except ImportError:
    fast_loads = json.loads

BLOCK_BYTES = 1 << 20
"""Input bytes per unit of work: large enough to hide the cost of a queue, small enough for any memory."""
MAX_DOCUMENT_BYTES = 1 << 30
"""Maximum size of a record; a longer one is an error, typically a file without line ends."""
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
    with open(file, "rb", opener=regular) as stream:
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
        return _row_blocks(given, begin, how)
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
    carried, began = bytearray(), 0

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
                carried, began = bytearray(view[cut:]), chunks.taken - _PACKED_CHUNK
                continue
            # A long document is handed over as the bytearray in which it was collected, without another copy.
            carried += view[:cut]
            if cut:
                yield block(carried)
                carried = bytearray()
                began = chunks.taken - _PACKED_CHUNK  # of which the record may take the end
            carried += view[cut:]
            _refuse_giant("line", len(carried), chunks.taken - began, given)
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
        chunks = _Chunks(given, 0)
        for chunk in chunks:
            text += chunk
            _refuse_giant("document", len(text), chunks.taken, given)
    except (Damaged, OSError) as error:
        damage, text = str(error), bytearray()
    number = begin.file
    data = [(given.path, text if len(text) >= 8 * BLOCK_BYTES else bytes(text))] if damage is None else []
    after = Position(number, len(text), 1)
    yield Block(TEXT, given.path, 1, data, after, given.size, damage, files=(number, number))


def _refuse_giant(what: str, size: int, packed: int, given: Input) -> None:
    """Refuse a record, of which so many bytes were read and take so many on disk, that is too large or too dense."""
    if size > MAX_DOCUMENT_BYTES:
        raise Damaged(f"a {what} of more than {MAX_DOCUMENT_BYTES:,} bytes; split it")
    if given.packing and is_dense(size, packed):
        raise bomb(what, size, packed)


class _Chunks:
    """Decompressed bytes of a file, split at the multiples of BLOCK_BYTES."""

    def __init__(self, given: Input, offset: int):
        """Start at an offset in the decompressed bytes."""
        self.given, self.offset = given, offset
        self.taken = 0
        """Number of bytes read from disk."""

    def __iter__(self) -> Iterator[bytes]:
        """Yield the chunks."""
        with open(self.given.path, "rb", opener=regular) as stream:
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


def _row_blocks(given: Input, begin: Position, how: How) -> Iterator[Block]:
    """Yield blocks of the rows of a Parquet or Arrow file."""
    number, row, first, counted, size = begin.file, begin.offset, begin.offset, begin.taken, 0
    data: list[tuple[Any, Any]] = []

    def block(taken: int, damage: str | None = None) -> Block:
        """Return a block of the collected rows and start a new collection."""
        nonlocal counted, data, first, size
        rows, data, before, first, size = data, [], first, row, 0
        taken, counted = taken - counted, taken
        after = Position(number, row, row, counted) if damage is None else Position(number + 1, 0, 0)
        return Block(ROWS, given.path, before + 1, rows, after, taken, damage, files=(number, number))

    try:
        for batch in read_rows(given.path, given.size, how.text_key, how.language_key, begin.offset):
            data += batch.rows
            row = batch.after
            size += batch.num_bytes
            if size >= BLOCK_BYTES or batch.is_last:
                yield block(batch.taken)
    except Damaged as error:
        yield block(given.size, str(error))
        return
    if data:
        yield block(given.size)
