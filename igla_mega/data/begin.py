"""Find the begin-of-text tokens of a tokenizer, and whether its own library puts them in front of a text."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from igla_mega.config import json_text
from igla_mega.config.errors import ConfigError

AddBos = Literal["auto", "always", "never"]
"""Rule for begin-of-text tokens, the key `data.add_bos`: as the tokenizer's own library does, always, or never."""
CONFIG = "tokenizer_config.json"
_COMMON = ("<|begin_of_text|>", "<s>", "<bos>")
_PROBE = "The first words of a text."


@dataclass(frozen=True)
class Begin:
    """Begin-of-text tokens of a tokenizer."""

    ids: tuple[int, ...] = ()
    """Ids of the tokens; empty if the tokenizer has none."""
    is_added: bool = False
    """True if the tokenizer's own library puts them in front of a text, as `tokenizer(text)` of transformers does."""

    def under(self, rule: AddBos, tokenizer: str) -> tuple[int, ...]:
        """Return the ids in front of a text under a rule.

        Raises:
            ConfigError: the rule is `always`, and the tokenizer has no begin-of-text token.
        """
        if rule == "never" or (rule == "auto" and not self.is_added):
            return ()
        if not self.ids:
            raise ConfigError(
                f"data.add_bos: {rule}, but the tokenizer {tokenizer} has no begin-of-text token.\n"
                f"  Name it as `bos_token` in its {CONFIG}, or set data.add_bos to auto or never."
            )
        return self.ids


NO_BEGIN = Begin()


def of_hugging_face(engine: Any, file: Path, vocabulary: Mapping[str, int]) -> Begin:
    """Return the begin-of-text tokens of a Hugging Face `tokenizers.Tokenizer`."""
    # Any kind of post-processor, and what it adds at the end is not of interest: compared on a text, not by its type.
    # `add_bos_token` of the settings has no effect on a tokenizer.json, in transformers 5 neither.
    for probe in (_PROBE, *vocabulary):
        plain = engine.encode(probe, add_special_tokens=False).ids
        if plain:
            break
    else:
        return Begin(_named(file, vocabulary))
    whole = engine.encode(probe).ids
    starts = range(len(whole) - len(plain) + 1)
    first = next((start for start in starts if whole[start : start + len(plain)] == plain), 0)
    return Begin(tuple(whole[:first]), True) if first else Begin(_named(file, vocabulary))


def of_sentencepiece(engine: Any, file: Path) -> Begin:
    """Return the begin-of-text token of a SentencePieceProcessor, which itself adds none."""
    ids = (engine.bos_id(),) if engine.bos_id() >= 0 else ()
    return Begin(ids, bool(ids) and settings_beside(file).get("add_bos_token") is True)


def of_tiktoken(special: Mapping[str, int], file: Path) -> Begin:
    """Return the begin-of-text token of a tiktoken encoding, which itself adds none.

    Args:
        special: text -> id of its special tokens.
    """
    ids = _named(file, special)
    return Begin(ids, bool(ids) and settings_beside(file).get("add_bos_token") is True)


def _named(file: Path, vocabulary: Mapping[str, int]) -> tuple[int, ...]:
    """Return the id of the `bos_token` named by the settings next to a tokenizer's file; without any, a common one."""
    settings = settings_beside(file)
    if not settings:
        return next(((vocabulary[name],) for name in _COMMON if name in vocabulary), ())
    named = settings.get("bos_token")
    named = named.get("content") if isinstance(named, dict) else named
    return (vocabulary[named],) if isinstance(named, str) and named in vocabulary else ()


def settings_beside(file: Path) -> dict[str, Any]:
    """Return the settings next to a tokenizer's file, special_tokens_map.json included; empty if there are none.

    Raises:
        ConfigError: they are not a JSON object.
    """
    found: dict[str, Any] = {}
    for path in (file.with_name("special_tokens_map.json"), file.with_name(CONFIG)):
        if not path.is_file():
            continue
        try:
            content = json_text.read(path)
            if not isinstance(content, dict):
                raise ValueError(f"a {type(content).__name__}")
            found |= content
        except ValueError as error:
            raise ConfigError(f"{path}: not a JSON object ({error}).\n  Save the tokenizer again.") from None
    return found
