"""Measure whether the model retrieves a fact from far back in its context (needle in a haystack).

A row is held-out text of the run with one sentence inserted, `The secret word of CUE is VALUE.`, followed by the same
sentence up to its value; together they have the configured length. Cue and value are a few words of the text itself,
drawn independently for each row. The tokens of the value are scored with teacher forcing, in one forward pass: each is
compared with the other words that values are drawn from, and with the whole vocabulary. A model that does not see the
fact is right by chance, once in `NUM_WORDS` tokens, independently of what it has learned.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from igla_mega.config.errors import ConfigError
from igla_mega.config.schema import Needle
from igla_mega.data.batches import Corpus
from igla_mega.data.tokenizer import Tokenizer
from igla_mega.engine.step import Engine
from igla_mega.evaluate.scoring import Row, score

NUM_WORDS = 10
"""Number of words that values are drawn from."""
CUE_TOKENS, VALUE_TOKENS = 2, 3
OPENING, MIDDLE, CLOSING = " The secret word of", " is", "."
_SAMPLED_TOKENS = 200_000
"""Number of tokens of held-out text in which words are counted."""

Grid = dict[str, dict[str, float]]
"""Context length in tokens -> depth in percent -> share in [0, 1] of the values' tokens, or of the samples."""


@dataclass(frozen=True)
class Haystack:
    """Source of the rows; rows are the same on every rank and at every step of a run."""

    asked: Needle
    lengths: tuple[int, ...]
    corpus: Corpus
    seed: int
    words: tuple[int, ...]
    """Token ids: first `NUM_WORDS` of values, then those of cues."""
    opening: tuple[int, ...]
    middle: tuple[int, ...]
    closing: tuple[int, ...]
    end_of_document: int | None
    """Token id that is removed from the text, since attention may not reach across it."""
    bos: tuple[int, ...] = ()
    """Ids at the beginning of a context, which are removed from within the text."""

    def row(self, length: int, depth: float, sample: int) -> Row:
        """Return a context of `length` tokens and then the value; the fact comes after `depth` percent of the text."""
        # Seeded by the row's own coordinates: a row does not depend on which others are measured.
        draws = np.random.default_rng([self.seed, length, round(depth * 1000), sample])
        value = draws.choice(self.words[:NUM_WORDS], VALUE_TOKENS).tolist()
        cue = draws.choice(self.words[NUM_WORDS:], CUE_TOKENS).tolist()
        question = [*self.opening, *cue, *self.middle]
        fact = [*question, *value, *self.closing]
        text = self._text(length - len(self.bos) - len(fact) - len(question), sample)
        place = round(len(text) * depth / 100)
        return Row([*self.bos, *text[:place], *fact, *text[place:], *question, *value], VALUE_TOKENS)

    def _text(self, length: int, sample: int) -> list[int]:
        """Return `length` tokens of held-out text; sources take turns, and a short one repeats from its beginning."""
        names = self.corpus.validation_names()
        name, turn = names[sample % len(names)], sample // len(names)
        first, end = self.corpus.held_out(name)
        start = first + turn * length % (end - first)
        text: list[int] = []
        left_out = 0
        while len(text) < length:
            stop = min(end, start + length - len(text))
            read = self.corpus.readers[name].tokens(start, stop).tolist()
            kept = [token for token in read if token not in (self.end_of_document, *self.bos)]
            left_out = 0 if kept else left_out + len(read)
            # A source of nothing but document ends must still make progress.
            text += kept if left_out < end - first else read
            start = first if stop == end else stop
        return text[:length]


def prepare(asked: Needle, corpus: Corpus, tokenizer: Tokenizer, sequence_length: int, seed: int) -> Haystack:
    """Choose the words, and check that every length has room for a fact and its question.

    Raises:
        ConfigError: a length is too short, or the held-out text has too few different tokens.
    """
    opening, middle, closing = (tuple(tokenizer.encode(text)) for text in (OPENING, MIDDLE, CLOSING))
    lengths = asked.lengths or tuple(sorted({sequence_length // 4 or 1, sequence_length // 2 or 1, sequence_length}))
    # The last 2: some text before and after the fact, or depths would have no meaning.
    least = len(tokenizer.bos) + 2 * (len(opening) + CUE_TOKENS + len(middle)) + VALUE_TOKENS + len(closing) + 2
    if asked.lengths is None:
        lengths = tuple(length for length in lengths if length >= least) or lengths[-1:]
    breaches = [
        f"evaluation.needle.lengths: {length} tokens are too short for the fact, its question and some text around it, "
        f"which need {least} tokens with this tokenizer. Use {least} or more."
        for length in lengths
        if length < least
    ]
    words = _words(corpus, tokenizer)
    if len(words) < NUM_WORDS + CUE_TOKENS:
        breaches.append(
            f"evaluation.needle: the held-out text has {len(words)} different tokens, fewer than the required "
            f"{NUM_WORDS + CUE_TOKENS}. Raise data.validation_fraction, or remove evaluation.needle."
        )
    if breaches:
        raise ConfigError(*breaches)
    return Haystack(asked, lengths, corpus, seed, words, opening, middle, closing, tokenizer.eod_id, tokenizer.bos)


def measure(engine: Engine, haystack: Haystack) -> tuple[Grid, Grid]:
    """Measure retrieval at each length and depth. Collective.

    Returns:
        Share of the values' tokens that are more likely than every other word that a value could have; share of the
        samples whose value is exactly the model's most likely continuation.
    """
    chosen, exact = Grid(), Grid()
    asked = haystack.asked
    for length in haystack.lengths:
        rows = [haystack.row(length, depth, n) for depth in asked.depths for n in range(asked.num_samples)]
        scores = score(engine, rows, haystack.words[:NUM_WORDS])
        chosen[str(length)], exact[str(length)] = {}, {}
        for number, depth in enumerate(asked.depths):
            samples = scores[number * asked.num_samples : (number + 1) * asked.num_samples]
            right = sum(VALUE_TOKENS - one.beaten for one in samples) / (VALUE_TOKENS * len(samples))
            chosen[str(length)][f"{depth:g}"] = round(right, 4)
            exact[str(length)][f"{depth:g}"] = round(sum(one.not_likeliest == 0 for one in samples) / len(samples), 4)
    return chosen, exact


def words_of(chosen: Grid, exact: Grid) -> str:
    """Return both grids as one line of text for the console."""
    parts = []
    for length, by_depth in chosen.items():
        worst = min(by_depth, key=lambda depth: by_depth[depth])
        mean, literal = _mean(by_depth), _mean(exact[length])
        where = f", least {by_depth[worst]:.0%} at depth {worst} %" if len(by_depth) > 1 else ""
        parts.append(f"{length} tokens {mean:.0%} (word for word {literal:.0%}{where})")
    return f"needle, found (chance {1 / NUM_WORDS:.0%})  {'  '.join(parts)}"


def _mean(by_depth: dict[str, float]) -> float:
    return sum(by_depth.values()) / len(by_depth)


def _words(corpus: Corpus, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the most frequent tokens of held-out text that look like whole words; if too few do, the most frequent."""
    names = corpus.validation_names()
    counts: Counter[int] = Counter()
    for name in names:
        first, end = corpus.held_out(name)
        counts.update(corpus.readers[name].tokens(first, min(end, first + _SAMPLED_TOKENS // len(names))).tolist())
    for token in (tokenizer.eod_id, *tokenizer.bos):
        counts.pop(token, None)  # type: ignore[arg-type]
    frequent = sorted(counts, key=lambda token: (-counts[token], token))
    whole = [token for token in frequent[:2000] if _is_word(tokenizer.decode([token]))]
    chosen: Sequence[int] = whole if len(whole) >= NUM_WORDS + CUE_TOKENS else frequent
    return tuple(chosen[: 4 * NUM_WORDS])


def _is_word(text: str) -> bool:
    return len(text.strip()) >= 3 and text.strip().isalpha()
