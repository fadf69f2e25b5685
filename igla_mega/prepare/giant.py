"""A document as large as memory: its text is read out of its JSON line a piece at a time."""

import re
from collections.abc import Iterator
from typing import Any

from igla_mega.data.raw_files import LINES, TEXT
from igla_mega.prepare.formats import Block, fast_loads

LEAST_BYTES = 1 << 24
_PIECE_BYTES = 1 << 20
_LET_GO_BYTES = 1 << 24
_STRUCTURE = re.compile(rb'["{}\[\]]')


class LongText:
    """Part of a line that is the text: of a JSON string, without its quotes, or UTF-8 as it is.

    What has been read is let go, where the line is a bytearray.
    """

    def __init__(self, line: Any, start: int, stop: int, is_json: bool):
        self.line, self._start, self._stop, self._is_json = line, start, stop, is_json
        self.num_bytes = stop - start
        self.shown = bytes(line[:1000]).decode("utf-8", errors="backslashreplace")

    def sample(self) -> str:
        """The begin of the text."""
        return next(self._pieces(letting_go=False), "")

    def pieces(self) -> Iterator[str]:
        """The text in pieces, in order; once.

        Raises:
            ValueError: it is none.
        """
        return self._pieces(letting_go=isinstance(self.line, bytearray))

    def _pieces(self, letting_go: bool) -> Iterator[str]:
        begin, stop = self._start, self._stop
        while begin < stop:
            end = min(begin + _PIECE_BYTES, stop)
            # A cut through an escape or a character does not decode; the longest, a pair of surrogates, has 12 bytes.
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
            if letting_go and begin >= _LET_GO_BYTES:
                del self.line[:begin]
                begin, stop = 0, stop - begin

    def _decoded(self, begin: int, end: int) -> str:
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
    """The text of a block that is one long line, where it is all in order but for the text; None for all others."""
    line = block.data
    if block.kind not in (LINES, TEXT) or block.damage is not None:
        return None
    if isinstance(line, list) and len(line) == 1:
        line = line[0][1]
        return LongText(line, 0, len(line), False) if len(line) >= LEAST_BYTES else None
    if not isinstance(line, bytes | bytearray) or len(line) < LEAST_BYTES:
        return None
    stop = len(line) - line.endswith(b"\n")
    if line.find(b"\n", 0, stop) >= 0:
        return None
    if block.kind == TEXT:
        return LongText(line, 0, stop, False)
    span = _value_span(line, text_key.encode())
    if span is None:
        return None
    try:
        around = fast_loads(bytes(line[: span[0]]) + bytes(line[span[1] : stop]))
    except ValueError:
        return None
    return LongText(line, *span, True) if around.get(text_key) == "" else None


def _value_span(line: Any, key: bytes) -> tuple[int, int] | None:
    """Where the string under a key of the outermost object lies, within its quotes."""
    depth, at, wanted, span = 0, 0, False, None
    while found := _STRUCTURE.search(line, at):
        mark, at = found.group(), found.end()
        if mark != b'"':
            depth += 1 if mark in b"{[" else -1
            wanted = False
            continue
        end = _string_end(line, at)
        if end < 0:
            return None
        if wanted:
            if span is not None:
                return None  # twice: json takes the last
            span = at, end
        behind = line[end + 1 : end + 100].lstrip()
        wanted = depth == 1 and not wanted and behind.startswith(b":") and bytes(line[at:end]) == key
        if wanted and not behind[1:].lstrip().startswith(b'"'):
            return None
        at = end + 1
    return span


def _string_end(line: Any, begin: int) -> int:
    """The quote that ends a string; -1 where none does."""
    end = line.find(b'"', begin)
    while end > 0:
        slashes = end
        while line[slashes - 1 : slashes] == b"\\" and slashes > begin:
            slashes -= 1
        if (end - slashes) % 2 == 0:
            return end
        end = line.find(b'"', end + 1)
    return -1
