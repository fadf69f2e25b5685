"""Rendered conversations: the text is that of transformers, turns end where they end, and nothing is lost unsaid."""

import functools
import importlib.util
import re
from pathlib import Path

import chat_tokenizers
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from igla_mega.config.errors import ConfigError
from igla_mega.data.tokenizer import load_tokenizer
from igla_mega.data.tuning import chat, turns
from igla_mega.data.tuning.forms import conversation_of

CASES = Path(__file__).parents[2] / "cases"
LLAMA3_FIRST = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|im_start|>' + message['role'] + '<|im_end|>\n\n'+ message['content'] | trim + '</s>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{{ '<|im_start|>assistant<|im_end|>\n\n' }}"
)
"""Meta's first template of Llama 3 with special tokens of the small tokenizers: it always ends with a header."""
CAREFUL = LLAMA3_FIRST.replace("{% set loop", "{% if messages[0]['role'] == 'tool' %}?{% endif %}{% set loop", 1)
CLOSED = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '</s>' }}{% endfor %}"
CALL = {"type": "function", "function": {"name": "area", "arguments": {"radius": 2}}}
TOOL = {"type": "function", "function": {"name": "area", "description": "Of a disc", "parameters": {}}}


def turn(role, content, **keys):
    return {"role": role, "content": content, **keys}


ASKED, ANSWER = turn("user", "the cat"), turn("assistant", "sat on")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("tokenizers")
    chat_tokenizers.make(made)
    return made


@functools.cache
def template_of(folder, source: str | None = None):
    given = None
    if source is not None:
        given = folder / "given.jinja"
        given.write_text(source)
    return chat.load_template(folder, given)


def spoken(folder, line: dict, source: str | None = None) -> list[str]:
    """The targets, turn by turn, as text."""
    tokenizer = load_tokenizer(folder)
    sample = chat.tokenize(conversation_of(line, "f:1"), tokenizer, template_of(folder, source), "f:1")
    runs, before = [], False
    for token, target in zip(sample.tokens, sample.targets, strict=True):
        runs += [[]] if target and not before else []
        before = target
        if target:
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]


SOURCES = {
    "case": ((CASES / "generation_header.jinja").read_text().rstrip("\n"), "<|im_end|>"),
    "Llama 3's first": (LLAMA3_FIRST, "</s>"),
    "fails without messages": (CAREFUL, "</s>"),
    "without any header": (CLOSED, "</s>"),
    "ChatML": (chat_tokenizers.CHATML, "<|im_end|>"),
}


@pytest.mark.parametrize("name", SOURCES)
def test_an_answer_ends_with_the_end_token_of_its_own_turn(folder, name):
    source, end = SOURCES[name]
    several = {"messages": [turn("system", "big"), ASKED, ANSWER, turn("user", "again"), turn("assistant", "ran")]}
    opening = "assistant:" if source == CLOSED else ""
    assert spoken(folder / "tokl2", several, source) == [f"{opening}sat on{end}", f"{opening}ran{end}"]
    assert spoken(folder / "tokl2", {"messages": [ASKED, ANSWER]}, source) == [f"{opening}sat on{end}"]


def test_an_unknown_text_after_every_conversation_is_refused(folder):
    source = chat_tokenizers.CHATML.split("{% if add")[0] + "{{ '<|im_start|>' + messages | length | string }}"
    with pytest.raises(ConfigError, match=r"f:1: .*ends a conversation with a text|f:1: turn 2: .*renders earlier"):
        spoken(folder / "tokml", {"messages": [ASKED, ANSWER]}, source)


RENDERED = {
    "tools": {"messages": [ASKED, ANSWER], "tools": [TOOL]},
    "calls": {"messages": [ASKED, turn("assistant", "", tool_calls=[CALL]), turn("tool", "42"), ANSWER]},
    "both": {
        "messages": [ASKED, turn("assistant", "so", tool_calls=[CALL]), turn("tool", "42"), ANSWER],
        "tools": [TOOL],
    },
}


@pytest.mark.parametrize("name", RENDERED)
def test_tools_are_rendered_as_by_transformers(folder, name):
    import transformers

    line = RENDERED[name]
    reference = transformers.AutoTokenizer.from_pretrained(folder / "toktools")
    expected = reference.apply_chat_template(line["messages"], tools=line.get("tools"), tokenize=False)
    conversation = conversation_of(line, "f:1")
    text, _ = turns.rendered(conversation, load_tokenizer(folder / "toktools"), template_of(folder / "toktools"), "f:1")
    assert text == expected


TRL = Path(importlib.util.find_spec("trl").submodule_search_locations[0]) / "chat_templates"
"""Templates of public models, as TRL has them, with the assistant's text marked by `{% generation %}`."""
HEADERS = r"</?think>|<\|start\|>assistant|<\|tool_response>|<\|turn>model"
"""What some of these marks count as the assistant's, although the generation prompt has it, or the other way round."""


@pytest.mark.parametrize("name", sorted(path.name for path in TRL.glob("*_training.jinja")))
def test_targets_are_those_of_trls_templates_or_the_template_is_refused(folder, name):
    import transformers

    tokenizer, template = load_tokenizer(folder / "tokl2"), chat.load_template(folder / "tokl2", TRL / name)
    reference = transformers.AutoTokenizer.from_pretrained(folder / "tokl2")
    for line in (
        {"messages": [ASKED, ANSWER]},
        {"messages": [ASKED, ANSWER, turn("user", "again"), ANSWER]},
        *RENDERED.values(),
    ):
        try:
            sample = chat.tokenize(conversation_of(line, "f:1"), tokenizer, template, "f:1")
        except ConfigError as error:
            assert "the chat template" in str(error)
            continue
        expected = reference.apply_chat_template(
            line["messages"],
            tools=line.get("tools"),
            chat_template=(TRL / name).read_text(),
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        assert sample.tokens.tolist() == expected["input_ids"]
        other = sample.targets != np.array(expected["assistant_masks"], dtype=bool)
        assert not re.sub(HEADERS, "", tokenizer.decode(sample.tokens[other])).strip(), line


CONTENTS = {
    "joined": "{{ '' + m['content'] }}{{ m.tool_calls and calls(m) or '' }}",
    "printed": "{{ m['content'] }}{{ m.tool_calls and calls(m) or '' }}",
    "null": "{% if m['content'] is none %}{{ calls(m) }}{% else %}{{ m['content'] }}{% endif %}",
}


@pytest.mark.parametrize("name", CONTENTS)
def test_a_call_without_text_is_a_target(folder, name):
    source = (
        "{% macro calls(m) %}{{ m.tool_calls[0].function | tojson }}{% endmacro %}"
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}" + CONTENTS[name] + "{{ '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    line = {"messages": [ASKED, turn("assistant", None, tool_calls=[CALL]), turn("tool", "42"), ANSWER]}
    call = '{"name": "area", "arguments": {"radius": 2}}<|im_end|>'
    assert spoken(folder / "toktools", line, source) == [call, "sat on<|im_end|>"]


LOST = {
    "`tools`": ("tokml", {"messages": [ASKED, ANSWER], "tools": [TOOL]}),
    "turn 2: .*`tool_calls` of the assistant": ("tokml", {"messages": [ASKED, {**ANSWER, "tool_calls": [CALL]}]}),
    "turn 2: .*`reasoning_content`": ("tokml", {"messages": [ASKED, {**ANSWER, "reasoning_content": "big dog"}]}),
    "turn 2: .*`content` of the assistant": (
        "tokr1",
        {"messages": [ASKED, turn("assistant", "<think>big dog</think>sat on")]},
    ),
    "turn 1: .*`content` of the system": ("tokl2", {"messages": [turn("system", "big"), ASKED, ANSWER]}),
    "turn 3: .*`content` of the tool": (
        "tokl2",
        {"messages": [ASKED, turn("assistant", "so"), turn("tool", "42"), turn("assistant", "42, so")]},
    ),
    "turn 5: .*`content` of the tool": (
        "tokl2",
        {
            "messages": [
                ASKED,
                turn("assistant", "so"),
                turn("user", "42"),
                turn("assistant", "so", weight=0),
                turn("tool", "42"),
                ANSWER,
            ]
        },
    ),
    "System role not supported": ("toknosys", {"messages": [turn("system", "big"), ASKED, ANSWER]}),
}


@pytest.mark.parametrize("words", LOST)
def test_what_a_template_does_not_render_is_refused_by_name(folder, words):
    kind, line = LOST[words]
    with pytest.raises(ConfigError, match=rf"f:1: (.|\n)*{words}"):
        spoken(folder / kind, line)


def test_thinking_that_a_template_drops_from_context_is_no_loss(folder):
    talk = [
        ASKED,
        turn("assistant", "<think>big</think>sat on", weight=0),
        turn("user", "again"),
        turn("assistant", "ran"),
    ]
    assert spoken(folder / "tokr1", {"messages": talk}) == ["ran<|im_end|>"]


def test_thinking_may_begin_in_the_header(folder):
    source = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
    )
    talk = [ASKED, turn("assistant", "<think>\nbig dog</think>sat on")]
    assert spoken(folder / "tokml", {"messages": talk}, source) == ["big dog</think>sat on<|im_end|>"]


def test_a_typed_end_token_is_not_doubled(folder):
    for content in ("sat on<|im_end|>", "sat on<|im_end|>\n", "sat on"):
        assert spoken(folder / "tokml", {"messages": [ASKED, turn("assistant", content)]}) == ["sat on<|im_end|>"]
    assert spoken(folder / "tokl2", {"messages": [ASKED, turn("assistant", "sat on</s>")]}) == [" sat on </s>"]


TEXTS = st.text(st.sampled_from("abc \n\"'{}<é"), min_size=1).filter(lambda text: text.strip())


@settings(max_examples=30, deadline=None)
@given(st.lists(TEXTS, min_size=2, max_size=6), st.data())
def test_only_turns_that_are_targets_are_trained_on_and_wholly(folder, texts, data):
    talk = [turn("assistant" if i % 2 else "user", text) for i, text in enumerate(texts[: len(texts) // 2 * 2])]
    for message in talk[1:-1:2]:
        if data.draw(st.booleans()):
            message["weight"] = 0
    wanted = [m["content"] + "<|im_end|>" for m in talk[1::2] if "weight" not in m]
    assert spoken(folder / "tokml", {"messages": talk}) == wanted
