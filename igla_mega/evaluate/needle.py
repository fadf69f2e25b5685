"""A needle in a haystack: does the model find a fact that stands far back in its context?

A row is held-out text of the run with one sentence put into it, `The secret word of CUE is VALUE.`, and behind the text
the sentence again up to its value: a context of the length asked for. Cue and value are a few words of the text itself,
drawn again for each row. The value's tokens are scored teacher-forced, by a forward pass alone: each is held against the
other words that values are drawn from, and against the whole vocabulary. A model that does not see the fact is right by
chance, one time in `NUM_WORDS`, whatever else it has learned.
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
"""Words that values are drawn from."""
CUE_TOKENS, VALUE_TOKENS = 2, 3
OPENING, MIDDLE, CLOSING = " The secret word of", " is", "."
_SAMPLED_TOKENS = 200_000
"""Of held-out text, in which words are looked for."""

Grid = dict[str, dict[str, float]]
"""Length in tokens -> depth in percent -> a share of the value's tokens, or of the samples."""


@dataclass(frozen=True)
class Haystack:
    """What rows are made of: the same on every rank, and at every step of a run."""

    asked: Needle
    lengths: tuple[int, ...]
    corpus: Corpus
    seed: int
    words: tuple[int, ...]
    """Token ids: first those of values, then those of cues."""
    opening: tuple[int, ...]
    middle: tuple[int, ...]
    closing: tuple[int, ...]
    end_of_document: int | None
    """Left out of the text: what stands before it would be another document to the model."""

    def row(self, length: int, depth: float, sample: int) -> Row:
        """A context of `length` tokens and the value behind it; the fact stands behind `depth` percent of the text."""
        draws = np.random.default_rng([self.seed, length, round(depth * 1000), sample])
        value = draws.choice(self.words[:NUM_WORDS], VALUE_TOKENS).tolist()
        cue = draws.choice(self.words[NUM_WORDS:], CUE_TOKENS).tolist()
        question = [*self.opening, *cue, *self.middle]
        fact = [*question, *value, *self.closing]
        text = self._text(length - len(fact) - len(question), sample)
        place = round(len(text) * depth / 100)
        return Row([*text[:place], *fact, *text[place:], *question, *value], VALUE_TOKENS)

    def _text(self, length: int, sample: int) -> list[int]:
        """Held-out text of one source after the other; where a source has too little, from its beginning again."""
        names = self.corpus.validation_names()
        name, turn = names[sample % len(names)], sample // len(names)
        first, end = self.corpus.held_out(name)
        start = first + turn * length % (end - first)
        text: list[int] = []
        while len(text) < length:
            stop = min(end, start + length - len(text))
            read = self.corpus.readers[name].tokens(start, stop).tolist()
            text += [token for token in read if token != self.end_of_document] or read
            start = first if stop == end else stop
        return text[:length]


def prepare(asked: Needle, corpus: Corpus, tokenizer: Tokenizer, sequence_length: int, seed: int) -> Haystack:
    """Choose the words, and see that every length holds a fact and its question.

    Raises:
        ConfigError: a length is too short or too long, or the held-out text has too few words.
    """
    opening, middle, closing = (tuple(tokenizer.encode(text)) for text in (OPENING, MIDDLE, CLOSING))
    lengths = asked.lengths or tuple(sorted({sequence_length // 4 or 1, sequence_length // 2 or 1, sequence_length}))
    # Text before and behind the fact, or depths would mean nothing.
    least = 2 * (len(opening) + CUE_TOKENS + len(middle)) + VALUE_TOKENS + len(closing) + 2
    if asked.lengths is None:
        lengths = tuple(length for length in lengths if length >= least) or lengths[-1:]
    breaches = [
        f"evaluation.needle.lengths: {length} tokens do not hold the fact, its question and some text around it: these "
        f"are {least} tokens in this tokenizer. Use {least} or more."
        for length in lengths
        if length < least
    ]
    words = _words(corpus, tokenizer)
    if len(words) < NUM_WORDS + CUE_TOKENS:
        breaches.append(
            f"evaluation.needle: the held-out text has {len(words)} different tokens, and {NUM_WORDS + CUE_TOKENS} are "
            "needed. Raise data.validation_fraction, or leave evaluation.needle out."
        )
    if breaches:
        raise ConfigError(*breaches)
    return Haystack(asked, lengths, corpus, seed, words, opening, middle, closing, tokenizer.eod_id)


def measure(engine: Engine, haystack: Haystack) -> tuple[Grid, Grid]:
    """Look for the needle at each length and depth.

    Returns:
        The share of the value's tokens that are likelier than every other word a value could have had, and the share of
        the samples whose value is word for word the model's likeliest continuation.
    """
    chosen, exact = Grid(), Grid()
    asked = haystack.asked
    for length in haystack.lengths:
        rows = [haystack.row(length, depth, n) for depth in asked.depths for n in range(asked.num_samples)]
        scores = score(engine, rows, haystack.words[:NUM_WORDS])
        chosen[str(length)], exact[str(length)] = {}, {}
        for number, depth in enumerate(asked.depths):
            own = scores[number * asked.num_samples : (number + 1) * asked.num_samples]
            right = sum(VALUE_TOKENS - one.beaten for one in own) / (VALUE_TOKENS * len(own))
            chosen[str(length)][f"{depth:g}"] = round(right, 4)
            exact[str(length)][f"{depth:g}"] = round(sum(one.not_likeliest == 0 for one in own) / len(own), 4)
    return chosen, exact


def words_of(chosen: Grid, exact: Grid) -> str:
    """Both grids in a line."""
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
    """Frequent tokens of held-out text that are whole words as far as the tokenizer shows, else the most frequent ones."""
    names = corpus.validation_names()
    counts: Counter[int] = Counter()
    for name in names:
        first, end = corpus.held_out(name)
        counts.update(corpus.readers[name].tokens(first, min(end, first + _SAMPLED_TOKENS // len(names))).tolist())
    counts.pop(tokenizer.eod_id if tokenizer.eod_id is not None else -1, None)
    frequent = sorted(counts, key=lambda token: (-counts[token], token))
    whole = [token for token in frequent[:2000] if _is_word(tokenizer.decode([token]))]
    chosen: Sequence[int] = whole if len(whole) >= NUM_WORDS + CUE_TOKENS else frequent
    return tuple(chosen[: 4 * NUM_WORDS])


def _is_word(text: str) -> bool:
    return len(text.strip()) >= 3 and text.strip().isalpha()
