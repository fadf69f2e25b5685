"""Preference pairs: a prompt, the answer that was chosen and the one that was rejected.

What a line of JSONL may be:
    {"prompt": text, "chosen": text, "rejected": text}
    {"prompt": [messages], "chosen": [messages], "rejected": [messages]}
    {"chosen": [messages], "rejected": [messages]}: the prompt is what both begin with

Messages go through the tokenizer's chat template; of text, prompt and answer are put end to end, and the
end-of-document token behind them. Both answers follow the same prompt tokens.

Lengths, in tokens: a prompt longer than `max_prompt_length` is an error, or (`cut`) keeps its end, or (`skip`) its pair
is left out. An answer that goes beyond `max_length` together with its prompt loses its end.
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
    """Tokens of a pair, int64 each."""

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
    """Every line of a JSONL file as a pair with its place (`file:line`); None for one that is left out.

    Raises:
        ConfigError: a line is no pair, its answers are the same, or its prompt is too long.
    """
    for place, entry in json_lines(file):
        pair = _tokens(entry, tokenizer, template, place)
        yield place, limited(pair, place, max_length=max_length, max_prompt_length=max_prompt_length, too_long=too_long)


def limited(
    pair: Pair, place: str, *, max_length: int, max_prompt_length: int, too_long: TooLong = "error"
) -> Pair | None:
    """A pair within the limits; None for one that is left out.

    Raises:
        ConfigError: its prompt is too long or leaves no room for an answer, or the answers are the same once cut.
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
    missing = [key for key in ("chosen", "rejected") if not entry.get(key)]
    if missing:
        raise ConfigError(
            f"{place}: no preference pair: `{missing[0]}` is missing or empty.\n  Mend or remove the line."
        )
    if entry["chosen"] == entry["rejected"]:
        raise ConfigError(f"{place}: chosen equals rejected, so nothing is preferred.\n  Remove the line.")
    forms = {type(entry[key]) for key in ("prompt", "chosen", "rejected") if key in entry}
    if forms == {str} and "prompt" in entry:
        refuse_surrogates(entry["prompt"] + entry["chosen"] + entry["rejected"], place)
        return _plain(entry["prompt"], entry["chosen"], entry["rejected"], tokenizer)
    if forms != {list}:
        raise ConfigError(
            f"{place}: prompt, chosen and rejected: neither three texts nor lists of messages.\n  Mend the line."
        )
    if template is None:
        raise ConfigError(f"{place}: turns, but no chat template.\n  Set data.chat_template.")
    prompt, chosen, rejected = _turns(entry, place)
    try:
        context = template.render(prompt, add_generation_prompt=True)
        answers = [template.render([*prompt, *answer]) for answer in (chosen, rejected)]
    except jinja2.TemplateError as error:
        raise ConfigError(f"{place}: the chat template refuses it: {error}.\n  Mend or remove the line.") from None
    if not all(answer.startswith(context) for answer in answers):
        raise ConfigError(
            f"{place}: the chat template writes the prompt otherwise once an answer follows.\n"
            "  Use a template that only appends."
        )
    # Tokenized apart, so that both answers follow the same tokens.
    ids = np.array(tokenizer.encode(context), dtype=np.int64)
    ends = [_answer(answer[len(context) :], tokenizer) for answer in answers]
    return Pair(ids, *ends)


def _plain(prompt: str, chosen: str, rejected: str, tokenizer: Tokenizer) -> Pair:
    end = [] if tokenizer.eod_id is None else [tokenizer.eod_id]
    context, *answers = (np.array(ids, dtype=np.int64) for ids in tokenizer.encode_batch([prompt, chosen, rejected]))
    return Pair(context, *(np.append(answer, end).astype(np.int64) for answer in answers))


def _answer(text: str, tokenizer: Tokenizer) -> np.ndarray:
    """Tokens of an answer up to the last special token: what a template puts behind it is nobody's."""
    ids = np.array(tokenizer.encode(text), dtype=np.int64)
    special = np.flatnonzero(np.isin(ids, special_ids(tokenizer)))
    return ids[: special[-1] + 1] if len(special) else ids


def _turns(entry: Mapping[str, Any], place: str) -> tuple[list[Message], list[Message], list[Message]]:
    """Messages of the prompt and of both answers."""
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
            raise ConfigError(f"{place}: {name}: does not begin with the assistant's turn.\n  Mend or remove the line.")
    return prompt, chosen, rejected


def rows_of(pairs: Sequence[Pair], sequence_length: int, pad_id: int) -> list[Row]:
    """Two rows of each pair, the chosen answer's first; the answers' tokens are the targets."""
    rows = []
    for pair in pairs:
        for answer in (pair.chosen, pair.rejected):
            tokens = np.concatenate([pair.prompt, answer])
            sample = Sample(tokens, np.arange(len(tokens)) >= len(pair.prompt))
            rows.append(fill_row([sample], sequence_length, pad_id))
    return rows
