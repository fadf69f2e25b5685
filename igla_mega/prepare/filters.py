"""Documents that are left out for what they are: too short, too long, mostly symbols, of another language."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Filters:
    """What a document must be to stay. None asks for nothing."""

    min_characters: int | None = None
    max_characters: int | None = None
    max_symbol_ratio: float | None = None
    """Most of its characters, spaces aside, that may be neither letters nor digits: 0 to 1."""
    languages: tuple[str, ...] | None = None
    """Tags that stay; a document without a tag does not."""

    @property
    def any(self) -> bool:
        return self != Filters()

    def keep(
        self, texts: list[str], languages: Sequence[str | None]
    ) -> tuple[list[str], Sequence[str | None], Counter]:
        """The texts that stay, their tags, and how many each filter left out."""
        if not self.any:
            return texts, languages, Counter()
        reasons = [self.reason(text, languages[i] if languages else None) for i, text in enumerate(texts)]
        kept = [text for text, reason in zip(texts, reasons, strict=True) if reason is None]
        tags = [tag for tag, reason in zip(languages, reasons, strict=False) if reason is None]
        return kept, tags, Counter(reason for reason in reasons if reason is not None)

    def reason(self, text: str, language: str | None = None) -> str | None:
        """The first filter that leaves it out."""
        if self.languages is not None and language not in self.languages:
            return "language"
        return self.reason_for(text, len(text))

    def reason_for(self, text: str, length: int) -> str | None:
        """The same of a text of which only a sample is at hand."""
        if self.min_characters is not None and length < self.min_characters:
            return "too_short"
        if self.max_characters is not None and length > self.max_characters:
            return "too_long"
        if self.max_symbol_ratio is not None and symbol_ratio(text) > self.max_symbol_ratio:
            return "symbols"
        return None


def symbol_ratio(text: str) -> float:
    """Share of the characters, spaces aside, that are neither letters nor digits."""
    solid = "".join(text.split())
    return sum(not character.isalnum() for character in solid) / max(len(solid), 1)
