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
import functools
import inspect
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jinja2
import numpy as np
from jinja2 import ext, nodes, sandbox
from jinja2.parser import Parser

from igla_mega.config import json_text
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


_SURROGATE = re.compile("[\ud800-\udfff]")


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
    environment: "_Sandbox"

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The text of a conversation.

        Raises:
            jinja2.TemplateError: the template refuses it, fails on it, or takes more than a template needs.
        """
        try:
            self.environment.turns = 0
            return self.compiled.render(
                messages=messages, add_generation_prompt=add_generation_prompt, tools=None, **self.special_tokens
            )
        except jinja2.TemplateError:
            raise
        except Exception as error:  # a template is a program, which fails in any way
            raise jinja2.TemplateRuntimeError(f"{type(error).__name__}: {error}") from None


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
        environment = _environment()
        compiled = environment.from_string(source)
    except (jinja2.TemplateError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(f"{place}: not a chat template ({error}).\n  Give one that Jinja can read.") from None
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    tokens = {name: _text(settings.get(name)) for name in names if settings.get(name) is not None}
    return ChatTemplate(source, compiled, tokens, environment)


def _given(given: str | Path) -> str:
    if str(given) == "plain":
        return PLAIN_TEMPLATE
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"data.chat_template: {given} cannot be read ({error}).\n  Give a Jinja file, or `plain`."
        ) from None


def _found(folder: Path, settings: Mapping[str, Any]) -> tuple[str, str]:
    """Where a folder's template lies, and the template: a file of its own, else in the tokenizer's settings."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return str(file), _given(file)
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
        content = json_text.loads(file.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{file}: not JSON ({error}).\n  Save the tokenizer again.") from None
    return content if isinstance(content, dict) else {}


def _text(token: Any) -> str:
    return str(token.get("content", "")) if isinstance(token, dict) else str(token)


def _environment() -> "_Sandbox":
    """What transformers renders chat templates with, so that a template means here what it means there."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


_MOST_TURNS, _MOST_SIZE = 1_000_000, 1 << 24
"""Of one rendering: passes of loops and calls; of one value: characters, elements, bits. No template comes near."""


class _Sandbox(sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox keeps a template from files and code; this one also from taking all time and memory.

    Loops, calls and values are bounded as they are met. It is no wall: a list of lists of itself can still be large.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    turns = 0

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.filters = {name: self._guarded(filter_) for name, filter_ in self.filters.items()}
        self.filters |= {"_looped": self._looped, "_small": self._small}

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        self._before(getattr(inspect.unwrap(obj), "__self__", None), *args, *kwargs.values())
        return self._small(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [_size(value) for value in (left, right)]
        if operator == "**" or (operator == "*" and not isinstance(left, int | float)):
            sizes[0] = max(sizes[0], 1) * (right if isinstance(right, int) else sizes[1])
        elif operator == "*" and isinstance(left, int):
            sizes[0] = left * sizes[1] if hasattr(right, "__len__") else sum(sizes)
        elif operator == "%" and isinstance(left, str):
            self._before(left, *(right if isinstance(right, tuple) else (right,)))
        if max(sizes) > _MOST_SIZE:
            raise jinja2.exceptions.SecurityError(f"a value of more than {_MOST_SIZE:,} characters, elements or bits")
        return self._small(super().call_binop(context, operator, left, right))

    def _guarded(self, filter_: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(filter_)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            self._before(*args, *kwargs.values())
            return self._small(filter_(*args, **kwargs))

        return guarded

    def _before(self, *values: Any) -> None:
        """Count a call, and refuse widths and counts that only make a value large, also in a format."""
        self._spend(1)
        for value in values:
            told = [value] if isinstance(value, int) else []
            if isinstance(value, str) and ("%" in value or "{" in value):
                told = [int(number) for number in re.findall(r"\d{6,18}", value)]
            if any(abs(number) > _MOST_SIZE for number in told):
                raise jinja2.exceptions.SecurityError(f"a width or count of more than {_MOST_SIZE:,}")

    def _looped(self, value: Any) -> Any:
        """What a loop goes through."""
        items = value if hasattr(value, "__len__") else list(itertools.islice(value, _MOST_TURNS + 1))
        self._spend(1 + len(items))
        return items

    def _small(self, value: Any) -> Any:
        if _size(value) > _MOST_SIZE:
            raise jinja2.exceptions.SecurityError(f"a value of more than {_MOST_SIZE:,} characters, elements or bits")
        return value

    def _spend(self, turns: int) -> None:
        self.turns += turns
        if self.turns > _MOST_TURNS:
            raise jinja2.exceptions.SecurityError(f"more than {_MOST_TURNS:,} turns of loops and calls")

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = nodes.Filter(loop.iter, "_looped", [], [], None, None, lineno=loop.lineno)
        for block in list(tree.find_all(nodes.AssignBlock)):
            block.filter = nodes.Filter(block.filter, "_small", [], [], None, None, lineno=block.lineno)
        for joined in list(tree.find_all(nodes.Concat)):
            parts = nodes.Concat(joined.nodes, lineno=joined.lineno)
            joined.nodes = [nodes.Filter(parts, "_small", [], [], None, None, lineno=joined.lineno)]
        return tree


def _size(value: Any) -> int:
    if isinstance(value, int):
        return value.bit_length()
    return len(value) if hasattr(value, "__len__") else 0


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
                    entry = json_text.loads(line)
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
            refuse_surrogates(prompt + completion, place)
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
        refuse_surrogates(message["content"], turn)
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


def refuse_surrogates(text: str, place: str) -> None:
    """JSON can spell half of a character, which no tokenizer takes."""
    if not text.isascii() and _SURROGATE.search(text):
        raise ConfigError(f"{place}: half of a surrogate pair: not Unicode.\n  Mend or remove the line.")


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
    specials = special_ids(tokenizer)
    encoding = tokenizer.engine.encode(text, add_special_tokens=False)
    tokens = np.array(encoding.ids, dtype=np.int64)
    begins, ends = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2).T
    special = np.isin(tokens, specials)
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
    if not hasattr(tokenizer.engine, "get_added_tokens_decoder"):
        raise ConfigError(
            f"data.tokenizer: {tokenizer.path} does not tell which characters its tokens are of, so turns cannot be"
            " told apart.\n  Save it as a tokenizer.json."
        )
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
