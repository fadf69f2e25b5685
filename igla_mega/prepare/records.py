"""Extract the texts from the records of a block, or whole JSON objects and rows."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from igla_mega.config.errors import ConfigError
from igla_mega.data.raw_files import LINES, ROWS, TEXT
from igla_mega.prepare.formats import Block, Broken, How, Texts, blocks_of, fast_loads, whole


def objects_of(files: Iterable[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (`file:line` or `file: row N`, JSON object or Parquet row) for every record of files.

    Raises:
        ConfigError: a file is damaged or plain text, or a record is not a JSON object.
    """
    for block in blocks_of(whole(files), How(text_key=None)):
        if block.damage is not None:
            raise ConfigError(f"{block.file}: {block.damage}.\n  Copy or download the file again.")
        if block.kind == TEXT:
            raise ConfigError(f"{block.file}: plain text, not JSON objects.\n  Give JSONL or Parquet.")
        if block.kind == ROWS:
            yield from (
                (f"{block.file}: row {n}", _unpacked(row)) for n, (row, _) in enumerate(block.data, block.first)
            )
        for number, line in enumerate(block.data.split(b"\n") if block.kind == LINES else (), block.first):
            if line and not line.isspace() and line.strip() != b"\xef\xbb\xbf":
                yield _object(line, f"{block.file}:{number}")


def _object(line: bytes, place: str) -> tuple[str, dict[str, Any]]:
    """Return the place and the JSON object of a line."""
    try:
        return place, _record(line)
    except ValueError as error:
        way_out = "Fix or remove the line."
        if line.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
            way_out = "Write one object per line: jq -c '.[]' FILE.json > FILE.jsonl"
        raise ConfigError(f"{place}: {error}.\n  {way_out}") from None


def _unpacked(value: Any) -> Any:
    """Return a Parquet value as JSON has it: bytes as text, and objects without the keys that other rows have."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value
    if isinstance(value, dict):
        return {key: _unpacked(inner) for key, inner in value.items() if inner is not None}
    return [_unpacked(inner) for inner in value] if isinstance(value, list) else value


class Sentences(str):
    """Text given as a list of strings, joined; each string is encoded by itself, as Megatron-LM's tool does."""

    parts: tuple[str, ...]
    """The strings that are not empty."""

    def __new__(cls, parts: Iterable[str]) -> "Sentences":
        """Join the strings."""
        kept = tuple(filter(None, parts))
        joined = super().__new__(cls, "".join(kept))
        joined.parts = kept
        return joined


def texts_of(block: Block, text_key: str, language_key: str | None = None) -> Texts:
    """Return the texts of a block in order, without empty ones, and the records that hold no text."""
    if block.kind == LINES:
        read = _of_lines(block, text_key, language_key)
    else:
        read = _of_records(block, language_key)
    if block.damage is not None:
        read.broken.append(Broken(block.file, block.damage, ""))
    return read


def _of_lines(block: Block, text_key: str, language_key: str | None) -> Texts:
    """Return the texts of JSON lines."""
    data: bytes = block.data
    if block.damage is not None:
        data = data[: data.rfind(b"\n") + 1]
    lines = data.split(b"\n")
    if language_key is None:
        try:
            texts = [fast_loads(line)[text_key] for line in lines if line]
        except (ValueError, KeyError, TypeError, RecursionError, IndexError):
            texts = [None]
        # The whole block at once by orjson, which validates Unicode. Any irregularity falls through to the slower loop
        # below, which finds and names the line.
        if all(map(str.__instancecheck__, texts)) and fast_loads is not json.loads:
            full = [text for text in texts if text]
            return Texts(full, [], len(texts) - len(full), [])
    read = Texts([], [], 0, [])
    empty = 0
    for number, line in enumerate(lines, block.first):
        if not line or line.isspace():
            continue
        try:
            record = _record(line)
            text = _text(record, text_key)
        except ValueError as error:
            place = f"{block.file}:{number}" + (f" (from byte {block.counted_from:,})" if block.counted_from else "")
            read.broken.append(Broken(place, str(error), _shown(line)))
            continue
        if not text:
            empty += 1
            continue
        read.texts.append(text)
        if language_key is not None:
            tag = record.get(language_key)
            read.languages.append(tag if isinstance(tag, str) else None)
    return read._replace(empty=empty)


def _of_records(block: Block, language_key: str | None) -> Texts:
    """Return the texts of Parquet rows, whole text files, or lines of plain text."""
    read = Texts([], [], 0, [])
    empty = 0
    records: Iterable[tuple[str, Any, str | None]]
    if block.kind == ROWS:
        records = ((f"{block.file}: row {n}", *row) for n, row in enumerate(block.data, block.first))
    elif isinstance(block.data, bytes | bytearray):
        # The line that the damage cuts is no text of its own.
        whole = block.data if block.damage is None else block.data[: block.data.rfind(b"\n") + 1]
        lines: list[Any] = whole.split(b"\n")
        records = ((f"{block.file}:{n}", line.rstrip(b"\r"), None) for n, line in enumerate(lines, block.first))
    else:
        records = ((file, data, None) for file, data in block.data)
    for place, text, language in records:
        if text is None:
            read.broken.append(Broken(place, "the text is null", ""))
            continue
        try:
            text = Sentences(map(_decoded, text)) if isinstance(text, list) else _decoded(text)
        except ValueError as error:
            read.broken.append(Broken(place, str(error), _shown(text) if isinstance(text, bytes | bytearray) else ""))
            continue
        if text:
            read.texts.append(text)
            if language_key is not None:
                read.languages.append(language if isinstance(language, str) else None)
        elif block.kind != TEXT or not isinstance(block.data, bytes | bytearray):
            empty += 1
    return read._replace(empty=empty)


def _decoded(text: Any) -> str:
    """Return a text given as a string or as UTF-8 bytes; raise ValueError if it is neither."""
    if isinstance(text, str):
        return text
    if text is None:
        raise ValueError("one of the strings of the text is null")
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {text[error.start]:#04x} at column {error.start + 1})") from None


def _record(line: bytes) -> dict[str, Any]:
    """Return the JSON object of a line; raise ValueError with the defect."""
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {line[error.start]:#04x} at column {error.start + 1})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    except ValueError as error:  # an integer with more digits than Python's limit (sys.int_info)
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {_json_type(record)}, not an object")
    return record


def _text(record: dict[str, Any], text_key: str) -> str:
    """Return the text of a record; raise ValueError if it is missing or not a valid string."""
    if text_key not in record:
        raise ValueError(f"no key `{text_key}` (its keys: {', '.join(map(repr, list(record)[:8])) or 'none'})")
    text = record[text_key]
    if isinstance(text, list):
        other = next((part for part in text if not isinstance(part, str)), "")
        if other != "":
            raise ValueError(f"`{text_key}` is a JSON array with a {_json_type(other)}, not of strings")
        text = Sentences(text)
    if not isinstance(text, str):
        raise ValueError(f"`{text_key}` is a JSON {_json_type(text)}, not a string")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"`{text_key}` has half of a surrogate pair (character {error.start + 1})") from None
    return text


def _json_type(value: object) -> str:
    """Return the JSON name of a value's type."""
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _shown(line: bytes | bytearray) -> str:
    """Return a record as text for the quarantine, at most 100,000 bytes of it."""
    return line[:100_000].decode("utf-8", errors="backslashreplace")
