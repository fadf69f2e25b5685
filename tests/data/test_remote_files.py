from pathlib import Path

import fsspec
import pytest

from igla_mega.config.errors import ConfigError
from igla_mega.data.indexed import IndexedReader
from igla_mega.data.remote_files import is_remote, local_dataset, local_files


@pytest.fixture
def store(write_dataset, tmp_path):
    system = fsspec.filesystem("memory")
    prefix = write_dataset(tmp_path / "set", [[1, 2, 3], [4]])
    for suffix in (".bin", ".idx"):
        system.pipe(f"/bucket/set{suffix}", prefix.with_suffix(suffix).read_bytes())
    yield system
    system.store.clear()


def test_a_dataset_of_an_object_store_is_copied_once_and_again_when_it_changes(store, tmp_path, monkeypatch):
    prefix = local_dataset("memory://bucket/set", tmp_path / "cache")
    assert IndexedReader(prefix).tokens(0, 4).tolist() == [1, 2, 3, 4]
    opened = []
    original = type(store).open
    monkeypatch.setattr(
        type(store), "open", lambda self, path, *a, **k: opened.append(path) or original(self, path, *a, **k)
    )
    assert local_dataset("memory://bucket/set", tmp_path / "cache") == prefix
    assert opened == []
    store.pipe("/bucket/set.bin", b"\x09\x00\x08\x00\x07\x00\x06\x00")
    local_dataset("memory://bucket/set", tmp_path / "cache")
    assert IndexedReader(prefix).tokens(0, 4).tolist() == [9, 8, 7, 6]


def test_text_of_an_object_store_is_found_by_pattern(store, tmp_path):
    store.pipe("/bucket/b.jsonl", b'{"text": "b"}\n')
    store.pipe("/bucket/a.jsonl", b'{"text": "a"}\n')
    files = local_files(["memory://bucket/*.jsonl", "here.jsonl"], tmp_path / "cache")
    assert [str(file).rsplit("/", 1)[-1] for file in files] == ["a.jsonl", "b.jsonl", "here.jsonl"]
    assert Path(files[0]).read_text() == '{"text": "a"}\n'


def test_what_is_not_there_is_named(store, tmp_path):
    with pytest.raises(ConfigError, match=r"memory://bucket/none\.bin: no such file"):
        local_dataset("memory://bucket/none", tmp_path / "cache")
    with pytest.raises(ConfigError, match="no file matches this pattern"):
        local_files(["memory://bucket/*.zip"], tmp_path / "cache")
    with pytest.raises(ConfigError, match="cannot be read"):
        local_files(["nosuch://bucket/a"], tmp_path / "cache")
    assert is_remote("s3://a/b") and not is_remote("/a/b")
