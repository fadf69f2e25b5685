"""Tokenize conversations with the tokenizer's chat template, and mark the assistant's tokens as targets.

`forms` reads the lines of a data set, `turns` renders them.

The target mask follows the same rules for every template. Targets are the tokens of the assistant's text and of the end
of the turn, up to its last special token (a newline after that belongs to the template); in a turn without a special
token, up to its end. Turn headers, system text and user text are not targets. The tokens are those of the whole
rendered text; a token that straddles the beginning of an answer is not a target.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np

from igla_mega.config import json_text
from igla_mega.config.errors import ConfigError
from igla_mega.config.files import read_text
from igla_mega.data.tokenizer import Tokenizer
from igla_mega.data.tuning.forms import Conversation, Message
from igla_mega.data.tuning.turns import Span, rendered, special_ids
from igla_mega.untrusted import trial
from igla_mega.untrusted.child import no_panic
from igla_mega.untrusted.sandbox import MAX_SOURCE_BYTES, Sandbox

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
    environment: Sandbox

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False, tools: list[Any] | None = None
    ) -> str:
        """Return the text of a conversation.

        Raises:
            jinja2.TemplateError: the template rejects it, fails on it, or exceeds the sandbox's limits.
        """
        try:
            self.environment.begin(messages, tools)
            return self.compiled.render(
                messages=messages, add_generation_prompt=add_generation_prompt, tools=tools, **self.special_tokens
            )
        except jinja2.TemplateError:
            raise
        except Exception as error:  # a template is a program and can raise anything
            raise jinja2.TemplateRuntimeError(f"{type(error).__name__}: {error}") from None


def load_template(
    tokenizer: str | Path, given: str | Path | None = None, *, loaded: Tokenizer | None = None
) -> ChatTemplate:
    """Return the given chat template, or the one of a tokenizer's folder.

    Args:
        given: a file with a template, or `plain` for `PLAIN_TEMPLATE`.
        loaded: the tokenizer, to encode what the template renders in its trial.

    Raises:
        ConfigError: there is no template, it is not a Jinja template, or its trial took too much time or memory.
    """
    folder = Path(tokenizer) if Path(tokenizer).is_dir() else Path(tokenizer).parent
    settings = _settings(folder / "special_tokens_map.json") | _settings(folder / "tokenizer_config.json")
    place, source = (str(given), _given(given)) if given is not None else _found(folder, settings)
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    tokens = {name: _text(settings.get(name)) for name in names if settings.get(name) is not None}
    if source != PLAIN_TEMPLATE:
        trial.of_rendering(place, source, lambda: _try(_compiled(place, source, tokens), loaded))
    return _compiled(place, source, tokens)


def _compiled(place: str, source: str, special_tokens: Mapping[str, str]) -> ChatTemplate:
    """Return a compiled template; raise ConfigError if it is not one."""
    try:
        environment = Sandbox()
        return ChatTemplate(source, environment.from_string(source), special_tokens, environment)
    except (jinja2.TemplateError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(f"{place}: not a chat template ({error}).\n  Give a valid Jinja template.") from None


def _try(template: ChatTemplate, tokenizer: Tokenizer | None) -> None:
    """Render short conversations and tokenize what comes out; a template may reject them."""
    turns = [{"role": role, "content": f"{role}: 1 + 1?\n"} for role in ("system", "user", "assistant")]
    for messages in (turns[1:], turns, [*turns, *turns[1:] * 4]):
        with contextlib.suppress(jinja2.TemplateError):
            text = template.render(messages)
            if tokenizer is not None:
                tokenizer.encode(text[: 1 << 16])


def _given(given: str | Path) -> str:
    """Return the source of the template that `data.chat_template` names."""
    if str(given) == "plain":
        return PLAIN_TEMPLATE
    try:
        return read_text(given, most=MAX_SOURCE_BYTES)
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
        content = json_text.read(file)
    except ValueError as error:
        raise ConfigError(f"{file}: not JSON ({error}).\n  Save the tokenizer again.") from None
    return content if isinstance(content, dict) else {}


def _text(token: Any) -> str:
    """Return the text of a special token, given as a string or as Hugging Face's AddedToken object."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token)


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
    context = [*tokenizer.lead([*context, *answer]), *context]
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
    with no_panic(tokenizer.path):
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
    if tokenizer.add_bos == "always":  # otherwise the template decides, as in transformers
        lead = tokenizer.lead(tokens)
        tokens, targets = np.array([*lead, *tokens], dtype=np.int64), np.array([*(False for _ in lead), *targets])
    return Sample(tokens, targets)
