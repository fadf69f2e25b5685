"""Read the text of a very large document out of its JSON line piece by piece, to bound the memory."""

import re
from collections.abc import Iterator
from typing import Any

from igla_mega.data.raw_files import LINES, TEXT
from igla_mega.prepare.formats import Block, fast_loads

LEAST_BYTES = 1 << 24
"""Minimum size of a line, in bytes, to be read in pieces."""
_PIECE_BYTES = 1 << 20
_RELEASE_BYTES = 1 << 24
"""Bytes read before their memory is released: each release moves the rest of the line."""
_STRUCTURE = re.compile(rb'["{}\[\]]')


class LongText:
    """Text within a line: the content of a JSON string, or plain UTF-8.

    If the line is a bytearray, the memory of what has been read is released.
    """

    def __init__(self, line: Any, start: int, stop: int, is_json: bool):
        """Refer to bytes [start, stop) of a line, without the quotes of a JSON string."""
        self.line, self._start, self._stop, self._is_json = line, start, stop, is_json
        self.num_bytes = stop - start
        self.shown = bytes(line[:1000]).decode("utf-8", errors="backslashreplace")

    def sample(self) -> str:
        """Return the beginning of the text."""
        return next(self._pieces(release=False), "")

    def pieces(self) -> Iterator[str]:
        """Yield the text in pieces, in order; can be called once only.

        Raises:
            ValueError: the bytes are not a valid text.
        """
        return self._pieces(release=isinstance(self.line, bytearray))

    def _pieces(self, release: bool) -> Iterator[str]:
        """Yield the decoded pieces."""
        begin, stop = self._start, self._stop
        while begin < stop:
            end = min(begin + _PIECE_BYTES, stop)
            # A cut within an escape or a character does not decode. The longest unit, an escaped surrogate pair
            # (\ud83d\ude00), has 12 bytes, so one of 12 cuts is between two units.
            for shorter in range(12 if end < stop else 1):
                try:
                    text = self._decoded(begin, end - shorter)
                    break
                except ValueError as error:
                    failure = error
            else:
                raise failure
            yield text
            begin = end - shorter
            if release and begin >= _RELEASE_BYTES:
                del self.line[:begin]
                begin, stop = 0, stop - begin

    def _decoded(self, begin: int, end: int) -> str:
        """Return the text of bytes [begin, end) of the line."""
        piece = bytes(self.line[begin:end])
        try:
            if not self._is_json:
                return piece.decode()
            text = fast_loads(b'"' + piece + b'"')
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8 (byte {piece[error.start]:#04x})") from None
        except ValueError as error:
            raise ValueError(f"not JSON ({str(error).split(':')[0]})") from None
        if text and "\ud800" <= text[-1] <= "\udfff":
            raise ValueError("half of a surrogate pair")
        return text


def long_text(block: Block, text_key: str) -> LongText | None:
    """Return the text of a block that is one long line whose JSON is valid apart from the text; None otherwise."""
    line = block.data
    if block.kind not in (LINES, TEXT) or block.damage is not None:
        return None
    if isinstance(line, list) and len(line) == 1:
        line = line[0][1]
        return LongText(line, _after_mark(line), len(line), False) if len(line) >= LEAST_BYTES else None
    if not isinstance(line, bytes | bytearray) or len(line) < LEAST_BYTES:
        return None
    stop = len(line) - line.endswith(b"\n")
    if line.find(b"\n", 0, stop) >= 0:
        return None
    if block.kind == TEXT:
        return LongText(line, _after_mark(line), stop - (line[stop - 1 : stop] == b"\r"), False)
    span = _value_span(line, text_key.encode())
    if span is None:
        return None
    try:
        # The line with an empty text: small, and proof that the span found by `_value_span` is the text's.
        around = fast_loads(bytes(line[: span[0]]) + bytes(line[span[1] : stop]))
    except ValueError:
        return None
    return LongText(line, *span, True) if around.get(text_key) == "" else None


def _after_mark(line: Any) -> int:
    """Return the offset behind a byte order mark, which shorter texts lose, too."""
    return 3 if line[:3] == b"\xef\xbb\xbf" else 0


def _value_span(line: Any, key: bytes) -> tuple[int, int] | None:
    """Return the span, within its quotes, of the string under a key of the outermost object; None if there is none."""
    depth, at, is_value, span = 0, 0, False, None
    while found := _STRUCTURE.search(line, at):
        mark, at = found.group(), found.end()
        if mark != b'"':
            depth += 1 if mark in b"{[" else -1
            is_value = False
            continue
        end = _string_end(line, at)
        if end < 0:
            return None
        if is_value:
            if span is not None:
                return None  # the key occurs twice, of which json uses the last: left to the ordinary reader
            span = at, end
        after = line[end + 1 : end + 100].lstrip()
        is_value = depth == 1 and not is_value and after.startswith(b":") and bytes(line[at:end]) == key
        if is_value and not after[1:].lstrip().startswith(b'"'):
            return None
        at = end + 1
    return span


def _string_end(line: Any, begin: int) -> int:
    """Return the offset of the quote that ends a string, or -1."""
    # A quote after an odd number of backslashes is escaped.
    end = line.find(b'"', begin)
    while end > 0:
        slashes = end
        while line[slashes - 1 : slashes] == b"\\" and slashes > begin:
            slashes -= 1
        if (end - slashes) % 2 == 0:
            return end
        end = line.find(b'"', end + 1)
    return -1
