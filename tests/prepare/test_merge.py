import gzip
import json

import numpy as np
import pytest

from igla_mega.config.errors import ConfigError
from igla_mega.data.indexed import IndexedReader
from igla_mega.data.tokenizer import train_bpe
from igla_mega.prepare.manifest import damage, read_manifest
from igla_mega.prepare.merge import complete_parts, merge
from igla_mega.prepare.preprocess import Settings, part_prefix, preprocess


def test_parts_joined_by_copy_are_the_bytes_of_the_whole(jsonl, tokenizer, tmp_path):
    preprocess([jsonl], tmp_path / "whole", tokenizer, settings=Settings(progress=False))
    for i in range(3):
        assert complete_parts(tmp_path / "set", 3) == []
        preprocess(
            [jsonl], part_prefix(tmp_path / "set", (i, 3)), tokenizer, settings=Settings(part=(i, 3), progress=False)
        )
    parts = complete_parts(tmp_path / "set", 3)
    assert [part[-14:] for part in parts] == ["00000-of-00003", "00001-of-00003", "00002-of-00003"]
    merge(tmp_path / "set", parts, progress=False)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"set{suffix}").read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()
    assert damage(tmp_path / "set", whole=True) == []
    assert read_manifest(tmp_path / "set")["tokens"] == read_manifest(tmp_path / "whole")["tokens"]


def test_a_dataset_that_refers_to_its_parts_reads_like_one_copied(tmp_path, write_dataset):
    sets = [[[1, 2, 3], [4]], [[5]], [[6, 7], [8, 9, 10, 11]]]
    parts = [write_dataset(tmp_path / f"p{i}", documents) for i, documents in enumerate(sets)]
    merge(tmp_path / "copy", parts, progress=False)
    merge(tmp_path / "joined", parts, "reference", progress=False)
    one, other = IndexedReader(tmp_path / "copy"), IndexedReader(tmp_path / "joined", vocab_size=12)
    assert (other.num_tokens, other.num_documents) == (one.num_tokens, one.num_documents) == (11, 5)
    for start in range(11):
        assert other.document_of(start) == one.document_of(start)
        for stop in range(start + 1, 12):
            assert np.array_equal(other.tokens(start, stop), one.tokens(start, stop))
            assert np.array_equal(other.starts_within(start, stop), one.starts_within(start, stop))
    assert [other.document_start(d) for d in range(6)] == [one.document_start(d) for d in range(6)]
    with pytest.raises(ConfigError, match=r"p2\.bin: token 10 \(document 4\) has id 11"):
        IndexedReader(tmp_path / "joined", vocab_size=11)


def test_a_part_that_holds_nothing_is_left_out(jsonl, tokenizer, tmp_path):
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(jsonl.read_bytes()))
    preprocess([packed], tmp_path / "whole", tokenizer, settings=Settings(progress=False))
    counts = [
        preprocess(
            [packed], part_prefix(tmp_path / "set", (i, 3)), tokenizer, settings=Settings(part=(i, 3), progress=False)
        ).documents
        for i in range(3)
    ]
    assert counts == [300, 0, 0]
    merge(tmp_path / "set", complete_parts(tmp_path / "set", 3), progress=False)
    assert (tmp_path / "set.bin").read_bytes() == (tmp_path / "whole.bin").read_bytes()


def test_what_does_not_belong_together_is_not_joined(jsonl, tokenizer, tmp_path, write_dataset):
    small, large = write_dataset(tmp_path / "s", [[1]]), write_dataset(tmp_path / "l", [[1]], np.int32)
    with pytest.raises(ConfigError, match=r"ids of type int32, but .* has uint16"):
        merge(tmp_path / "set", [small, large])
    preprocess([jsonl], tmp_path / "a", tokenizer, settings=Settings(progress=False))
    preprocess([jsonl], tmp_path / "b", train_bpe([jsonl], 280, tmp_path / "other"), settings=Settings(progress=False))
    with pytest.raises(ConfigError, match="prepared with another tokenizer"):
        merge(tmp_path / "set", [tmp_path / "a", tmp_path / "b"])
    with pytest.raises(ConfigError, match="joined into itself"):
        merge(tmp_path / "a", [tmp_path / "a"])
    (tmp_path / "x.joined.json").write_text(json.dumps({"parts": []}))
    with pytest.raises(ConfigError, match="refers to no dataset"):
        IndexedReader(tmp_path / "x")
