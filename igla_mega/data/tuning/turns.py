"""Render conversations, find the assistant's turns in the text, and refuse what the chat template drops.

The borders of an answer are found by rendering the conversation up to them, so a template whose shorter rendering is
not a prefix of the longer one is rejected. If a template ends every conversation with the header of an answer, turns
end before that header. A part of a line that the template does not render is refused by name.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import jinja2
import numpy as np

from igla_mega.config.errors import ConfigError
from igla_mega.data.tokenizer import Tokenizer
from igla_mega.data.tuning.forms import Conversation, Message, lost_part, lost_tool, refuse_surrogates, text_end


class Template(Protocol):
    """Chat template, as `chat.load_template` returns it."""

    @property
    def special_tokens(self) -> Mapping[str, str]: ...

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False, tools: list[Any] | None = None
    ) -> str: ...


class Span(NamedTuple):
    """Character offsets of an assistant's turn in a rendered text."""

    begin: int
    """Start of the answer, after the header of the turn."""
    body_end: int
    """End of the answer's text."""
    end: int
    """End of the turn."""
    opening: int
    """Start of the text in which the answer is searched: `begin`, or that of a header which the answer continues."""


def rendered(
    conversation: Conversation, tokenizer: Tokenizer, template: Template | None, place: str
) -> tuple[str, list[Span]]:
    """Return the text of a conversation and the places of the turns that are targets.

    Raises:
        ConfigError: there is no template, or it rejects the conversation, drops a part of it or changes earlier turns.
    """
    if template is None:
        raise ConfigError(f"{place}: contains messages, but there is no chat template.\n  Set data.chat_template.")
    conversation = _filled(conversation, template)
    try:
        text = template.render(conversation.messages, tools=conversation.tools)
        spans = list(_answer_spans(conversation, template, text, place))
    except jinja2.TemplateError as error:
        raise ConfigError(f"{place}: the chat template fails: {error}.\n  Fix or remove the line.") from None
    refuse_surrogates(text, place)
    single = _without_typed_ends(conversation, spans, text, tokenizer)
    if single is not conversation:
        return rendered(single, tokenizer, template, place)
    _refuse_lost(conversation, spans, text, place)
    return text, spans


def _filled(conversation: Conversation, template: Template) -> Conversation:
    """Return the conversation with empty texts for contents that are null, if its template requires them.

    Of calls of tools without a text, some templates require that the content is null. Others fail, or write `None`.
    """
    if all(message["content"] is not None for message in conversation.messages):
        return conversation
    messages = [{**message, "content": message["content"] or ""} for message in conversation.messages]
    texts = []
    for given in (messages, conversation.messages):
        try:
            texts.append(template.render(given, tools=conversation.tools))
        except jinja2.TemplateError:
            texts.append("None")
    filled, null = (text.count("None") for text in texts)
    return replace(conversation, messages=messages) if filled < null else conversation


def _without_typed_ends(
    conversation: Conversation, spans: Sequence[Span], text: str, tokenizer: Tokenizer
) -> Conversation:
    """Return the conversation without the end tokens that its answers contain and the template writes, too."""
    messages = list(conversation.messages)
    for index, span in zip(conversation.trained, spans, strict=True):
        content = (messages[index]["content"] or "").rstrip()
        following = text[span.body_end : span.end].lstrip()
        for token in special_texts(tokenizer):
            if content.endswith(token) and following.startswith(token):
                messages[index] = {**messages[index], "content": content.removesuffix(token)}
                return replace(conversation, messages=messages)
    return conversation


def _refuse_lost(conversation: Conversation, spans: Sequence[Span], text: str, place: str) -> None:
    """Raise ConfigError naming a part of a conversation that is not in its rendered text."""
    if lost_tool(conversation.tools, text):
        raise ConfigError(
            f"{place}: the chat template does not render `tools`, or only parts of it.\n"
            "  Use a template that renders it, or remove the key."
        )
    at = dict(zip(conversation.trained, spans, strict=True))
    begin = 0
    for index, message in enumerate(conversation.messages):
        if index in at:
            searched, begin = text[at[index].opening : at[index].end], at[index].end
        elif message["role"] == "system":  # which some templates write into a later turn
            searched = text
        else:  # in its place: a tool's answer that is dropped may be repeated by the assistant
            stop = next((at[later].begin for later in conversation.trained if later > index), len(text))
            searched = text[begin:stop]
            begin += max(text_end(message["content"] or "", searched), 0)
        if lost := lost_part(message, searched, trained=index in at):
            raise ConfigError(
                f"{place}: turn {index + 1}: the chat template does not render `{lost}` of the {message['role']}, or "
                "changes it.\n  Use a template that renders it, or remove it from the line."
            )


def _answer_spans(conversation: Conversation, template: Template, text: str, place: str) -> Iterator[Span]:
    """Yield the places of the turns that are targets."""
    messages, tools = conversation.messages, conversation.tools
    tail = None
    for index in conversation.trained:
        if tail is None:
            tail = _next_header(conversation, index, template, place)
        before = template.render(messages[:index], add_generation_prompt=True, tools=tools)
        after = template.render(messages[: index + 1], tools=tools).removesuffix(tail)
        if not after.startswith(before) or not text.startswith(after):
            raise ConfigError(
                f"{place}: turn {index + 1}: the chat template renders earlier turns differently when more follow, so "
                "the answer cannot be located.\n  Use a template that only appends, or conversations with one answer."
            )
        begin, content = len(before), messages[index]["content"] or ""
        found, opening = text_end(content, after[begin:]), begin
        if found < 0:  # a header may end with `<think>`, which the text begins with, too
            opening = len(template.render(messages[:index], tools=tools).removesuffix(tail))
            found = max(text_end(content, after[opening:]) - (begin - opening), 0)  # if not found, it is refused later
        yield Span(begin, begin + found, len(after), opening)


def _next_header(conversation: Conversation, index: int, template: Template, place: str) -> str:
    """Return the header of an answer that a template writes after every conversation, requested or not; often empty.

    Args:
        index: place of the first turn that is a target.

    Raises:
        ConfigError: the template writes something after a conversation that is not recognized as a header.
    """
    asked, tools = conversation.messages[:index], conversation.tools
    closed, opened = (template.render(asked, add_generation_prompt=flag, tools=tools) for flag in (False, True))
    if closed != opened:
        return ""
    mark, whole = "igla", conversation.messages[: index + 1]
    answered = template.render(whole, tools=tools)
    for messages in ([], [{"role": "assistant", "content": mark}]):
        try:
            header = template.render(messages).partition(mark)[0]
        except jinja2.TemplateError:
            continue
        header = header.removeprefix(template.special_tokens.get("bos_token", ""))
        if header and closed.endswith(header) and answered.endswith(header):
            return header
    try:
        longer = template.render([*whole, {"role": "user", "content": mark}], tools=tools)
    except jinja2.TemplateError:
        return ""
    if longer.startswith(answered):
        return ""
    raise ConfigError(
        f"{place}: the chat template ends a conversation with a text that is missing when another turn follows, so the "
        "end of an answer cannot be located.\n"
        "  Use a template that writes the next header for add_generation_prompt only."
    )


def special_ids(tokenizer: Tokenizer) -> np.ndarray:
    """Return the ids of the special tokens, which ordinary text does not produce, int64.

    Raises:
        ConfigError: the tokenizer's library reports no character offsets.
    """
    return np.array(list(_specials(tokenizer)), dtype=np.int64)


def special_texts(tokenizer: Tokenizer) -> list[str]:
    """Return the special tokens as text; raise ConfigError as `special_ids` does."""
    return list(_specials(tokenizer).values())


def _specials(tokenizer: Tokenizer) -> dict[int, str]:
    """Return id -> text of the special tokens."""
    if not hasattr(tokenizer.engine, "get_added_tokens_decoder"):
        raise ConfigError(
            f"data.tokenizer: {tokenizer.path} does not report the character offsets of its tokens, so turns cannot be"
            " located.\n  Save it as a tokenizer.json."
        )
    added = tokenizer.engine.get_added_tokens_decoder()
    return {number: token.content for number, token in added.items() if token.special}
