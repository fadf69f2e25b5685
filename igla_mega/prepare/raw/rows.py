"""Read the rows of Parquet and Arrow files in batches of bounded size."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from igla_mega.config.errors import ConfigError
from igla_mega.config.files import refuse_special
from igla_mega.prepare.raw.unpacking import MAX_DENSE_BYTES, Damaged, bomb, is_dense

BUFFER_BYTES = 1 << 20
"""Bytes that Parquet's reader holds of a column."""
_ROWS_AT_ONCE = 256


class Batch(NamedTuple):
    """A few rows of a file."""

    rows: list[tuple[Any, Any]]
    """Text, or the whole row as a dict, and language tag of each row."""
    num_bytes: int
    """Size of the rows in memory."""
    after: int
    """Number of rows of the file up to the end of the batch."""
    taken: int
    """Number of bytes of the file up to the end of the batch, estimated."""
    is_last: bool


def read_rows(path: str, size: int, text_key: str | None, language_key: str | None, done: int) -> Iterator[Batch]:
    """Yield the rows of a Parquet or Arrow file after the first `done` ones.

    Args:
        size: size of the file in bytes.
        text_key: column of the text; None for whole rows.
        done: number of rows up to the end of a batch of an earlier call, or 0.

    Raises:
        ConfigError: the text column is missing, ambiguous or not of text.
        Damaged: the file cannot be read, or not to its end.
    """
    import pyarrow

    is_parquet = path.endswith(".parquet")
    read, article, form = (_of_parquet, "a", "Parquet") if is_parquet else (_of_arrow, "an", "Arrow")
    refuse_special(path)  # pyarrow would wait for a FIFO's writer
    opened = False
    try:
        for batch in read(path, size, text_key, language_key, done):
            opened = True
            if isinstance(batch, Batch):
                yield batch
    except (pyarrow.ArrowException, OSError, ValueError, LookupError, MemoryError) as error:
        if isinstance(error, ConfigError):
            raise
        wrong = f"damaged {form} data" if opened else f"not {article} {form} file, or truncated"
        raise Damaged(f"{wrong} ({_first_line(error)})") from None


def _of_parquet(
    path: str, size: int, text_key: str | None, language_key: str | None, done: int
) -> Iterator[Batch | None]:
    """Yield None once the file is open, then the batches of a Parquet file."""
    from pyarrow import parquet

    # Without these two, pyarrow reads whole column chunks, which can be gigabytes.
    file = parquet.ParquetFile(path, pre_buffer=False, buffer_size=BUFFER_BYTES)
    with file:
        columns = _columns(path, file.schema_arrow, text_key, language_key)
        yield None
        num_rows, row = file.metadata.num_rows, 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if row + rows <= done:
                row += rows
                continue
            packed = _dense_bytes(file.metadata.row_group(group), columns)
            # Of dense columns, in which rows may share a long text, one row at a time.
            at_once = _ROWS_AT_ONCE if packed is None else 1
            for batch in file.iter_batches(at_once, row_groups=[group], columns=columns, use_threads=False):
                row += len(batch)
                if packed is not None and is_dense(batch.nbytes, packed):
                    raise bomb("row", batch.nbytes, packed)
                if row > done:
                    yield Batch(_values(batch, columns), batch.nbytes, row, size * row // num_rows, row == num_rows)
        if row != num_rows:
            raise ValueError(f"{row} rows, but its metadata records {num_rows}")


def _dense_bytes(group: Any, columns: list[str] | None) -> int | None:
    """Return the packed bytes of a row group that is too dense for a text unless its rows repeat; None of another.

    Raises:
        Damaged: its rows are too large and too dense on average.
    """
    chunks = [group.column(number) for number in range(group.num_columns)]
    prefixes = ("",) if columns is None else tuple(f"{column}." for column in columns)
    read = [chunk for chunk in chunks if f"{chunk.path_in_schema}.".startswith(prefixes)]
    packed = sum(chunk.total_compressed_size for chunk in read)
    size = sum(chunk.total_uncompressed_size for chunk in read)
    if not is_dense(size, packed):
        return None
    if size > group.num_rows * MAX_DENSE_BYTES:
        raise bomb("row", size // max(group.num_rows, 1), packed)
    return packed


def _of_arrow(
    path: str, size: int, text_key: str | None, language_key: str | None, done: int
) -> Iterator[Batch | None]:
    """Yield None once the file is open, then the batches of Arrow's stream format or file format (Feather)."""
    import pyarrow
    from pyarrow import ipc

    with pyarrow.memory_map(path) as source:
        magic = source.read(6)
        source.seek(0)
        if magic[:4] == b"FEA1":
            raise ValueError("version 1 of Feather; save it as version 2, or as Parquet")
        seekable = magic == b"ARROW1"
        with (ipc.open_file if seekable else ipc.open_stream)(source) as reader:
            columns = _columns(path, reader.schema, text_key, language_key)
            yield None
            count = reader.num_record_batches if seekable else None
            batches = map(reader.get_batch, range(count)) if count is not None else iter(reader)
            row = 0
            for number, batch in enumerate(batches, 1):
                row += len(batch)
                if row <= done:
                    continue
                batch = batch.select(columns) if columns is not None else batch
                batch.validate(full=True)  # offsets come from the file: they may lead out of it
                taken = size * number // count if count is not None else source.tell()
                begin = row - len(batch)
                for at in range(max(done - begin, 0), len(batch), _ROWS_AT_ONCE):
                    part = batch.slice(at, _ROWS_AT_ONCE)
                    if is_dense(part.nbytes, size):
                        raise bomb("few rows", part.nbytes, size)
                    yield Batch(_values(part, columns), part.nbytes, begin + at + len(part), taken, False)
            # pyarrow takes a stream that is cut between two batches, or has another behind it, as whole.
            if not seekable and (source.tell() != size or not _ends(source, size)):
                raise ValueError("its stream does not end where the file ends")


def _ends(source: Any, size: int) -> bool:
    """Return True if a stream ends with the mark of its end; before version 0.15 of Arrow that was four zeros."""
    mark = b"\xff\xff\xff\xff\0\0\0\0"
    source.seek(0)
    is_old = source.read(4) != mark[:4]
    source.seek(max(size - 8, 0))
    return source.read(8).endswith(mark[4:] if is_old else mark)


def _values(batch: Any, columns: list[str] | None) -> list[tuple[Any, Any]]:
    """Return text and language tag of each row of a batch, or each whole row and None."""
    if columns is None:
        return [(row, None) for row in batch.to_pylist()]
    texts = batch.column(columns[0]).to_pylist()
    tags = batch.column(columns[1]).to_pylist() if len(columns) > 1 else [None] * len(texts)
    return list(zip(texts, tags, strict=True))


def _columns(path: str, schema: Any, text_key: str | None, language_key: str | None) -> list[str] | None:
    """Return the columns to read; None for all.

    Raises:
        ConfigError: the text column is missing, ambiguous or not of text.
    """
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
    if not _is_text(held):
        raise ConfigError(
            f"{path}: column `{text_key}` contains {held}, not strings.\n"
            "  Set data.text_key (--json-keys) to the column of the text."
        )
    return [text_key, language_key] if language_key in schema.names and language_key else [text_key]


def _is_text(held: Any) -> bool:
    """Return True for a type of strings, of UTF-8 bytes, of either in a dictionary, or of lists of sentences."""
    from pyarrow import types

    lists = ("list", "large_list", "list_view", "large_list_view", "fixed_size_list")
    if any(getattr(types, f"is_{kind}")(held) for kind in lists):
        held = held.value_type
    held = held.value_type if types.is_dictionary(held) else held
    strings = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
    return any(getattr(types, f"is_{kind}")(held) for kind in strings)


def _first_line(error: Exception) -> str:
    """Return the first line of an error."""
    return (str(error).splitlines() or [type(error).__name__])[0]
