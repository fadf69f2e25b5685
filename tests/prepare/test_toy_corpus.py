import itertools
import json

import pytest

from igla_mega.prepare import toy_corpus
from igla_mega.prepare.toy_corpus import MAX_CODE_CHARS, SOURCES, write_toy_corpus


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_toy_corpus(tmp_path_factory.mktemp("toy"))


def test_the_five_sources_of_the_card_are_there_in_useful_sizes(files):
    assert tuple(files) == SOURCES == ("web", "code", "books", "academic", "conversation")
    sizes = {name: file.stat().st_size for name, file in files.items()}
    assert all(size > 100_000 for size in sizes.values()), sizes
    assert 4e6 < sum(sizes.values()) < 9e6
    assert sizes["code"] < 1.1 * MAX_CODE_CHARS


def test_documents_are_distinct_and_long(files):
    for file in files.values():
        texts = [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]
        assert len(set(texts)) == len(texts) >= 40
        assert sum(map(len, texts)) / len(texts) > 1000


def test_the_same_seed_gives_the_same_bytes_and_another_another_order(tmp_path, monkeypatch):
    some = list(itertools.islice(toy_corpus.modules(), 60))
    monkeypatch.setattr(toy_corpus, "modules", lambda: iter(some))
    first, again, other = (
        write_toy_corpus(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    for name in SOURCES:
        assert again[name].read_bytes() == first[name].read_bytes()
        assert other[name].read_bytes() != first[name].read_bytes()
        assert other[name].stat().st_size == first[name].stat().st_size
