"""Conversations to tokens and the mask of those that an assistant said, by the tokenizer's own chat template.

What a line of JSONL may be:
    {"messages": [{"role": "system" | "user" | "assistant", "content": text}, ...]}
    {"prompt": text, "completion": text}, or both as lists of messages
    {"instruction": text, "input": text, "output": text}, input optional (Alpaca); also `system`

The rules of the mask, for every template: targets are the tokens of the assistant's text and of what ends the turn, up
to its last special token (a newline behind that is the template's, not the assistant's); where a turn ends without one,
up to its end. Headers of turns, system and user text are no targets. Where an answer begins and ends is found by
rendering the conversation up to there: templates whose shorter rendering is not the beginning of the longer are
refused. Tokens are those of the whole rendered text; one that straddles the begin of an answer is no target.
"""

import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jinja2
import numpy as np
from jinja2 import ext, nodes, sandbox
from jinja2.parser import Parser

from igla_mega.config.errors import ConfigError
from igla_mega.data.tokenizer import Tokenizer

Message = dict[str, str]
TooLong = Literal["error", "cut", "skip"]
ROLES = ("system", "user", "assistant")

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '### ' + message['role'] + '\\n' + message['content'] }}"
    "{{ eos_token + '\\n' if message['role'] == 'assistant' else '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant\\n' }}{% endif %}"
)
"""For tokenizers with no special tokens of turns: plain headers, and the end-of-document token behind an answer."""


class Sample(NamedTuple):
    """One conversation."""

    tokens: np.ndarray
    """int64 [n]"""
    targets: np.ndarray
    """bool [n]: whether the token is to be predicted from those before it."""


@dataclass(frozen=True)
class ChatTemplate:
    """A compiled chat template and the special tokens that it may name."""

    source: str
    compiled: jinja2.Template
    special_tokens: Mapping[str, str]

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The text of a conversation."""
        return self.compiled.render(
            messages=messages, add_generation_prompt=add_generation_prompt, tools=None, **self.special_tokens
        )


def load_template(tokenizer: str | Path, given: str | Path | None = None) -> ChatTemplate:
    """The chat template of a tokenizer's folder, or the one given.

    Args:
        given: a file with a template, or `plain` for `PLAIN_TEMPLATE`.

    Raises:
        ConfigError: there is none, or it is not a Jinja template.
    """
    folder = Path(tokenizer) if Path(tokenizer).is_dir() else Path(tokenizer).parent
    settings = _settings(folder / "tokenizer_config.json")
    place, source = (str(given), _given(given)) if given is not None else _found(folder, settings)
    try:
        compiled = _environment().from_string(source)
    except jinja2.TemplateError as error:
        raise ConfigError(f"{place}: not a chat template ({error}).\n  Give one that Jinja can read.") from None
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    tokens = {name: _text(settings.get(name)) for name in names if settings.get(name) is not None}
    return ChatTemplate(source, compiled, tokens)


def _given(given: str | Path) -> str:
    if str(given) == "plain":
        return PLAIN_TEMPLATE
    try:
        return Path(given).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"data.chat_template: {given} cannot be read ({error.strerror}).\n  Give a Jinja file, or `plain`."
        ) from None


def _found(folder: Path, settings: Mapping[str, Any]) -> tuple[str, str]:
    """Where a folder's template lies, and the template: a file of its own, else in the tokenizer's settings."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return str(file), file.read_text(encoding="utf-8")
    place, template = f"{folder / 'tokenizer_config.json'}: chat_template", settings.get("chat_template")
    if template is None and (folder / "chat_template.json").is_file():
        place = f"{folder / 'chat_template.json'}: chat_template"
        template = _settings(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if not isinstance(template, str):
        raise ConfigError(
            f"{folder}: the tokenizer has no chat template, so turns cannot be told apart.\n"
            "  Put one beside it as chat_template.jinja, name a file with data.chat_template, or set "
            "data.chat_template=plain."
        )
    return place, template


def _settings(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file}: not JSON ({error}).\n  Save the tokenizer again.") from None
    return content if isinstance(content, dict) else {}


def _text(token: Any) -> str:
    return str(token.get("content", "")) if isinstance(token, dict) else str(token)


def _environment() -> jinja2.Environment:
    """What transformers renders chat templates with, so that a template means here what it means there."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


class _Generation(ext.Extension):
    """`{% generation %}`, with which some templates mark the assistant's text: rendered as what it encloses."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's interface)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def read_conversations(file: str | Path) -> Iterator[tuple[str, list[Message] | tuple[str, str]]]:
    """Every line of a JSONL file as messages, or as a plain prompt and its completion, with its place (`file:line`).

    Raises:
        ConfigError: a line that is none of the known forms, or a conversation whose turns are not in order.
    """
    for place, entry in json_lines(file):
        yield place, conversation_of(entry, place)


def json_lines(file: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every line of a JSONL file that is not blank, with its place.

    Raises:
        ConfigError: the file cannot be read, or a line is no JSON object.
    """
    try:
        with open(file, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.isspace():
                    continue
                place = f"{file}:{number}"
                try:
                    entry = json.loads(line)
                except ValueError as error:
                    raise ConfigError(f"{place}: not JSON ({error}).\n  Mend or remove the line.") from None
                if not isinstance(entry, dict):
                    raise ConfigError(f"{place}: not a JSON object.\n  Mend or remove the line.")
                yield place, entry
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror}).\n  Give a JSONL file.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8 ({error.reason}).\n  Save it as UTF-8.") from None


def conversation_of(entry: Mapping[str, Any], place: str) -> list[Message] | tuple[str, str]:
    """The messages of one line, or its plain prompt and completion.

    Raises:
        ConfigError: the line is of no known form, or its turns are not in order.
    """
    if "messages" in entry:
        return checked(entry["messages"], place)
    if "prompt" in entry and "completion" in entry:
        prompt, completion = entry["prompt"], entry["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):
            return checked([*prompt, *completion], place)
        if isinstance(prompt, str) and isinstance(completion, str) and completion:
            return prompt, completion
        raise ConfigError(
            f"{place}: prompt and completion: neither two texts nor two lists of messages.\n  Mend or remove the line."
        )
    if "instruction" in entry and "output" in entry:
        user = "\n".join(str(part) for part in (entry["instruction"], entry.get("input")) if part)
        system = [{"role": "system", "content": entry["system"]}] if entry.get("system") else []
        turns = [{"role": "user", "content": user}, {"role": "assistant", "content": entry["output"]}]
        return checked([*system, *turns], place)
    known = "`messages`, `prompt` and `completion`, or `instruction` and `output`"
    keys = ", ".join(sorted(entry)) or "none"
    raise ConfigError(f"{place}: no conversation: its keys are {keys}.\n  Give {known}.")


def checked(messages: Any, place: str, *, answered: bool = True) -> list[Message]:
    """Messages in an order that a model can learn from: an optional system text, then user and assistant in turn.

    Args:
        answered: the last turn must be the assistant's.

    Raises:
        ConfigError: anything else, with the place and the number of the turn.
    """
    if not isinstance(messages, list) or not messages:
        raise ConfigError(f"{place}: messages: not a list of turns.\n  Mend or remove the line.")
    for number, message in enumerate(messages, 1):
        turn = f"{place}: turn {number}"
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ConfigError(f'{turn}: not a {{"role": ..., "content": text}}.\n  Mend or remove the line.')
        role = message.get("role")
        if role not in ROLES:
            raise ConfigError(f"{turn}: role {role!r} is not one of {', '.join(ROLES)}.\n  Mend or remove the line.")
        if role == "system" and number > 1:
            raise ConfigError(f"{turn}: a system text after the first turn.\n  Move it to the start.")
        if number > 1 and role == messages[number - 2]["role"]:
            raise ConfigError(f"{turn}: two turns in a row by the {role}.\n  Join them, or remove one.")
    if answered and not any(message["role"] == "assistant" for message in messages):
        raise ConfigError(f"{place}: no turn by the assistant, so there is nothing to learn.\n  Remove the line.")
    return messages


def tokenize(
    conversation: list[Message] | tuple[str, str],
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    place: str,
    *,
    max_length: int | None = None,
    too_long: TooLong = "error",
) -> Sample | None:
    """Tokens of a conversation, and which of them the assistant said.

    Args:
        template: None only where every conversation is a plain prompt and completion: these are put end to end, and the
            end-of-document token, a target, behind them.
        max_length: tokens that a sample may have.
        too_long: a longer one is an error, or cut at its end (what of its answers is beyond is not learned), or left
            out.

    Returns:
        None for one that is left out, also when no target is left of a cut one.

    Raises:
        ConfigError: too long; or the template takes back text that it has rendered, or refuses the conversation.
    """
    if isinstance(conversation, tuple):
        sample = _plain(*conversation, tokenizer)
    else:
        if template is None:
            raise ConfigError(f"{place}: turns, but no chat template.\n  Set data.chat_template.")
        sample = _rendered(conversation, tokenizer, template, place)
    if max_length is None or len(sample.tokens) <= max_length:
        return sample
    if too_long == "error":
        raise ConfigError(
            f"{place}: {len(sample.tokens)} tokens are more than the {max_length} of data.max_length.\n"
            "  Raise it, shorten the conversation, or set data.too_long to `cut` or `skip`."
        )
    cut = Sample(sample.tokens[:max_length], sample.targets[:max_length])
    return cut if too_long == "cut" and cut.targets[1:].any() else None


def _plain(prompt: str, completion: str, tokenizer: Tokenizer) -> Sample:
    end = [] if tokenizer.eod_id is None else [tokenizer.eod_id]
    context, answer = tokenizer.encode(prompt), [*tokenizer.encode(completion), *end]
    tokens = np.array([*context, *answer], dtype=np.int64)
    return Sample(tokens, np.arange(len(tokens)) >= len(context))


def _rendered(messages: list[Message], tokenizer: Tokenizer, template: ChatTemplate, place: str) -> Sample:
    try:
        text = template.render(messages)
        spans = list(_answer_spans(messages, template, text, place))
    except jinja2.TemplateError as error:
        raise ConfigError(f"{place}: the chat template refuses it: {error}.\n  Mend or remove the line.") from None
    encoding = tokenizer.engine.encode(text, add_special_tokens=False)
    tokens = np.array(encoding.ids, dtype=np.int64)
    begins, ends = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2).T
    special = np.isin(tokens, special_ids(tokenizer))
    targets = np.zeros(len(tokens), dtype=bool)
    for begin, body_end, end in spans:
        inside = (begins >= begin) & (ends <= end) & (ends > begins)
        # What ends the turn lies behind the answer's text: of that, up to the last special token.
        closing = np.flatnonzero(inside & special & (begins >= body_end))
        if len(closing):
            inside[closing[-1] + 1 :] = False
        targets |= inside
    if not targets[1:].any():
        raise ConfigError(
            f"{place}: the assistant's turns are empty, so there is nothing to learn.\n  Remove the line."
        )
    return Sample(tokens, targets)


def special_ids(tokenizer: Tokenizer) -> np.ndarray:
    """Ids of the tokens that text cannot spell by its characters, int64."""
    added = tokenizer.engine.get_added_tokens_decoder()
    return np.array([number for number, token in added.items() if token.special], dtype=np.int64)


def _answer_spans(
    messages: Sequence[Message], template: ChatTemplate, text: str, place: str
) -> Iterator[tuple[int, int, int]]:
    """For each of the assistant's turns: where its answer begins, where its text ends, where the turn ends."""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = template.render(messages[:index], add_generation_prompt=True)
        after = template.render(messages[: index + 1])
        if not after.startswith(before) or not text.startswith(after):
            raise ConfigError(
                f"{place}: turn {index + 1}: the chat template writes earlier turns otherwise once more follow, so "
                "that an answer cannot be placed.\n  Use a template that only appends, or conversations of one answer."
            )
        content = message["content"].strip()
        found = text.find(content, len(before), len(after)) if content else len(before)
        body_end = found + len(content) if found >= 0 else len(before)
        yield len(before), body_end, len(after)
