import json
from pathlib import Path

import numpy as np
import pytest

from igla_mega.data.indexed import IndexedWriter
from igla_mega.data.tokenizer import Tokenizer, train_bpe

SENTENCES = [
    "The ring passes keys and values from rank to rank.",
    "Ein Satz mit Umlauten: äöü ß, und ein Kaninchen 🐇.",
    "def add(a, b):\n    return a + b\n",
    "日本語のテキストも一行だけ。",
]


@pytest.fixture(scope="session")
def write_jsonl():
    def write(path: Path, texts: list[str]) -> Path:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def write_dataset():
    """Write documents of token ids; returns the prefix."""

    def write(prefix: Path, documents: list[list[int]], dtype=np.uint16) -> Path:
        with IndexedWriter(prefix, dtype) as writer:
            for document in documents:
                writer.add(np.array(document), np.array([len(document)]))
        return prefix

    return write


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """300 texts of 1 to 12 sentences."""
    return ["\n".join(SENTENCES[(i * k) % 4] for k in range(1 + i % 12)) for i in range(300)]


@pytest.fixture(scope="session")
def jsonl(tmp_path_factory, texts, write_jsonl) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("text") / "text.jsonl", texts)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory, jsonl) -> Tokenizer:
    return train_bpe([jsonl], 320, tmp_path_factory.mktemp("tokenizer"))
