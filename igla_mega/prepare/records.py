"""Take the text out of the records of a block."""

import json
from collections.abc import Iterable
from typing import Any

from igla_mega.data.raw_files import LINES, ROWS, TEXT
from igla_mega.prepare.formats import Block, Broken, Texts, fast_loads


def texts_of(block: Block, text_key: str, language_key: str | None = None) -> Texts:
    """The texts of a block, in order, without the empty ones; what has none is told."""
    if block.kind == LINES:
        read = _of_lines(block, text_key, language_key)
    else:
        read = _of_records(block, language_key)
    if block.damage is not None:
        read.broken.append(Broken(block.file, block.damage, ""))
    return read


def _of_lines(block: Block, text_key: str, language_key: str | None) -> Texts:
    data: bytes = block.data
    if block.damage is not None:
        data = data[: data.rfind(b"\n") + 1]
    lines = data.split(b"\n")
    if language_key is None:
        try:
            texts = [fast_loads(line)[text_key] for line in lines if line]
        except (ValueError, KeyError, TypeError, RecursionError, IndexError):
            texts = [None]
        # Whatever is out of the ordinary is looked at line by line.
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
    """Of rows, of whole text files, and of text by lines."""
    read = Texts([], [], 0, [])
    empty = 0
    records: Iterable[tuple[str, Any, str | None]]
    if block.kind == ROWS:
        records = ((f"{block.file}: row {n}", *row) for n, row in enumerate(block.data, block.first))
    elif isinstance(block.data, bytes | bytearray):
        lines: list[Any] = block.data.split(b"\n")
        records = ((f"{block.file}:{n}", line.rstrip(b"\r"), None) for n, line in enumerate(lines, block.first))
    else:
        records = ((file, data, None) for file, data in block.data)
    for place, text, language in records:
        if text is None:
            read.broken.append(Broken(place, "the text is null", ""))
            continue
        if isinstance(text, bytes | bytearray):
            try:
                text = text.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                reason = f"not UTF-8 (byte {text[error.start]:#04x} at column {error.start + 1})"
                read.broken.append(Broken(place, reason, _shown(text)))
                continue
        if text:
            read.texts.append(text)
            if language_key is not None:
                read.languages.append(language if isinstance(language, str) else None)
        elif block.kind != TEXT or not isinstance(block.data, bytes | bytearray):
            empty += 1
    return read._replace(empty=empty)


def _record(line: bytes) -> dict[str, Any]:
    """One line as an object; a ValueError says what is wrong with it."""
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {line[error.start]:#04x} at column {error.start + 1})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    except ValueError as error:  # a number of more digits than Python reads
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {_json_type(record)}, not an object")
    return record


def _text(record: dict[str, Any], text_key: str) -> str:
    if text_key not in record:
        raise ValueError(f"no key `{text_key}` (there are: {', '.join(map(repr, list(record)[:8])) or 'none'})")
    text = record[text_key]
    if not isinstance(text, str):
        raise ValueError(f"`{text_key}` is a JSON {_json_type(text)}, not a string")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"`{text_key}` has half of a surrogate pair (character {error.start + 1})") from None
    return text


def _json_type(value: object) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _shown(line: bytes) -> str:
    return line[:100_000].decode("utf-8", errors="backslashreplace")
