"""Tokenize conversations with the tokenizer's chat template, and mark the assistant's tokens as targets.

Accepted forms of a JSONL line:
    {"messages": [{"role": "system" | "user" | "assistant", "content": text}, ...]}
    {"prompt": text, "completion": text}, or both as lists of messages
    {"instruction": text, "input": text, "output": text}, input optional (Alpaca); also `system`

The target mask follows the same rules for every template. Targets are the tokens of the assistant's text and of the end
of the turn, up to its last special token (a newline after that belongs to the template); in a turn without a special
token, up to its end. Turn headers, system text and user text are not targets. The borders of an answer are found by
rendering the conversation up to them, so a template whose shorter rendering is not a prefix of the longer one is
rejected. The tokens are those of the whole rendered text; a token that straddles the beginning of an answer is not a
target.
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
"""Template for tokenizers without special turn tokens: plain headers, and end-of-document tokens after answers."""

_SURROGATE = re.compile("[\ud800-\udfff]")


class Sample(NamedTuple):
    """One tokenized conversation."""

    tokens: np.ndarray
    """Token ids, int64 [n]."""
    targets: np.ndarray
    """True if the token is to be predicted from those before it, bool [n]."""


@dataclass(frozen=True)
class ChatTemplate:
    """Compiled chat template and the special tokens that it may refer to."""

    source: str
    compiled: jinja2.Template
    special_tokens: Mapping[str, str]
    environment: "_Sandbox"

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """Return the text of a conversation.

        Raises:
            jinja2.TemplateError: the template rejects it, fails on it, or exceeds the sandbox's limits.
        """
        try:
            self.environment.turns = 0
            return self.compiled.render(
                messages=messages, add_generation_prompt=add_generation_prompt, tools=None, **self.special_tokens
            )
        except jinja2.TemplateError:
            raise
        except Exception as error:  # a template is a program and can raise anything
            raise jinja2.TemplateRuntimeError(f"{type(error).__name__}: {error}") from None


def load_template(tokenizer: str | Path, given: str | Path | None = None) -> ChatTemplate:
    """Return the given chat template, or the one of a tokenizer's folder.

    Args:
        given: a file with a template, or `plain` for `PLAIN_TEMPLATE`.

    Raises:
        ConfigError: there is no template, or it is not a Jinja template.
    """
    folder = Path(tokenizer) if Path(tokenizer).is_dir() else Path(tokenizer).parent
    settings = _settings(folder / "tokenizer_config.json")
    place, source = (str(given), _given(given)) if given is not None else _found(folder, settings)
    try:
        environment = _environment()
        compiled = environment.from_string(source)
    except (jinja2.TemplateError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(f"{place}: not a chat template ({error}).\n  Give a valid Jinja template.") from None
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    tokens = {name: _text(settings.get(name)) for name in names if settings.get(name) is not None}
    return ChatTemplate(source, compiled, tokens, environment)


def _given(given: str | Path) -> str:
    """Return the source of the template that `data.chat_template` names."""
    if str(given) == "plain":
        return PLAIN_TEMPLATE
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"data.chat_template: {given} cannot be read ({error}).\n  Give a Jinja file, or `plain`."
        ) from None


def _found(folder: Path, settings: Mapping[str, Any]) -> tuple[str, str]:
    """Return a folder's template and its location: a separate file, or a key of the tokenizer's settings."""
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
            f"{folder}: the tokenizer has no chat template, so turns cannot be rendered.\n"
            "  Add chat_template.jinja to the folder, name a file with data.chat_template, or set "
            "data.chat_template=plain."
        )
    return place, template


def _settings(file: Path) -> dict[str, Any]:
    """Return the JSON object of a settings file, empty if there is none."""
    if not file.is_file():
        return {}
    try:
        content = json_text.loads(file.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{file}: not JSON ({error}).\n  Save the tokenizer again.") from None
    return content if isinstance(content, dict) else {}


def _text(token: Any) -> str:
    """Return the text of a special token, given as a string or as Hugging Face's AddedToken object."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token)


def _environment() -> "_Sandbox":
    """Return a Jinja environment with the same options, filters and globals as transformers' chat templates."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


_MAX_TURNS, _MAX_SIZE = 1_000_000, 1 << 24
"""Limits on the loop passes and calls of one rendering, and on the characters, elements or bits of one value.

Real templates stay far below both.
"""


class _Sandbox(sandbox.ImmutableSandboxedEnvironment):
    """Jinja sandbox that also bounds the time and memory of a template, in addition to denying access to files.

    A template comes with a downloaded tokenizer and is untrusted. Loops, calls and values are bounded where they occur.
    The bound is not strict: nested lists can still be large.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    turns = 0

    def __init__(self, **options: Any):
        """Wrap all filters with the limits."""
        super().__init__(**options)
        self.filters = {name: self._guarded(filter_) for name, filter_ in self.filters.items()}
        self.filters |= {"_looped": self._looped, "_small": self._small}

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call an object of a template within the limits."""
        self._before(getattr(inspect.unwrap(obj), "__self__", None), *args, *kwargs.values())
        return self._small(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Apply an operator within the limits."""
        # Estimated before the operation: checking its result would come after the memory was allocated.
        sizes = [_size(value) for value in (left, right)]
        if operator == "**" or (operator == "*" and not isinstance(left, int | float)):
            sizes[0] = max(sizes[0], 1) * (right if isinstance(right, int) else sizes[1])
        elif operator == "*" and isinstance(left, int):
            sizes[0] = left * sizes[1] if hasattr(right, "__len__") else sum(sizes)
        elif operator == "%" and isinstance(left, str):
            self._before(left, *(right if isinstance(right, tuple) else (right,)))
        if max(sizes) > _MAX_SIZE:
            raise jinja2.exceptions.SecurityError(f"a value of more than {_MAX_SIZE:,} characters, elements or bits")
        return self._small(super().call_binop(context, operator, left, right))

    def _guarded(self, filter_: Callable[..., Any]) -> Callable[..., Any]:
        """Return a filter with the limits applied to its arguments and result."""

        @functools.wraps(filter_)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            self._before(*args, *kwargs.values())
            return self._small(filter_(*args, **kwargs))

        return guarded

    def _before(self, *values: Any) -> None:
        """Count a call, and reject huge widths and counts, given as arguments or within a format string."""
        self._spend(1)
        for value in values:
            numbers = [value] if isinstance(value, int) else []
            if isinstance(value, str) and ("%" in value or "{" in value):
                numbers = [int(number) for number in re.findall(r"\d{6,18}", value)]
            if any(abs(number) > _MAX_SIZE for number in numbers):
                raise jinja2.exceptions.SecurityError(f"a width or count of more than {_MAX_SIZE:,}")

    def _looped(self, value: Any) -> Any:
        """Return the items that a loop iterates over, after counting them."""
        items = value if hasattr(value, "__len__") else list(itertools.islice(value, _MAX_TURNS + 1))
        self._spend(1 + len(items))
        return items

    def _small(self, value: Any) -> Any:
        """Return a value unchanged; raise SecurityError if it is too large."""
        if _size(value) > _MAX_SIZE:
            raise jinja2.exceptions.SecurityError(f"a value of more than {_MAX_SIZE:,} characters, elements or bits")
        return value

    def _spend(self, turns: int) -> None:
        """Count loop passes and calls; raise SecurityError beyond the limit."""
        self.turns += turns
        if self.turns > _MAX_TURNS:
            raise jinja2.exceptions.SecurityError(f"more than {_MAX_TURNS:,} loop passes and calls")

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Parse a template and insert the limits into its syntax tree."""
        # Loops, `{% set %}` blocks and `~` are compiled to plain Python, out of reach of `call` and `call_binop`.
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
    """Return the size of a value: bits of an integer, characters of a text, elements of a container."""
    if isinstance(value, int):
        return value.bit_length()
    return len(value) if hasattr(value, "__len__") else 0


class _Generation(ext.Extension):
    """The `{% generation %}` tag, which marks the assistant's text in some templates; rendered as its content."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's interface)

    def parse(self, parser: Parser) -> nodes.Node:
        """Parse the tag and its content."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def read_conversations(file: str | Path) -> Iterator[tuple[str, list[Message] | tuple[str, str]]]:
    """Yield (`file:line`, messages or a plain prompt and completion) for every line of a JSONL file.

    Raises:
        ConfigError: a line has no accepted form, or the turns of a conversation are not in order.
    """
    for place, entry in json_lines(file):
        yield place, conversation_of(entry, place)


def json_lines(file: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (`file:line`, object) for every line of a JSONL file that is not blank.

    Raises:
        ConfigError: the file cannot be read, or a line is not a JSON object.
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
                    raise ConfigError(f"{place}: not JSON ({error}).\n  Fix or remove the line.") from None
                if not isinstance(entry, dict):
                    raise ConfigError(f"{place}: not a JSON object.\n  Fix or remove the line.")
                yield place, entry
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror}).\n  Give a JSONL file.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8 ({error.reason}).\n  Save it as UTF-8.") from None


def conversation_of(entry: Mapping[str, Any], place: str) -> list[Message] | tuple[str, str]:
    """Return the messages of one line, or its plain prompt and completion.

    Raises:
        ConfigError: the line has no accepted form, or its turns are not in order.
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
            f"{place}: prompt and completion are not both texts or both lists of messages.\n  Fix or remove the line."
        )
    if "instruction" in entry and "output" in entry:
        user = "\n".join(str(part) for part in (entry["instruction"], entry.get("input")) if part)
        system = [{"role": "system", "content": entry["system"]}] if entry.get("system") else []
        turns = [{"role": "user", "content": user}, {"role": "assistant", "content": entry["output"]}]
        return checked([*system, *turns], place)
    known = "`messages`, `prompt` and `completion`, or `instruction` and `output`"
    keys = ", ".join(sorted(entry)) or "none"
    raise ConfigError(f"{place}: not a conversation: its keys are {keys}.\n  Use {known}.")


def checked(messages: Any, place: str, *, answered: bool = True) -> list[Message]:
    """Return messages after checking their order: an optional system text, then user and assistant alternately.

    Args:
        place: `file:line` for the errors.
        answered: True to require at least one turn by the assistant.

    Raises:
        ConfigError: the messages are malformed or out of order.
    """
    if not isinstance(messages, list) or not messages:
        raise ConfigError(f"{place}: messages: not a list of turns.\n  Fix or remove the line.")
    for number, message in enumerate(messages, 1):
        turn = f"{place}: turn {number}"
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ConfigError(f'{turn}: not a {{"role": ..., "content": text}}.\n  Fix or remove the line.')
        refuse_surrogates(message["content"], turn)
        role = message.get("role")
        if role not in ROLES:
            raise ConfigError(f"{turn}: role {role!r} is not one of {', '.join(ROLES)}.\n  Fix or remove the line.")
        if role == "system" and number > 1:
            raise ConfigError(f"{turn}: system text after the first turn.\n  Move it to the start.")
        if number > 1 and role == messages[number - 2]["role"]:
            raise ConfigError(f"{turn}: two turns in a row by the {role}.\n  Join them, or remove one.")
    if answered and not any(message["role"] == "assistant" for message in messages):
        raise ConfigError(f"{place}: no turn by the assistant, so there are no targets.\n  Remove the line.")
    return messages


def refuse_surrogates(text: str, place: str) -> None:
    """Raise ConfigError on an unpaired surrogate, which JSON escapes can express and no tokenizer accepts."""
    if not text.isascii() and _SURROGATE.search(text):
        raise ConfigError(f"{place}: contains half of a surrogate pair (invalid Unicode).\n  Fix or remove the line.")


def tokenize(
    conversation: list[Message] | tuple[str, str],
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    place: str,
    *,
    max_length: int | None = None,
    too_long: TooLong = "error",
) -> Sample | None:
    """Return the tokens of a conversation and the mask of those written by the assistant.

    Args:
        template: may be None only if every conversation is a plain prompt and completion. These are concatenated and
            followed by the end-of-document token, which is a target.
        max_length: maximum number of tokens of a sample.
        too_long: a longer sample is an error (`error`), cut at its end (`cut`), or dropped (`skip`).

    Returns:
        The sample, or None if it is dropped or has no target left after the cut.

    Raises:
        ConfigError: the sample is too long, or the template rejects the conversation or changes earlier turns.
    """
    if isinstance(conversation, tuple):
        sample = _plain(*conversation, tokenizer)
    else:
        if template is None:
            raise ConfigError(f"{place}: contains messages, but there is no chat template.\n  Set data.chat_template.")
        sample = _rendered(conversation, tokenizer, template, place)
    if max_length is None or len(sample.tokens) <= max_length:
        return sample
    if too_long == "error":
        raise ConfigError(
            f"{place}: {len(sample.tokens)} tokens exceed data.max_length {max_length}.\n"
            "  Raise it, shorten the conversation, or set data.too_long to `cut` or `skip`."
        )
    cut = Sample(sample.tokens[:max_length], sample.targets[:max_length])
    return cut if too_long == "cut" and cut.targets[1:].any() else None


def _plain(prompt: str, completion: str, tokenizer: Tokenizer) -> Sample:
    """Return prompt, completion and end-of-document token, the last two as targets."""
    context, answer = tokenizer.encode(prompt), tokenizer.encode(completion)
    context = [*tokenizer.lead([*context, *answer]), *context]
    tokens = np.array([*context, *answer, *tokenizer.tail(answer)], dtype=np.int64)
    return Sample(tokens, np.arange(len(tokens)) >= len(context))


def _rendered(messages: list[Message], tokenizer: Tokenizer, template: ChatTemplate, place: str) -> Sample:
    """Return the tokens of rendered messages, with the assistant's turns as targets."""
    try:
        text = template.render(messages)
        spans = list(_answer_spans(messages, template, text, place))
    except jinja2.TemplateError as error:
        raise ConfigError(f"{place}: the chat template fails: {error}.\n  Fix or remove the line.") from None
    specials = special_ids(tokenizer)
    encoding = tokenizer.engine.encode(text, add_special_tokens=False)
    tokens = np.array(encoding.ids, dtype=np.int64)
    begins, ends = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2).T
    special = np.isin(tokens, specials)
    targets = np.zeros(len(tokens), dtype=bool)
    for begin, body_end, end in spans:
        inside = (begins >= begin) & (ends <= end) & (ends > begins)
        # The end of the turn follows the answer's text: it is a target up to its last special token. Text after that,
        # such as a newline, is written by the template and never has to be generated.
        closing = np.flatnonzero(inside & special & (begins >= body_end))
        if len(closing):
            inside[closing[-1] + 1 :] = False
        targets |= inside
    if tokenizer.add_bos == "always":  # otherwise the template decides, as in transformers
        lead = tokenizer.lead(tokens)
        tokens, targets = np.array([*lead, *tokens], dtype=np.int64), np.array([*(False for _ in lead), *targets])
    if not targets[1:].any():
        raise ConfigError(f"{place}: the assistant's turns are empty, so there are no targets.\n  Remove the line.")
    return Sample(tokens, targets)


def special_ids(tokenizer: Tokenizer) -> np.ndarray:
    """Return the ids of the special tokens, which ordinary text does not produce, int64.

    Raises:
        ConfigError: the tokenizer's library reports no character offsets.
    """
    if not hasattr(tokenizer.engine, "get_added_tokens_decoder"):
        raise ConfigError(
            f"data.tokenizer: {tokenizer.path} does not report the character offsets of its tokens, so turns cannot be"
            " located.\n  Save it as a tokenizer.json."
        )
    added = tokenizer.engine.get_added_tokens_decoder()
    return np.array([number for number, token in added.items() if token.special], dtype=np.int64)


def _answer_spans(
    messages: Sequence[Message], template: ChatTemplate, text: str, place: str
) -> Iterator[tuple[int, int, int]]:
    """Yield the character offsets of each assistant turn: start of the answer, end of its text, end of the turn."""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = template.render(messages[:index], add_generation_prompt=True)
        after = template.render(messages[: index + 1])
        if not after.startswith(before) or not text.startswith(after):
            raise ConfigError(
                f"{place}: turn {index + 1}: the chat template renders earlier turns differently when more follow, so "
                "the answer cannot be located.\n  Use a template that only appends, or conversations with one answer."
            )
        # Stripped, since many templates trim the content. If a template rewrites it, it is not found, and the whole
        # turn is searched for the special token that closes it.
        content = message["content"].strip()
        found = text.find(content, len(before), len(after)) if content else len(before)
        body_end = found + len(content) if found >= 0 else len(before)
        yield len(before), body_end, len(after)
