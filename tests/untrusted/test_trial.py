"""Tokenizers and templates that take their time, their memory or the process with them are refused before their use."""

import json
import os

import pytest

from igla_mega.config.errors import ConfigError
from igla_mega.data.tokenizer import load_tokenizer, train_bpe
from igla_mega.data.tuning import chat
from igla_mega.untrusted import trial


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The content of a small tokenizer.json, and its folder."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.jsonl").write_text(json.dumps({"text": "Say yes or no, 1 2 3."}) + "\n")
    train_bpe([folder / "text.jsonl"], 260, folder)
    return json.loads((folder / "tokenizer.json").read_text()), folder


def replace(pattern: dict, content: str) -> dict:
    return {"type": "Replace", "pattern": pattern, "content": content}


def split(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def sequence(kind: str, parts: list) -> dict:
    return {"type": "Sequence", kind: parts}


def nested(parts: list) -> dict:
    for _ in range(3):
        parts = [sequence("normalizers", parts)]
    return parts[0]


DOUBLING = [replace({"String": "a"}, "aa")] * 40
HOSTILE = {
    "doubling, nested": {"normalizer": nested(DOUBLING)},
    "doubling of a rare letter": {"normalizer": sequence("normalizers", [replace({"String": "ж"}, "жж")] * 40)},
    "a chain of letters": {
        "normalizer": sequence("normalizers", [replace({"String": chr(i)}, 2 * chr(i + 1)) for i in range(2000, 2040)])
    },
    "by an expression": {"normalizer": sequence("normalizers", [replace({"Regex": "[κλ]"}, "κλ")] * 40)},
    "by ten thousand": {"normalizer": replace({"String": "q"}, "q" * 10_000)},
    "decoder": {"decoder": sequence("decoders", [*[replace({"String": "a"}, "aa")] * 40, {"type": "Fuse"}])},
    "an expression that panics": {"pre_tokenizer": split(r"(q+)+(?=(q+)+z)")},
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_tokenizer_is_refused_in_bounded_time_and_memory(name, good, tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "SECONDS", 2)
    monkeypatch.setattr(trial, "MEGABYTES", 50)
    (tmp_path / "tokenizer.json").write_text(json.dumps({**good[0], **HOSTILE[name]}))
    before = dict(os.environ)

    def use() -> None:
        tokenizer = load_tokenizer(tmp_path)
        tokenizer.decode(tokenizer.encode("qqqq" * 20))

    with pytest.raises(ConfigError) as refusal:
        use()
    assert str(tmp_path) in str(refusal.value) and "\n  " in str(refusal.value)
    assert dict(os.environ) == before


def test_a_panic_is_an_error_with_words_in_every_way_to_a_text(good, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps({**good[0], **HOSTILE["an expression that panics"]}))
    text = "q" * 80
    for use in (
        lambda t: t.encode(text),
        lambda t: t.encode_batch([text, "a"]),
        lambda t: t.encode_flat([text]),
        lambda t: chat.tokenize(
            [{"role": "user", "content": text}, {"role": "assistant", "content": "b"}],
            t,
            chat.load_template(good[1], "plain"),
            "f:1",
        ),
    ):
        with pytest.raises(ConfigError, match=r"the tokenizer fails on a text \(.*retry-limit"):
            use(load_tokenizer(tmp_path))


def test_a_good_tokenizer_is_tried_once_for_each_state_of_its_file(good, tmp_path, monkeypatch):
    trials = []
    monkeypatch.setattr(trial, "attempt", lambda task, **limits: trials.append(limits))
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(good[0]))
    load_tokenizer(file)
    load_tokenizer(tmp_path)
    assert trials == [{"seconds": trial.SECONDS, "megabytes": trial.MEGABYTES}]
    file.write_text(json.dumps(good[0], indent=1))
    load_tokenizer(file)
    assert len(trials) == 2
    load_tokenizer(good[1], tried=True)
    assert len(trials) == 2


def test_the_texts_of_a_trial_grow_less_than_is_allowed_in_unicode_s_own_forms(good, tmp_path):
    forms = sequence("normalizers", [{"type": "NFKC"}, {"type": "NFKD"}, replace({"Regex": " {2,}"}, "▁")])
    (tmp_path / "tokenizer.json").write_text(json.dumps({**good[0], "normalizer": forms}))
    assert load_tokenizer(tmp_path).encode("\ufdfa")


def test_a_template_is_tried_with_the_tokenizer_before_it_is_used(good, tmp_path, monkeypatch):
    template = "{% for m in messages %}{{ m.content }}{{ 'q' * 90 }}{% endfor %}"
    (tmp_path / "t.jinja").write_text(template)
    (tmp_path / "tokenizer.json").write_text(json.dumps({**good[0], **HOSTILE["an expression that panics"]}))
    with pytest.raises(ConfigError, match="fails on a text"):
        chat.load_template(tmp_path, tmp_path / "t.jinja", loaded=load_tokenizer(tmp_path))
    monkeypatch.setattr(chat.ChatTemplate, "render", lambda *_, **__: os.abort())
    with pytest.raises(ConfigError, match=r"t.jinja: the chat template crashed \(SIGABRT\)"):
        chat.load_template(tmp_path, tmp_path / "t.jinja")
