"""Tokenizers and templates that take their time, their memory or the process with them are refused before their use."""

import json
import os
from pathlib import Path

import pytest

from igla_mega.config.errors import ConfigError
from igla_mega.data import chat, trial
from igla_mega.data.tokenizer import load_tokenizer, train_bpe


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
    "doubling": {"normalizer": sequence("normalizers", DOUBLING)},
    "doubling, nested": {"normalizer": nested(DOUBLING)},
    "doubling of a rare letter": {"normalizer": sequence("normalizers", [replace({"String": "ж"}, "жж")] * 40)},
    "a chain of letters": {
        "normalizer": sequence("normalizers", [replace({"String": chr(0x4E00 + i)}, 2 * chr(0x4E01 + i)) for i in range(40)])
    },
    "by an expression": {"normalizer": sequence("normalizers", [replace({"Regex": "[κλ]"}, "κλ")] * 40)},
    "an empty pattern": {"normalizer": sequence("normalizers", [replace({"Regex": ""}, "xxxx")] * 20)},
    "by a thousand": {"normalizer": replace({"String": "q"}, "q" * 10_000)},
    "decoder": {"decoder": sequence("decoders", [*[replace({"String": "a"}, "aa")] * 40, {"type": "Fuse"}])},
    "slow expression": {"pre_tokenizer": split(r"(q+)+(?=(q+)+z)")},
    "slow expression on spaces": {"pre_tokenizer": split(r"(\s*)*\s*(\s+\s+)+Z")},
    "slow expression in a normalizer": {"normalizer": replace({"Regex": r"(w|w)*(w|w)*(w|w)*v"}, "")},
    "deep recursion": {"pre_tokenizer": split(r"(?<n>a\g<n>?b|a)+")},
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_tokenizer_is_refused_in_bounded_time_and_memory(name, good, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(trial, "SECONDS", 1)
    monkeypatch.setattr(trial, "MEGABYTES", 200)
    (tmp_path / "tokenizer.json").write_text(json.dumps({**good[0], **HOSTILE[name]}))
    with pytest.raises(ConfigError) as refusal:
        tokenizer = load_tokenizer(tmp_path)
        tokenizer.decode(tokenizer.encode("qqqq" * 20))
        raise AssertionError("taken")
    print(name, refusal.value)
    assert str(tmp_path) in str(refusal.value) and "\n  " in str(refusal.value)
