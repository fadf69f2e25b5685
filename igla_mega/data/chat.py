"""Tokenize conversations with the tokenizer's chat template, and mark the assistant's tokens as targets.

`forms` reads the lines of a data set, `turns` renders them.

The target mask follows the same rules for every template. Targets are the tokens of the assistant's text and of the end
of the turn, up to its last special token (a newline after that belongs to the template); in a turn without a special
token, up to its end. Turn headers, system text and user text are not targets. The tokens are those of the whole
rendered text; a token that straddles the beginning of an answer is not a target.
"""

import datetime
import functools
import inspect
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from jinja2 import ext, nodes, sandbox
from jinja2.parser import Parser

from igla_mega.config import json_text
from igla_mega.config.errors import ConfigError
from igla_mega.data.forms import Conversation, Message
from igla_mega.data.tokenizer import Tokenizer
from igla_mega.data.turns import Span, rendered, special_ids

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '### ' + message['role'] + '\\n' + message['content'] }}"
    "{{ eos_token + '\\n' if message['role'] == 'assistant' else '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant\\n' }}{% endif %}"
)
"""Template for tokenizers without special turn tokens: plain headers, and end-of-document tokens after answers."""


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

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False, tools: list[Any] | None = None
    ) -> str:
        """Return the text of a conversation.

        Raises:
            jinja2.TemplateError: the template rejects it, fails on it, or exceeds the sandbox's limits.
        """
        try:
            self.environment.turns = 0
            return self.compiled.render(
                messages=messages, add_generation_prompt=add_generation_prompt, tools=tools, **self.special_tokens
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


def tokenize(
    conversation: Conversation | list[Message] | tuple[str, str],
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    place: str,
) -> Sample:
    """Return the tokens of a conversation and the mask of those written by the assistant.

    Args:
        conversation: a plain prompt and completion are concatenated and followed by the end-of-document token, which is
            a target. In a list of messages all of the assistant's turns are targets.
        template: may be None only if every conversation is a plain prompt and completion.

    Raises:
        ConfigError: the template rejects the conversation, drops a part of it or changes earlier turns.
    """
    if isinstance(conversation, list):
        answers = tuple(i for i, message in enumerate(conversation) if message["role"] == "assistant")
        conversation = Conversation(conversation, answers)
    if isinstance(conversation, tuple):
        sample = _plain(*conversation, tokenizer)
    else:
        sample = _marked(*rendered(conversation, tokenizer, template, place), tokenizer)
    if not sample.targets[1:].any():
        raise ConfigError(f"{place}: the assistant's turns are empty, so there are no targets.\n  Remove the line.")
    return sample


def _plain(prompt: str, completion: str, tokenizer: Tokenizer) -> Sample:
    """Return prompt, completion and end-of-document token, the last two as targets."""
    context, answer = tokenizer.encode(prompt), ended(completion, tokenizer)
    tokens = np.array([*context, *answer], dtype=np.int64)
    return Sample(tokens, np.arange(len(tokens)) >= len(context))


def ended(answer: str, tokenizer: Tokenizer) -> list[int]:
    """Return the tokens of a plain answer with one end-of-document token, also if the text ends in it already."""
    ids = tokenizer.encode(answer)
    if tokenizer.eod_id is None:
        return ids
    typed = tokenizer.encode(answer.rstrip()) if tokenizer.eod_id in ids else []
    return typed if typed[-1:] == [tokenizer.eod_id] else [*ids, tokenizer.eod_id]


def _marked(text: str, spans: Sequence[Span], tokenizer: Tokenizer) -> Sample:
    """Return the tokens of a rendered text, with the given turns as targets."""
    specials = special_ids(tokenizer)
    encoding = tokenizer.engine.encode(text, add_special_tokens=False)
    tokens = np.array(encoding.ids, dtype=np.int64)
    begins, ends = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2).T
    special = np.isin(tokens, specials)
    targets = np.zeros(len(tokens), dtype=bool)
    for begin, body_end, end, _ in spans:
        inside = (begins >= begin) & (ends <= end) & (ends > begins)
        # The end of the turn follows the answer's text: it is a target up to its last special token. Text after that,
        # such as a newline, is written by the template and never has to be generated.
        closing = np.flatnonzero(inside & special & (begins >= body_end))
        if len(closing):
            inside[closing[-1] + 1 :] = False
        targets |= inside
    return Sample(tokens, targets)
