import json
from pathlib import Path

import chat_tokenizers
import numpy as np
import pytest

from igla_mega.config.errors import ConfigError
from igla_mega.data.tokenizer import load_tokenizer, train_bpe
from igla_mega.data.tuning import pairs
from igla_mega.data.tuning.chat import load_template


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    (path / "text.jsonl").write_text(json.dumps({"text": "def f(x):\n    return x\n" * 20}) + "\n")
    train_bpe([path / "text.jsonl"], 280, path)
    return path


def turn(role, content):
    return {"role": role, "content": content}


QUESTION = [turn("system", "short"), turn("user", "f?")]
TEXT = {"prompt": "def f", "chosen": "(x):", "rejected": "(x"}
TURNS = {"prompt": QUESTION, "chosen": [turn("assistant", "yes")], "rejected": [turn("assistant", "no")]}
IMPLICIT = {key: [*QUESTION, *TURNS[key]] for key in ("chosen", "rejected")}
SHARE_GPT = {
    "conversations": [{"from": "system", "value": "short"}, {"from": "human", "value": "f?"}],
    "chosen": {"from": "gpt", "value": "yes"},
    "rejected": {"from": "gpt", "value": "no"},
}
FORMS = {
    "explicit prompt": TURNS,
    "implicit prompt": IMPLICIT,
    "UltraFeedback": {
        "prompt": "f?",
        "prompt_id": "1",
        "messages": IMPLICIT["chosen"],
        "score_chosen": 7.0,
        **IMPLICIT,
    },
    "prompt as text": {**TURNS, "prompt": "f?", "system": "short"},
    "system beside": {**TURNS, "prompt": QUESTION[1:], "system": "short"},
    "ShareGPT": SHARE_GPT,
}
"""Name -> the same pair in another form."""


def pair_of(folder, entry):
    return pairs.pair_of(entry, load_tokenizer(folder), load_template(folder, "plain"), "f:2")


def texts(folder, pair):
    return tuple(load_tokenizer(folder).decode(tokens) for tokens in pair)


def test_text_is_put_end_to_end(folder):
    assert texts(folder, pair_of(folder, TEXT)) == ("def f", "(x):<|endoftext|>", "(x<|endoftext|>")
    ended = {**TEXT, "chosen": "(x):<|endoftext|>", "rejected": "(x<|endoftext|>\n"}
    assert texts(folder, pair_of(folder, ended)) == texts(folder, pair_of(folder, TEXT)), "one end token each"


@pytest.mark.parametrize("name", FORMS)
def test_turns_go_through_the_template(folder, name):
    assert texts(folder, pair_of(folder, FORMS[name])) == (
        "### system\nshort\n### user\nf?\n### assistant\n",
        "yes<|endoftext|>",
        "no<|endoftext|>",
    )


HH = "\n\nHuman: f?\n\nAssistant: I do\n\nHuman: g?\n\nAssistant:"
IMPLICIT_PAIRS = {
    "HH-RLHF": {"chosen": HH + " I say yes", "rejected": HH + " I say no"},
    "HH-RLHF, earlier": {"chosen": HH + " I say yes", "rejected": HH.replace("I do", "I did") + " I say no"},
    "turns": IMPLICIT,
    "several turns": {key: [*QUESTION, turn("assistant", "g"), QUESTION[1], *TURNS[key]] for key in IMPLICIT},
}


@pytest.mark.parametrize("name", IMPLICIT_PAIRS)
def test_an_implicit_prompt_is_that_of_trl(folder, name):
    from trl.data_utils import extract_prompt

    entry = IMPLICIT_PAIRS[name]
    expected = extract_prompt(entry)
    found = pair_of(folder, entry)
    if isinstance(expected["prompt"], list):
        assert texts(folder, found) == texts(folder, pair_of(folder, expected))
        return
    prompt, *answers = texts(folder, found)
    # TRL cuts within an answer where both begin with the same words; here the prompt ends with a whole turn's header.
    assert expected["prompt"].startswith(prompt) and prompt.endswith("\n\nAssistant:")
    assert "\n\nAssistant:" not in expected["prompt"][len(prompt) :]
    assert [prompt + answer for answer in answers] == [entry[key] + "<|endoftext|>" for key in ("chosen", "rejected")]


def test_tools_and_calls_are_in_the_prompt_and_the_answer(tmp_path):
    chat_tokenizers.make(tmp_path)
    tokenizer, template = load_tokenizer(tmp_path / "toktools"), load_template(tmp_path / "toktools")
    tool, call = ({"type": "function", "function": {"name": "f", key: {}}} for key in ("parameters", "arguments"))
    asked = {"prompt": [turn("user", "the cat")], "tools": [tool]}
    answers = {
        "chosen": [{**turn("assistant", ""), "tool_calls": [call]}],
        "rejected": [turn("assistant", "ran<|im_end|>")],
    }
    pair = pairs.pair_of({**asked, **answers}, tokenizer, template, "f:1")
    prompt, chosen, rejected = (tokenizer.decode(part) for part in pair)
    assert prompt.startswith('<|im_start|>system\nTools: [{"type": "function"') and prompt.endswith("assistant\n")
    assert chosen == '<tool_call>{"name": "f", "arguments": {}}</tool_call><|im_end|>' and rejected == "ran<|im_end|>"


def test_an_answer_ends_before_the_header_that_a_template_always_writes(tmp_path):
    chat_tokenizers.make(tmp_path)
    tokenizer = load_tokenizer(tmp_path / "tokml")
    template = load_template(tmp_path / "tokml", Path(__file__).parents[2] / "cases" / "generation_header.jinja")
    pair = pairs.pair_of({**TURNS, "prompt": QUESTION}, tokenizer, template, "f:1")
    prompt, *answers = (tokenizer.decode(part) for part in pair)
    assert prompt.endswith("f?<|im_end|>\n<|im_start|>assistant\n") and answers == ["yes<|im_end|>", "no<|im_end|>"]


REFUSED = {
    "chosen equals rejected": {**TEXT, "rejected": TEXT["chosen"]},
    "are the same tokens": {**TEXT, "chosen": "x<|endoftext|>", "rejected": "x"},
    "the prompt is empty": {**TEXT, "prompt": ""},
    "`rejected` is missing or empty; its keys are chosen, prompt": {"prompt": "a", "chosen": "b"},
    "`chosen` is missing or empty; its keys are completion, label, prompt": {
        "prompt": "a",
        "completion": "b",
        "label": True,
    },
    "neither three texts": {**TURNS, "chosen": "text"},
    "or an answer is empty": {**TEXT, "chosen": " "},
    "two texts without `prompt`": {"chosen": "yes", "rejected": "no"},
    "`prompt` would be dropped": {"prompt": "other", **IMPLICIT},
    "`messages` or `conversations` would be dropped": {**TURNS, "messages": IMPLICIT["rejected"]},
    "'margin' would be dropped": {**TEXT, "margin": 2},
    "'system' would be dropped": {**TEXT, "system": "short"},
    "chosen: `weight: 0`": {**TURNS, "chosen": [turn("assistant", "a"), turn("user", "b"), turn("assistant", "c")]},
    "chosen: does not begin with an assistant turn": {
        **TURNS,
        "prompt": QUESTION[:1],
        "chosen": [*QUESTION[1:], *TURNS["chosen"]],
    },
}
REFUSED["chosen: `weight: 0`"]["chosen"][0]["weight"] = 0


@pytest.mark.parametrize("words", REFUSED)
def test_what_is_no_preference_is_refused_with_its_place(folder, words):
    with pytest.raises(ConfigError, match=r"^f:2: ") as caught:
        pair_of(folder, REFUSED[words])
    assert words in str(caught.value)


def test_texts_that_repeat_the_prompt_of_hh_rlhf_are_refused(folder):
    line = {"prompt": HH, "chosen": HH + " yes", "rejected": HH + " no"}
    with pytest.raises(ConfigError, match=r"f:2: the answers repeat `prompt`, which would be learned twice"):
        pair_of(folder, line)
    assert texts(folder, pair_of(folder, {**line, "chosen": " yes", "rejected": " no"}))[0] == HH


def test_rows_alternate_and_have_the_answers_as_targets():
    pair = pairs.Pair(np.array([1, 2]), np.array([3, 4, 5]), np.array([6]))
    chosen, rejected = pairs.rows_of([pair], 6, pad_id=0)
    assert chosen.tokens.tolist() == [1, 2, 3, 4, 5, 0] and rejected.tokens.tolist() == [1, 2, 6, 0, 0, 0]
    assert chosen.loss_mask.tolist() == [0, 1, 1, 1, 0, 0] and rejected.loss_mask.tolist() == [0, 1, 0, 0, 0, 0]
    assert chosen.labels.tolist()[:4] == [2, 3, 4, 5] and rejected.documents == [0, 3]
