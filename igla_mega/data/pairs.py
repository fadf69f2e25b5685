"""Read and tokenize preference pairs: a prompt, the chosen answer and the rejected answer.

Accepted forms of a JSONL line:
    {"prompt": text, "chosen": text, "rejected": text}
    {"prompt": [messages], "chosen": [messages], "rejected": [messages]}
    {"chosen": [messages], "rejected": [messages]}: the prompt is the common beginning of both

Messages are rendered by the tokenizer's chat template. Plain text is the concatenation of prompt, answer and
end-of-document token. Both answers follow the same prompt tokens.

Lengths, in tokens: a prompt longer than `max_prompt_length` is an error, or keeps its end (`cut`), or drops its pair
(`skip`). An answer is truncated where prompt and answer together exceed `max_length`.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np

from igla_mega.config.errors import ConfigError
from igla_mega.data.chat import (
    ChatTemplate,
    Message,
    Sample,
    TooLong,
    checked,
    json_lines,
    refuse_surrogates,
    special_ids,
)
from igla_mega.data.packing import Row, fill_row
from igla_mega.data.tokenizer import Tokenizer


class Pair(NamedTuple):
    """Tokens of a preference pair, int64 [n] each."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray


def read_pairs(
    file: str | Path,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    *,
    max_length: int,
    max_prompt_length: int,
    too_long: TooLong = "error",
) -> Iterator[tuple[str, Pair | None]]:
    """Yield (`file:line`, pair) for every line of a JSONL file, with None for a pair that is dropped.

    Raises:
        ConfigError: a line is not a pair, its answers are equal, or its prompt is too long.
    """
    for place, entry in json_lines(file):
        pair = _tokens(entry, tokenizer, template, place)
        yield place, limited(pair, place, max_length=max_length, max_prompt_length=max_prompt_length, too_long=too_long)


def limited(
    pair: Pair, place: str, *, max_length: int, max_prompt_length: int, too_long: TooLong = "error"
) -> Pair | None:
    """Return a pair cut to the limits, or None if it is dropped.

    Raises:
        ConfigError: the prompt is too long or leaves no room for an answer, or the answers are equal after the cut.
    """
    prompt = pair.prompt
    if len(prompt) > max_prompt_length:
        if too_long == "error":
            raise ConfigError(
                f"{place}: the prompt alone has {len(prompt)} tokens, more than the {max_prompt_length} of "
                "data.max_prompt_length.\n  Raise it, shorten the prompt, or set data.too_long to `cut` or `skip`."
            )
        if too_long == "skip":
            return None
        prompt = prompt[len(prompt) - max_prompt_length :]
    room = max_length - len(prompt)
    if room < 1:
        raise ConfigError(
            f"{place}: the prompt's {len(prompt)} tokens leave no room for an answer in the {max_length} of "
            "data.max_length.\n  Raise it, or lower data.max_prompt_length."
        )
    # Two answers that differ only beyond the limit carry no preference once both are cut.
    cut = Pair(prompt, pair.chosen[:room], pair.rejected[:room])
    if np.array_equal(cut.chosen, cut.rejected):
        if too_long == "skip":
            return None
        raise ConfigError(
            f"{place}: chosen and rejected are the same within the {max_length} tokens of data.max_length.\n"
            "  Raise it, or remove the line."
        )
    return cut


def _tokens(entry: Mapping[str, Any], tokenizer: Tokenizer, template: ChatTemplate | None, place: str) -> Pair:
    """Return the tokens of one line; raise ConfigError if it is not a preference pair."""
    missing = [key for key in ("chosen", "rejected") if not entry.get(key)]
    if missing:
        raise ConfigError(
            f"{place}: not a preference pair: `{missing[0]}` is missing or empty.\n  Fix or remove the line."
        )
    if entry["chosen"] == entry["rejected"]:
        raise ConfigError(f"{place}: chosen equals rejected, so there is no preference.\n  Remove the line.")
    forms = {type(entry[key]) for key in ("prompt", "chosen", "rejected") if key in entry}
    if forms == {str} and "prompt" in entry:
        refuse_surrogates(entry["prompt"] + entry["chosen"] + entry["rejected"], place)
        return _plain(entry["prompt"], entry["chosen"], entry["rejected"], tokenizer)
    if forms != {list}:
        raise ConfigError(
            f"{place}: prompt, chosen and rejected are neither three texts nor lists of messages.\n  Fix the line."
        )
    if template is None:
        raise ConfigError(f"{place}: contains messages, but there is no chat template.\n  Set data.chat_template.")
    prompt, chosen, rejected = _turns(entry, place)
    try:
        context = template.render(prompt, add_generation_prompt=True)
        answers = [template.render([*prompt, *answer]) for answer in (chosen, rejected)]
    except jinja2.TemplateError as error:
        raise ConfigError(f"{place}: the chat template fails: {error}.\n  Fix or remove the line.") from None
    if not all(answer.startswith(context) for answer in answers):
        raise ConfigError(
            f"{place}: the chat template renders the prompt differently when an answer follows.\n"
            "  Use a template that only appends."
        )
    # Prompt and answers are tokenized separately: a merge across the border would give the answers different prompts,
    # and the difference of their log-probabilities would no longer be that of the answers alone.
    ids = np.array(tokenizer.encode(context), dtype=np.int64)
    if tokenizer.add_bos == "always":  # otherwise the template decides, as in transformers
        ids = np.array([*tokenizer.lead(ids), *ids], dtype=np.int64)
    ends = [_answer(answer[len(context) :], tokenizer) for answer in answers]
    return Pair(ids, *ends)


def _plain(prompt: str, chosen: str, rejected: str, tokenizer: Tokenizer) -> Pair:
    """Return the tokens of a pair of plain texts, with the end-of-document token after each answer."""
    context, *answers = tokenizer.encode_batch([prompt, chosen, rejected])
    # Where the prompt is empty, an answer may bring its own begin-of-text token; both follow the same prompt.
    context = [*min((tokenizer.lead([*context, *answer]) for answer in answers), key=len), *context]
    parts = [context, *([*answer, *tokenizer.tail(answer)] for answer in answers)]
    return Pair(*(np.array(part, dtype=np.int64) for part in parts))


def _answer(text: str, tokenizer: Tokenizer) -> np.ndarray:
    """Return the tokens of an answer up to its last special token, without what the template appends after the turn."""
    ids = np.array(tokenizer.encode(text), dtype=np.int64)
    special = np.flatnonzero(np.isin(ids, special_ids(tokenizer)))
    return ids[: special[-1] + 1] if len(special) else ids


def _turns(entry: Mapping[str, Any], place: str) -> tuple[list[Message], list[Message], list[Message]]:
    """Return the messages of the prompt, the chosen answer and the rejected answer."""
    if "prompt" in entry:
        prompt = entry["prompt"]
        chosen, rejected = entry["chosen"], entry["rejected"]
    else:
        both = zip(entry["chosen"], entry["rejected"], strict=False)
        shared = next((i for i, (a, b) in enumerate(both) if a != b), min(len(entry["chosen"]), len(entry["rejected"])))
        prompt, chosen, rejected = entry["chosen"][:shared], entry["chosen"][shared:], entry["rejected"][shared:]
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        whole = checked([*prompt, *answer], f"{place}: {name}")
        if not answer or whole[len(prompt)]["role"] != "assistant":
            raise ConfigError(f"{place}: {name}: does not begin with an assistant turn.\n  Fix or remove the line.")
    return prompt, chosen, rejected


def rows_of(pairs: Sequence[Pair], sequence_length: int, pad_id: int) -> list[Row]:
    """Return two rows per pair, the chosen answer's first, with the tokens of the answers as targets."""
    rows = []
    for pair in pairs:
        for answer in (pair.chosen, pair.rejected):
            tokens = np.concatenate([pair.prompt, answer])
            sample = Sample(tokens, np.arange(len(tokens)) >= len(pair.prompt))
            rows.append(fill_row([sample], sequence_length, pad_id))
    return rows
