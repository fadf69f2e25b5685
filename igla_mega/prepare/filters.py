"""Drop documents by their content: too short, too long, mostly symbols, or in another language."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Filters:
    """Conditions that a kept document fulfills; None disables a condition."""

    min_characters: int | None = None
    """Minimum length in characters."""
    max_characters: int | None = None
    """Maximum length in characters."""
    max_symbol_ratio: float | None = None
    """Maximum fraction of the characters, without spaces, that are neither letters nor digits, 0 to 1."""
    languages: tuple[str, ...] | None = None
    """Language tags to keep; a document without a tag is dropped."""

    @property
    def any(self) -> bool:
        """True if any condition is set."""
        return self != Filters()

    def keep(
        self, texts: list[str], languages: Sequence[str | None]
    ) -> tuple[list[str], Sequence[str | None], Counter]:
        """Return the kept texts, their language tags, and the number dropped by each filter."""
        if not self.any:
            return texts, languages, Counter()
        reasons = [self.reason(text, languages[i] if languages else None) for i, text in enumerate(texts)]
        kept = [text for text, reason in zip(texts, reasons, strict=True) if reason is None]
        tags = [tag for tag, reason in zip(languages, reasons, strict=False) if reason is None]
        return kept, tags, Counter(reason for reason in reasons if reason is not None)

    def reason(self, text: str, language: str | None = None) -> str | None:
        """Return the name of the first filter that drops a text, or None if it is kept."""
        if self.languages is not None and language not in self.languages:
            return "language"
        return self.reason_for(text, len(text))

    def reason_for(self, text: str, length: int) -> str | None:
        """Return the same as `reason`, without the language, for a sample of a text of the given length."""
        if self.min_characters is not None and length < self.min_characters:
            return "too_short"
        if self.max_characters is not None and length > self.max_characters:
            return "too_long"
        if self.max_symbol_ratio is not None and symbol_ratio(text) > self.max_symbol_ratio:
            return "symbols"
        return None


def symbol_ratio(text: str) -> float:
    """Return the fraction of the characters, without spaces, that are neither letters nor digits, 0 to 1."""
    solid = "".join(text.split())
    return sum(not character.isalnum() for character in solid) / max(len(solid), 1)
