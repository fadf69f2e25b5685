import json

import numpy as np
import pytest

from igla_mega.config.errors import ConfigError
from igla_mega.data import pairs
from igla_mega.data.chat import load_template
from igla_mega.data.tokenizer import load_tokenizer, train_bpe

LIMITS = {"max_length": 64, "max_prompt_length": 32}


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


def pair_of(folder, tmp_path, entry, **limits):
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n" + json.dumps(entry) + "\n")
    reading = pairs.read_pairs(file, load_tokenizer(folder), load_template(folder, "plain"), **{**LIMITS, **limits})
    [(place, pair)] = list(reading)
    assert place == f"{file}:2"
    return pair


def texts(folder, pair):
    return tuple(load_tokenizer(folder).decode(tokens) for tokens in pair)


def test_text_is_put_end_to_end(folder, tmp_path):
    assert texts(folder, pair_of(folder, tmp_path, TEXT)) == ("def f", "(x):<|endoftext|>", "(x<|endoftext|>")


@pytest.mark.parametrize("entry", [TURNS, IMPLICIT], ids=["explicit prompt", "implicit prompt"])
def test_turns_go_through_the_template(folder, tmp_path, entry):
    assert texts(folder, pair_of(folder, tmp_path, entry, max_length=128, max_prompt_length=64)) == (
        "### system\nshort\n### user\nf?\n### assistant\n",
        "yes<|endoftext|>",
        "no<|endoftext|>",
    )


def test_a_prompt_that_is_too_long_is_refused_cut_or_left_out(folder, tmp_path):
    entry = {**TEXT, "prompt": "def f(x): return x " * 9}
    with pytest.raises(ConfigError, match=r"pairs.jsonl:2: the prompt alone has \d+ tokens, more than the 32"):
        pair_of(folder, tmp_path, entry)
    assert pair_of(folder, tmp_path, entry, too_long="skip") is None
    whole = pair_of(folder, tmp_path, entry, max_prompt_length=500, max_length=600)
    cut = pair_of(folder, tmp_path, entry, too_long="cut")
    assert cut.prompt.tolist() == whole.prompt[-32:].tolist(), "the end of a prompt is what is answered"
    assert cut.chosen.tolist() == whole.chosen.tolist()


def test_an_answer_loses_its_end(folder, tmp_path):
    whole = pair_of(folder, tmp_path, TEXT)
    room = len(whole.prompt) + 2
    cut = pair_of(folder, tmp_path, TEXT, max_length=room + 1, max_prompt_length=room)
    assert cut.chosen.tolist() == whole.chosen[:3].tolist()


REFUSED = {
    "chosen equals rejected": {**TEXT, "rejected": TEXT["chosen"]},
    "`rejected` is missing": {"prompt": "a", "chosen": "b"},
    "neither three texts": {**TURNS, "prompt": "text"},
    "chosen: does not begin with an assistant turn": {
        **TURNS,
        "prompt": QUESTION[:1],
        "chosen": [*QUESTION[1:], *TURNS["chosen"]],
    },
    "chosen and rejected are the same within the 9": {**TEXT, "chosen": "x" * 30, "rejected": "x" * 40},
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_is_no_preference_is_refused_with_its_place(folder, tmp_path, words):
    limits = {"max_length": 9, "max_prompt_length": 8} if "within" in words else {}
    with pytest.raises(ConfigError, match=f"pairs.jsonl:2: .*{words}"):
        pair_of(folder, tmp_path, REFUSED[words], **limits)


def test_rows_alternate_and_have_the_answers_as_targets():
    pair = pairs.Pair(np.array([1, 2]), np.array([3, 4, 5]), np.array([6]))
    chosen, rejected = pairs.rows_of([pair], 6, pad_id=0)
    assert chosen.tokens.tolist() == [1, 2, 3, 4, 5, 0] and rejected.tokens.tolist() == [1, 2, 6, 0, 0, 0]
    assert chosen.loss_mask.tolist() == [0, 1, 1, 1, 0, 0] and rejected.loss_mask.tolist() == [0, 1, 0, 0, 0, 0]
    assert chosen.labels.tolist()[:4] == [2, 3, 4, 5] and rejected.documents == [0, 3]
