"""Read and tokenize preference pairs: a prompt, the chosen answer and the rejected answer.

Accepted forms of a line:
    {"prompt": text, "chosen": text, "rejected": text}
    {"prompt": [messages], "chosen": [messages], "rejected": [messages]}
    {"chosen": [messages], "rejected": [messages]}: the prompt is the common beginning of both
    {"prompt": text, "chosen": [messages], "rejected": [messages]}: the text is the user's turn before the answers, and
        may be in the lists, too (UltraFeedback)
    {"chosen": text, "rejected": text}, each a dialogue with "\\n\\nHuman:" and "\\n\\nAssistant:" (HH-RLHF): the prompt
        is the common beginning up to the last "\\n\\nAssistant:" in it
    {"conversations": [messages], "chosen": message, "rejected": message} (ShareGPT)

Messages are as in `forms`, and rendered by the tokenizer's chat template; `tools` are rendered, too. Plain text is the
concatenation of prompt, answer and end-of-document token. Both answers follow the same prompt tokens.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from igla_mega.config.errors import ConfigError
from igla_mega.data.packing import Row, fill_row
from igla_mega.data.tokenizer import Tokenizer
from igla_mega.data.tuning.chat import Sample, ended
from igla_mega.data.tuning.forms import (
    Conversation,
    checked,
    conversation,
    present,
    refuse_other_prompt,
    refuse_surrogates,
    refuse_unknown,
    tools_of,
)
from igla_mega.data.tuning.turns import Template, rendered, special_ids

_ASSISTANT = "\n\nAssistant:"
_KEYS = ("prompt", "chosen", "rejected")


class Pair(NamedTuple):
    """Tokens of a preference pair, int64 [n] each."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray


def pair_of(line: Mapping[str, Any], tokenizer: Tokenizer, template: Template | None, place: str) -> Pair:
    """Return the tokens of one line.

    Args:
        place: `file:line` for the errors.

    Raises:
        ConfigError: the line is not a preference pair, a key would be dropped, or its answers are equal.
    """
    entry = present(line, ("prompt",))
    keys = ", ".join(sorted(entry)) or "none"
    if missing := [key for key in ("chosen", "rejected") if key not in entry]:
        raise ConfigError(
            f"{place}: not a preference pair: `{missing[0]}` is missing or empty; its keys are {keys}.\n"
            "  Use `prompt`, `chosen` and `rejected`."
        )
    if entry["chosen"] == entry["rejected"]:
        raise ConfigError(f"{place}: chosen equals rejected, so there is no preference.\n  Remove the line.")
    if isinstance(entry["chosen"], str) and isinstance(entry["rejected"], str):
        pair = _plain(*_texts(entry, place), tokenizer)
    else:
        prompt, chosen, rejected = _turns(entry, place)
        tools = tools_of(entry, place)
        both = {"chosen": [*prompt, *chosen], "rejected": [*prompt, *rejected]}
        parts = [
            _rendered(_answered(turns, len(prompt), tools, f"{place}: {name}"), tokenizer, template, f"{place}: {name}")
            for name, turns in both.items()
        ]
        if parts[0][0] != parts[1][0]:
            raise ConfigError(f"{place}: the chat template renders the prompt differently before the two answers.")
        pair = _tokens(parts[0][0], [answer for _, answer in parts], tokenizer)
    if np.array_equal(pair.chosen, pair.rejected):
        raise ConfigError(
            f"{place}: chosen and rejected are the same tokens, so there is no preference.\n  Remove the line."
        )
    if not len(pair.prompt):
        raise ConfigError(f"{place}: the prompt is empty, so nothing precedes the answers.\n  Remove the line.")
    return pair


def _texts(entry: Mapping[str, Any], place: str) -> tuple[str, str, str]:
    """Return prompt, chosen answer and rejected answer of a line of texts."""
    refuse_unknown(entry, _KEYS, place)
    chosen, rejected = entry["chosen"], entry["rejected"]
    if "prompt" in entry:
        prompt = entry["prompt"]
        if isinstance(prompt, str) and _ASSISTANT in prompt and chosen.startswith(prompt):
            raise ConfigError(
                f"{place}: the answers repeat `prompt`, which would be learned twice.\n  Remove it from the line."
            )
    else:
        shared = os.path.commonprefix([chosen, rejected])  # noqa: RUF071 (of texts, not of paths)
        begin = shared.rfind(_ASSISTANT) + len(_ASSISTANT)
        if _ASSISTANT not in shared:
            raise ConfigError(
                f"{place}: two texts without `prompt`, and without {_ASSISTANT!r} in their common beginning, as HH-RLHF"
                " has it.\n  Write what precedes both answers as `prompt`, and the answers alone as the other two."
            )
        prompt, chosen, rejected = chosen[:begin], chosen[begin:], rejected[begin:]
    if not isinstance(prompt, str) or not chosen.strip() or not rejected.strip():
        raise ConfigError(
            f"{place}: prompt, chosen and rejected are neither three texts nor lists of messages, or an answer is "
            "empty.\n  Fix or remove the line."
        )
    refuse_surrogates(prompt + chosen + rejected, place)
    return prompt, chosen, rejected


def _plain(prompt: str, chosen: str, rejected: str, tokenizer: Tokenizer) -> Pair:
    """Return the tokens of a pair of plain texts, with the end-of-document token after each answer."""
    context, *answers = tokenizer.encode(prompt), ended(chosen, tokenizer), ended(rejected, tokenizer)
    # Where the prompt is empty, an answer may bring its own begin-of-text token; both follow the same prompt.
    context = [*min((tokenizer.lead([*context, *answer]) for answer in answers), key=len), *context]
    return Pair(*(np.array(ids, dtype=np.int64) for ids in (context, *answers)))


def _turns(entry: Mapping[str, Any], place: str) -> tuple[list[Any], list[Any], list[Any]]:
    """Return the turns of the prompt, the chosen answer and the rejected answer of a line of messages."""
    refuse_unknown(entry, (*_KEYS, "conversations", "messages", "system", "tools"), place)
    chosen, rejected = ([given] if isinstance(given := entry[key], dict) else given for key in ("chosen", "rejected"))
    prompt = entry.get("prompt", entry.get("conversations"))
    if not isinstance(chosen, list) or not isinstance(rejected, list) or not isinstance(prompt, list | str | None):
        raise ConfigError(
            f"{place}: prompt, chosen and rejected are neither three texts nor lists of messages.\n  Fix the line."
        )
    # UltraFeedback has the chosen conversation a second time.
    if entry.get("messages", chosen) != chosen or {"prompt", "conversations"} <= entry.keys():
        raise ConfigError(f"{place}: `messages` or `conversations` would be dropped.\n  Remove the key.")
    chosen, rejected = checked(chosen, f"{place}: chosen"), checked(rejected, f"{place}: rejected")
    if isinstance(prompt, str) and chosen[0]["role"] == rejected[0]["role"] == "assistant":
        prompt = [{"role": "user", "content": prompt}]
    elif not isinstance(prompt, list):
        both = enumerate(zip(chosen, rejected, strict=False))
        shared = next((i for i, (a, b) in both if a != b), min(len(chosen), len(rejected)))
        if prompt is not None:
            refuse_other_prompt(prompt, chosen[:shared], place)
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if "system" in entry:
        prompt = [{"role": "system", "content": entry["system"]}, *prompt]
    return prompt, chosen, rejected


def _answered(turns: list[Any], first: int, tools: list[Any] | None, place: str) -> Conversation:
    """Return a prompt and one answer as a conversation whose answer is the target."""
    found = conversation(turns, place, {}, first=first)
    answers = tuple(i for i in range(first, len(turns)) if found.messages[i]["role"] == "assistant")
    if answers[:1] != (first,) or answers[-1] != len(turns) - 1:
        raise ConfigError(
            f"{place}: does not begin with an assistant turn, or end with one.\n  Fix or remove the line."
        )
    if found.trained != answers:
        raise ConfigError(
            f"{place}: `weight: 0` or `train: false` in the answer of a pair.\n  Remove the key or the line."
        )
    return Conversation(found.messages, answers, tools)


def _rendered(answered: Conversation, tokenizer: Tokenizer, template: Template | None, place: str) -> tuple[str, str]:
    """Return the text of the prompt and of the answer."""
    text, spans = rendered(answered, tokenizer, template, place)
    return text[: spans[0].begin], text[spans[0].begin : spans[-1].end]


def _tokens(context: str, texts: Sequence[str], tokenizer: Tokenizer) -> Pair:
    """Return the tokens of rendered prompt and answers, each answer up to its last special token."""
    # Prompt and answers are tokenized separately: a merge across the border would give the answers different prompts,
    # and the difference of their log-probabilities would no longer be that of the answers alone.
    answers = []
    for text in texts:
        ids = np.array(tokenizer.encode(text), dtype=np.int64)
        special = np.flatnonzero(np.isin(ids, special_ids(tokenizer)))
        answers.append(ids[: special[-1] + 1] if len(special) else ids)
    prompt = tokenizer.encode(context)
    if tokenizer.add_bos == "always":  # otherwise the template decides, as in transformers
        prompt = [*tokenizer.lead(prompt), *prompt]
    return Pair(np.array(prompt, dtype=np.int64), *answers)


def rows_of(pairs: Sequence[Pair], sequence_length: int, pad_id: int) -> list[Row]:
    """Return two rows per pair, the chosen answer's first, with the tokens of the answers as targets."""
    rows = []
    for pair in pairs:
        for answer in (pair.chosen, pair.rejected):
            tokens = np.concatenate([pair.prompt, answer])
            sample = Sample(tokens, np.arange(len(tokens)) >= len(pair.prompt))
            rows.append(fill_row([sample], sequence_length, pad_id))
    return rows
