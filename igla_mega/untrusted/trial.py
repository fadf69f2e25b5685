"""Try a tokenizer or a chat template of anybody on a few texts in a child process with limits, before its first use."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from igla_mega.config import json_text
from igla_mega.config.errors import ConfigError
from igla_mega.untrusted.child import attempt

SECONDS, MEGABYTES = 20, 1024
"""Processor time and memory of a trial, without what a large file takes to be read."""
_MEGABYTES_EACH, _SECONDS_EACH = 64, 1
"""Memory and processor time for each MiB of a tokenizer's file; 256,000 tokens take 33 MiB, about 600 MiB and 2 s."""
_MOST_GROWTH = 64
"""Maximum number of characters or tokens that a character becomes; Unicode's own normal forms make 18 of one."""
_TEXTS = (
    "Hello world, how are you?\n\nFine; 12345.678 + 9e9 == x_y!",
    "a" * 500 + "!",
    " " * 500 + "x",
    "0123456789" * 50,
    "aA1 -'\"" * 60,
    "\t\r\n" * 60 + "!",
    "äöü ß é e\u0301 🐇 中文字 العربية हिन्दी ไทย \u00a0\u200b\ufeff",
)
_tried: set[tuple] = set()


def of_file(file: Path, load: Callable[[], Any]) -> None:
    """Load a tokenizer, encode and decode in a child process; once for each state of its file.

    Args:
        load: opens the tokenizer.

    Raises:
        ConfigError: the child took too much time or memory, panicked or crashed, or `load` refused the file.
    """
    found = os.stat(file)
    state = (os.path.abspath(file), found.st_ino, found.st_size, found.st_mtime_ns)
    if state in _tried:
        return
    size = found.st_size >> 20
    limits = {"seconds": SECONDS + _SECONDS_EACH * size, "megabytes": MEGABYTES + _MEGABYTES_EACH * size}
    if (reason := attempt(lambda: _use(load()), **limits)) is not None:
        raise ConfigError(
            f"{file}: the tokenizer {reason} on short texts in a trial.\n"
            "  Do not use it: the file is damaged or hostile. Download the tokenizer from another place."
        )
    _tried.add(state)


def of_rendering(place: str, source: str, render: Callable[[], Any]) -> None:
    """Render a chat template in a child process, in addition to the sandbox's own limits; once for each source.

    Raises:
        ConfigError: the child took too much time or memory, or crashed.
    """
    if (source,) in _tried:
        return
    if (reason := attempt(render, seconds=SECONDS, megabytes=MEGABYTES)) is not None:
        raise ConfigError(
            f"{place}: the chat template {reason} on a short conversation in a trial.\n"
            "  Do not use it: name another one with data.chat_template."
        )
    _tried.add((source,))


def _use(tokenizer: Any) -> None:
    """Encode and decode the texts of a trial; raise ConfigError if they grow beyond all measure."""
    engine = tokenizer.engine
    for text in [*_TEXTS, *_own_texts(engine)]:
        most = _MOST_GROWTH * (len(text) + 16)
        if (normalizer := getattr(engine, "normalizer", None)) is not None:
            _refuse_growth(tokenizer, text, len(normalizer.normalize_str(text)), most, "characters")
        ids = tokenizer.encode(text)
        _refuse_growth(tokenizer, text, len(ids), most, "tokens")
        _refuse_growth(tokenizer, text, len(tokenizer.decode(ids)), most, "characters")
        if hasattr(engine, "encode") and hasattr(engine, "get_added_tokens_decoder"):
            engine.encode(text, add_special_tokens=False)
    tokenizer.decode(range(min(tokenizer.vocab_size, 256)))


def _refuse_growth(tokenizer: Any, text: str, size: int, most: int, what: str) -> None:
    """Raise ConfigError if a text has become too long."""
    if size > most:
        raise ConfigError(
            f"{tokenizer.file}: the tokenizer makes {size:,} {what} of a text of {len(text):,} characters.\n"
            "  Do not use it: the file is damaged or hostile. Download the tokenizer from another place."
        )


def _own_texts(engine: Any) -> Iterator[str]:
    """Yield the texts that a tokenizer's own rules contain, which are those that its rules match.

    What one rule inserts is what the next one must match, if together they are to grow a text without bound; and the
    letters of a regular expression are those on which it can take long.
    """
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        state = getattr(getattr(engine, part, None), "__getstate__", lambda: None)()
        try:
            texts = list(dict.fromkeys(_strings(json_text.loads(state))))[:500] if isinstance(state, bytes) else []
        except ValueError:
            continue
        yield from texts
        yield "".join(texts)[:20_000]
        letters = dict.fromkeys(letter for text in texts for letter in text if letter.isalnum())
        yield from (letter * 60 + "!" for letter in list(letters)[:100])
    if pattern := getattr(engine, "_pat_str", None):  # tiktoken's
        yield from (letter * 60 + "!" for letter in list(dict.fromkeys(filter(str.isalnum, pattern)))[:100])


def _strings(value: Any) -> Iterator[str]:
    """Yield the short texts in a JSON value."""
    if isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _strings(one)
    elif isinstance(value, str) and 0 < len(value) <= 2000:
        yield value
