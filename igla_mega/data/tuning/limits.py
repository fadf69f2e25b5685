"""Hold tokenized conversations and pairs to their limits: one rule for prompts, answers and conversations.

`data.too_long` selects what happens to a line above a limit: `error` names it, `skip` leaves it out, `cut` shortens it.

A conversation is cut after its last answer that fits whole. If its first answer does not fit, it is cut as a pair is:
the prompt loses its beginning until the answers fit or half of the limit is left for the prompt; then the answers lose
what is before their end token. Begin-of-text tokens of the prompt stay. A line is left out if no token of the prompt
would be left, nothing of an answer but its end token, or two equal answers.
"""

from collections.abc import Collection, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from igla_mega.config.errors import ConfigError
from igla_mega.data.tokenizer import Tokenizer
from igla_mega.data.tuning.chat import Sample
from igla_mega.data.tuning.pairs import Pair

TooLong = Literal["error", "cut", "skip"]
_WAYS_OUT = "  Raise it, shorten the line, or set data.too_long to `cut` or `skip`."


class Limits(NamedTuple):
    """Maximum lengths, in tokens."""

    max_length: int | None
    """Maximum length of a sample, or of a prompt with one answer; None for no limit."""
    max_prompt_length: int | None = None
    """Maximum length of the prompt of a pair; None for no other limit than `max_length`."""
    too_long: TooLong = "error"


def end_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the ids that may end an answer: the special tokens and the end-of-document token."""
    known: dict[int, Any] = getattr(tokenizer.engine, "get_added_tokens_decoder", dict)()
    special = {number for number, token in known.items() if token.special}
    return frozenset(special if tokenizer.eod_id is None else special | {tokenizer.eod_id})


def limit_sample(
    sample: Sample, limits: Limits, ends: Collection[int], place: str, *, begin: Sequence[int] = ()
) -> Sample | None:
    """Return a conversation within its limit: the same object if it is not too long, None if it is left out.

    Args:
        ends: ids that may end an answer.
        place: `file:line` for the errors.
        begin: begin-of-text ids, which a prompt that loses its beginning keeps.

    Raises:
        ConfigError: it is too long, and `too_long` is `error`.
    """
    length, most = len(sample.tokens), limits.max_length
    if most is None or length <= most:
        return sample
    if limits.too_long == "error":
        raise ConfigError(f"{place}: {length} tokens exceed data.max_length {most}.\n{_WAYS_OUT}")
    if limits.too_long == "skip":
        return None
    borders = np.flatnonzero(np.diff(sample.targets, prepend=False, append=False))
    answers = [(int(first), int(stop)) for first, stop in borders.reshape(-1, 2) if stop > 1]
    if fitting := [stop for _, stop in answers if stop <= most]:
        return Sample(sample.tokens[: fitting[-1]], sample.targets[: fitting[-1]])
    first, stop = answers[0]
    kept = _kept(first, stop - first, most)
    answer = _short(sample.tokens[first:stop], most - kept, ends)
    if answer is None or (first and not kept):
        return None
    tokens = np.concatenate([_end_of(sample.tokens[:first], kept, begin), answer])
    return Sample(tokens, np.arange(len(tokens)) >= kept)


def limit_pair(
    pair: Pair, limits: Limits, ends: Collection[int], place: str, *, begin: Sequence[int] = ()
) -> Pair | None:
    """Return a pair within its limits: the same object if it is not too long, None if it is left out.

    Arguments and error are those of `limit_sample`.
    """
    prompt, most, most_prompt = len(pair.prompt), limits.max_length, limits.max_prompt_length
    longest = max(len(pair.chosen), len(pair.rejected))
    over_prompt = most_prompt is not None and prompt > most_prompt
    if not over_prompt and (most is None or prompt + longest <= most):
        return pair
    if limits.too_long == "error" and over_prompt:
        raise ConfigError(
            f"{place}: the prompt alone has {prompt} tokens, more than the {most_prompt} of "
            f"data.max_prompt_length.\n{_WAYS_OUT}"
        )
    if limits.too_long == "error":
        name = "chosen" if longest == len(pair.chosen) else "rejected"
        raise ConfigError(
            f"{place}: the prompt's {prompt} and the {name} answer's {longest} tokens exceed data.max_length {most}.\n"
            f"{_WAYS_OUT}"
        )
    if limits.too_long == "skip":
        return None
    kept = prompt if most_prompt is None else min(prompt, most_prompt)
    kept = kept if most is None else _kept(kept, longest, most)
    room = longest if most is None else most - kept
    chosen, rejected = (_short(answer, room, ends) for answer in (pair.chosen, pair.rejected))
    if not kept or chosen is None or rejected is None or np.array_equal(chosen, rejected):
        return None
    return Pair(_end_of(pair.prompt, kept, begin), chosen, rejected)


def _kept(prompt: int, answer: int, most: int) -> int:
    """Return how many tokens of a prompt are kept before an answer."""
    return min(prompt, max(most - answer, most // 2))


def _end_of(prompt: np.ndarray, kept: int, begin: Sequence[int]) -> np.ndarray:
    """Return the last tokens of a prompt, `kept` with the begin-of-text ids in front of it, which the model expects."""
    width = len(begin) if tuple(prompt[: len(begin)]) == tuple(begin) and len(begin) < kept else 0
    return np.concatenate([prompt[:width], prompt[len(prompt) - kept + width :]])


def _short(answer: np.ndarray, room: int, ends: Collection[int]) -> np.ndarray | None:
    """Return an answer in at most `room` tokens, with its end token; None if nothing else would be left."""
    if len(answer) <= room:
        return answer
    if len(answer) and int(answer[-1]) not in ends:
        return answer[:room] if room > 0 else None
    return np.append(answer[: room - 1], answer[-1:]) if room > 1 else None
