"""Forms of conversations: what is read, and what is refused by the name of the key."""

import json

import pytest

from igla_mega.config.errors import ConfigError
from igla_mega.data.tuning import forms

CALL = {"type": "function", "id": "c1", "function": {"name": "area", "arguments": {"radius": 2.5, "unit": 'a "b"'}}}
TOOL = {
    "type": "function",
    "function": {
        "name": "area",
        "description": "Of a disc",
        "parameters": {"properties": {"radius": {"type": "number"}}},
    },
}


def turn(role, content, **keys):
    return {"role": role, "content": content, **keys}


ASKED, ANSWER = turn("user", "a"), turn("assistant", "b")
TALK = [ASKED, ANSWER]
AGAIN = [turn("user", "c"), turn("assistant", "d")]
ABOVE = turn("system", "s")

READ = {
    "messages": ({"messages": TALK}, TALK, (1,)),
    "several": ({"messages": TALK + AGAIN}, TALK + AGAIN, (1, 3)),
    "ShareGPT": (
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "a"},
                {"from": "gpt", "value": "b"},
            ]
        },
        [ABOVE, *TALK],
        (2,),
    ),
    "ShareGPT with weights": (
        {
            "conversations": [
                {"from": "human", "value": "a", "weight": None},
                {"from": "gpt", "value": "b", "weight": 1},
            ]
        },
        TALK,
        (1,),
    ),
    "system of the line": ({"messages": TALK, "system": "s"}, [ABOVE, *TALK], (2,)),
    "Alpaca": ({"instruction": "a", "input": "", "output": "b", "text": "### a b"}, TALK, (1,)),
    "Alpaca with system": ({"instruction": "a", "output": "b", "system": "s"}, [ABOVE, *TALK], (2,)),
    "UltraChat": ({"prompt": "a", "prompt_id": "f0", "messages": TALK}, TALK, (1,)),
    "completion": ({"prompt": TALK + AGAIN[:1], "completion": AGAIN[1:]}, TALK + AGAIN, (3,)),
    "completion with system": (
        {"prompt": TALK + AGAIN[:1], "completion": AGAIN[1:], "system": "s"},
        [ABOVE, *TALK, *AGAIN],
        (4,),
    ),
    "weight 0": ({"messages": [ASKED, {**ANSWER, "weight": 0}, *AGAIN]}, TALK + AGAIN, (3,)),
    "train false": ({"messages": [*TALK, AGAIN[0], {**AGAIN[1], "train": False}]}, TALK + AGAIN, (1,)),
    "weight of the user": ({"messages": [{**ASKED, "weight": 0.0}, {**ANSWER, "weight": 1.0}]}, TALK, (1,)),
    "harmless keys": (
        {"messages": TALK, "id": 7, "source": "web", "score": 0.5, "chosen-rating": 2, "images": [], "tools": None},
        TALK,
        (1,),
    ),
    "a tool": (
        {"messages": [ASKED, turn("assistant", None, tool_calls=[CALL]), turn("tool", "19.6"), ANSWER]},
        [ASKED, turn("assistant", None, tool_calls=[CALL]), turn("tool", "19.6"), ANSWER],
        (1, 3),
    ),
    "two tools": (
        {
            "messages": [
                ASKED,
                turn("assistant", "", tool_calls=[CALL, CALL]),
                turn("tool", "1"),
                turn("tool", "2"),
                ANSWER,
            ]
        },
        [ASKED, turn("assistant", "", tool_calls=[CALL, CALL]), turn("tool", "1"), turn("tool", "2"), ANSWER],
        (1, 4),
    ),
}


@pytest.mark.parametrize("name", READ)
def test_a_form_is_read(name):
    line, messages, trained = READ[name]
    found = forms.conversation_of(line, "f:1")
    assert (found.messages, found.trained, found.tools) == (messages, trained, None)


def test_tools_are_a_list_or_its_json_text():
    for tools in ([TOOL], json.dumps([TOOL])):
        assert forms.conversation_of({"messages": TALK, "tools": tools}, "f:1").tools == [TOOL]


def test_a_plain_prompt_and_completion_are_texts():
    assert forms.conversation_of({"prompt": "", "completion": "x", "id": 3}, "f:1") == ("", "x")


REFUSED = {
    "'history'": {"instruction": "a", "output": "b", "history": [["c", "d"]]},
    "'images'": {"messages": TALK, "images": ["a.png"]},
    "'chosen'": {"messages": TALK, "chosen": TALK},
    "'chat_template_kwargs'": {"messages": TALK, "chat_template_kwargs": {"enable_thinking": False}},
    "'label'": {"prompt": "a", "completion": "b", "label": False},
    "'tools' would": {"prompt": "a", "completion": "b", "tools": [TOOL]},
    "'weight' would": {"messages": TALK, "weight": 0},
    "'completion' would": {"messages": TALK, "prompt": "a", "completion": "b"},
    "turn 2: 'function_call'": {"messages": [ASKED, {**ANSWER, "function_call": {"name": "f"}}]},
    "turn 2: 'value'": {"messages": [ASKED, {**ANSWER, "value": "c"}]},
    "turn 1: 'from'": {"messages": [{**ASKED, "from": "human"}, ANSWER]},
    "`prompt` would be dropped": {"prompt": "other", "messages": TALK},
    "`system` beside": {"messages": [ABOVE, *TALK], "system": "t"},
    "list of parts": {"messages": [turn("user", [{"type": "text", "text": "a"}]), ANSWER]},
    "instruction or input is not a text": {"instruction": {"a": 1}, "output": "b"},
    "tools: not JSON": {"messages": TALK, "tools": "area"},
    "tools: not a list of functions": {"messages": TALK, "tools": [{"type": "function"}]},
    "tool_calls: not a list": {"messages": [ASKED, {**ANSWER, "tool_calls": [{"id": "c"}]}]},
    "its reasoning is not": {"messages": [ASKED, {**ANSWER, "reasoning_content": ["a"]}]},
    "turn 1: `weight`, `train`": {"messages": [{**ASKED, "train": True}, ANSWER]},
    "turn 1: `weight`, `train`, `tool_calls`": {"messages": [{**ASKED, "tool_calls": [CALL]}, ANSWER]},
    "turn 2: `weight` is 0.5": {"messages": [ASKED, {**ANSWER, "weight": 0.5}]},
    "`weight` and `train` differ": {"messages": [ASKED, {**ANSWER, "weight": 1, "train": False}]},
    "no turn by the assistant is a target": {"messages": [ASKED, {**ANSWER, "weight": 0}]},
    "no turn by the assistant, so": {"prompt": [ASKED], "completion": [AGAIN[0]][:0]},
    "role 'critic' is not one of": {"conversations": [{"from": "critic", "value": "a"}]},
    "turn 1: a tool's answer that": {"messages": [turn("tool", "1"), ANSWER]},
    "turn 2: a tool's answer that": {"messages": [ASKED, turn("tool", "1"), ANSWER]},
    "are for `dpo:`": {"chosen": TALK, "rejected": TALK},
    "its keys are instruction, response": {"instruction": "a", "response": "b"},
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_would_be_dropped_is_refused_by_name(words):
    with pytest.raises(ConfigError, match=r"^f:3: ") as caught:
        forms.conversation_of(REFUSED[words], "f:3")
    assert words in str(caught.value)


def test_a_part_is_found_whatever_the_white_space_and_the_escapes():
    assert forms.text_end(" b\n c ", "a b c d") == 5
    assert forms.text_end("<think>\nb</think>c", "x<think>\n\nb\n</think>\n\nc y") == 23
    assert forms.text_end("", "a") == 0 and forms.text_end("bd", "abcd") == -1


CALLING = turn("assistant", "b", tool_calls=[CALL])
THINKING = turn("assistant", "<think>x y</think>b")
LOST = [
    (ANSWER, "say b", True, None),
    (ANSWER, "say", True, "content"),
    (THINKING, "<think>\nx y\n</think>\n\nb", True, None),
    (THINKING, "b", True, "content"),
    (THINKING, "b", False, None),
    (turn("assistant", "b", reasoning_content="x"), "b", True, "reasoning_content"),
    (turn("assistant", "b", reasoning_content="x"), "b", False, None),
    (turn("assistant", "b", thinking="x"), "x: b", True, None),
    (CALLING, 'b {"name": "area", "arguments": {"radius": 2.5, "unit": "a \\"b\\""}}', True, None),
    (CALLING, 'b <function=area><parameter=radius>2.5</parameter><parameter=unit>a "b"</parameter>', True, None),
    (CALLING, 'b {"name": "area", "arguments": {"radius": 2.5}}', True, "tool_calls"),
    (CALLING, "b", False, "tool_calls"),
    (turn("tool", "x\ny"), '{"output": "x\\ny"}', False, None),
    (turn("tool", "x\ny"), "", False, "content"),
]


@pytest.mark.parametrize(("message", "text", "trained", "lost"), LOST)
def test_the_part_that_a_template_loses_is_named(message, text, trained, lost):
    assert forms.lost_part(message, text, trained=trained) == lost


def test_arguments_may_be_a_json_text():
    written = {"name": "area", "arguments": json.dumps(CALL["function"]["arguments"])}
    message = turn("assistant", None, tool_calls=[written])
    assert forms.lost_part(message, json.dumps(written), trained=True) is None
    assert forms.lost_part(message, 'area(radius=2.5, unit=a "b")', trained=True) is None
    assert forms.lost_part(message, "area(radius=2.5)", trained=True) == "tool_calls"


def test_a_tool_of_which_a_part_is_missing_is_lost():
    whole = json.dumps([TOOL])
    assert not forms.lost_tool(None, "") and not forms.lost_tool([TOOL], whole)
    assert not forms.lost_tool([TOOL["function"]], "area(radius): Of a disc")
    for part in ("area", "Of a disc", "radius"):
        assert forms.lost_tool([TOOL], whole.replace(part, ""))
