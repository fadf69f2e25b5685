"""Use gigatoken instead of the reference tokenizer after verifying equal ids on a sample of the input."""

import sys
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from igla_mega.config.files import read_bytes
from igla_mega.data.tokenizer import Tokenizer, version
from igla_mega.untrusted.child import no_panic

SAMPLE_CHARS = 120_000
"""Characters of the input on which both tokenizers are compared before the fast path is used."""
PIECE_CHARS = 1 << 20
"""Maximum length of a text that is encoded whole; longer ones are encoded in pieces to bound the memory."""
_MARGIN = 2_000
"""Characters around a cut on which its safety is tested, and within which a cut is searched."""


class FastTokenizer:
    """gigatoken for one thread; its calls release the interpreter lock, and instances do not block each other."""

    def __init__(self, reference: Tokenizer):
        """Open the reference's tokenizer file with gigatoken.

        Raises:
            Exception: gigatoken is not installed, or does not support this kind of tokenizer.
        """
        _import_awkward()
        from gigatoken import gigatoken_rs

        if reference.file.suffix == ".model":
            from gigatoken import Tokenizer as Gigatoken

            self._backend: Any = Gigatoken.from_sentencepiece(reference.file).backend
        elif reference.file.suffix == ".tiktoken":
            raise ValueError("tiktoken ranks are not supported")
        else:
            with no_panic(reference.path):
                self._backend = gigatoken_rs.load_hf_json(reference.written or read_bytes(reference.file))

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the concatenated ids of all texts, uint32, and the number of tokens per text, int64."""
        with no_panic("gigatoken"):
            layout = self._backend.encode_batch(list(texts), parallel=False).layout
        offsets = np.asarray(layout.offsets.data)
        return np.asarray(layout.content.data)[offsets[0] : offsets[-1]], np.diff(offsets)


def _import_awkward() -> None:
    """Import awkward, in which gigatoken returns its arrays, without pyarrow."""
    # awkward imports pyarrow if it finds it, which takes 26 MiB per process and is not used here. A None entry in
    # sys.modules makes that import fail.
    if "awkward" in sys.modules or "pyarrow" in sys.modules:
        return
    sys.modules["pyarrow"] = None  # type: ignore[assignment]
    try:
        import awkward  # noqa: F401
    finally:
        del sys.modules["pyarrow"]


def open_fast(reference: Tokenizer, sample: Sequence[str]) -> tuple[FastTokenizer | None, str]:
    """Return a fast tokenizer if it gives the same ids as the reference, else None, and a sentence with the reason.

    Args:
        sample: texts of the input, compared in addition to the built-in probes.
    """
    if version("gigatoken") is None:
        return None, "gigatoken is not installed (pip install 'igla-mega[data]')"
    try:
        fast = FastTokenizer(reference)
    except Exception as error:  # libraries raise different types for a tokenizer that they do not support
        return None, f"gigatoken does not support this tokenizer ({_first_line(error)})"
    try:
        texts = [*probes(reference), *sample]
        if (text := difference(reference, fast, texts)) is not None:
            return None, f"gigatoken's ids differ from the reference's on {_shortened(text)}"
    except Exception as error:
        return None, f"gigatoken failed on the sample ({_first_line(error)})"
    return fast, f"gigatoken: same ids as the reference on {len(texts):,} sample texts"


def difference(reference: Tokenizer, fast: FastTokenizer, texts: Sequence[str]) -> str | None:
    """Return the first text that the two encode differently, or None."""
    ids, lengths = reference.encode_flat(texts)
    fast_ids, fast_lengths = fast.encode_flat(texts)
    if np.array_equal(ids, fast_ids) and np.array_equal(lengths, fast_lengths):
        return None
    ends, fast_ends = np.cumsum(lengths), np.cumsum(fast_lengths)
    for i, text in enumerate(texts):
        if not np.array_equal(
            ids[ends[i] - lengths[i] : ends[i]], fast_ids[fast_ends[i] - fast_lengths[i] : fast_ends[i]]
        ):
            return text
    return None


def probes(reference: Tokenizer) -> list[str]:
    """Return texts on which tokenizers tend to differ: special tokens, normalization forms, whitespace, all scripts."""
    texts = [
        "",
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t\t",
        "\0",
        "a\0b",
        "\ufeffa",
        " a",
        "a ",
        "  a  b  ",
        "a\n\n\n  b",
        "\u00a0a\u3000b",
    ]
    texts += ["don't I'LL we’re it'S", "1234567890 ١٢٣ 1,000.5 Ⅷ ½", "e\u0301 é ﬁ Å Å ㎏ ǅ", "i̇İıß ẞ", "ab" * 3000]
    texts += [
        " " * 300 + "x",
        "x" + "\n" * 300,
        "\u200b\u200d\u2060a",
        "👩‍👩‍👧‍👦🏳️‍🌈🇪🇺👍🏽",
        "กำ नि 각 각",
        "\U0010ffff\ue000",
    ]
    texts += ["̈".join("abc"), "▁a▁ b", "Ġa Ċ", "<0x0A> <unk> <s> </s> <|endoftext|>", "if x:\n    return\ty\r\n\r\n"]
    for token in reference.added[:500]:
        texts += [token, f"a{token}b", f" {token} ", f"{token}{token}", token.lower(), token[:-1]]
    texts += _of_every_category()
    normal = [form for text in texts[:40] for form in {unicodedata.normalize(f, text) for f in ("NFC", "NFD", "NFKC")}]
    return texts + normal


def _of_every_category() -> list[str]:
    """Return texts with characters of each general category of Unicode, alone and between letters."""
    found: dict[str, list[str]] = {}
    for code in (*range(0x3000), *range(0x3000, 0x20000, 37), *range(0x20000, 0x110000, 9973)):
        character = chr(code)
        category = unicodedata.category(character)
        if category != "Cs":
            found.setdefault(category, []).append(character)
    texts = []
    for characters in found.values():
        some = characters[:: max(1, len(characters) // 200)]
        texts += ["".join(some), " ".join(some), "a".join(some), "1".join(some[:50])]
    return texts


def pieces(parts: Iterator[str], encoder: Any) -> Iterator[str]:
    """Yield a long text in pieces whose concatenated ids are those of the whole, or whole if no safe cut is found.

    A cut is made between a letter and a space followed by a letter, and only where the text around it gives the same
    ids cut and uncut. A tokenizer that marks the beginning of a text, or merges across words, gets the whole text.

    Args:
        parts: the text, split at arbitrary places.
    """
    held: list[str] = []
    size = 0
    for part in parts:
        held.append(part)
        size += len(part)
        if size <= 2 * PIECE_CHARS:
            continue
        text = "".join(held)
        while len(text) > 2 * PIECE_CHARS and (cut := _safe_cut(text, PIECE_CHARS, encoder)) is not None:
            yield text[:cut]
            text = text[cut:]
        # Without a safe cut, the size becomes hugely negative: no further attempt, the rest is collected whole.
        held, size = [text], len(text) if len(text) <= 2 * PIECE_CHARS else -(1 << 60)
    yield "".join(held)


def _safe_cut(text: str, near: int, encoder: Any) -> int | None:
    """Return the last safe cut within `_MARGIN` characters before `near`, or None."""
    for cut in range(near, max(near - _MARGIN, 2), -1):
        if not (text[cut - 1].isalpha() and text[cut] == " " and text[cut + 1 : cut + 2].isalpha()):
            continue
        before, after = text[max(cut - _MARGIN, 0) : cut], text[cut : cut + _MARGIN]
        ids, lengths = encoder.encode_flat([before, after, before + after])
        if np.array_equal(ids[: lengths[0] + lengths[1]], ids[lengths[0] + lengths[1] :]):
            return cut
    return None


def _shortened(text: str) -> str:
    """Return a text quoted and cut to 60 characters."""
    return repr(text if len(text) <= 60 else text[:60] + "…")


def _first_line(error: Exception) -> str:
    """Return the first line of an error, at most 200 characters."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
