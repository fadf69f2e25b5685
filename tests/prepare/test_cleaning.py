import itertools
import json

import numpy as np
import pytest

from igla_mega.config.errors import ConfigError
from igla_mega.data.indexed import IndexedReader
from igla_mega.prepare import formats
from igla_mega.prepare.filters import Filters, symbol_ratio
from igla_mega.prepare.manifest import read_manifest
from igla_mega.prepare.preprocess import Options, Settings, preprocess

NEAR = {"ngram": 5, "num_buckets": 14, "hashes_per_bucket": 8, "seed": 1}


def documents(prefix, tokenizer) -> list[str]:
    reader = IndexedReader(prefix)
    starts = reader.document_starts(0, reader.num_documents)
    return [tokenizer.decode(reader.tokens(a, b - 1)) for a, b in itertools.pairwise(starts)]


def cleaned(inputs, tmp_path, tokenizer, workers=2, **options):
    preprocess(
        inputs,
        tmp_path / "set",
        tokenizer,
        options=Options(**options),
        settings=Settings(progress=False, fast_path=False, workers=workers),
    )
    return documents(tmp_path / "set", tokenizer), read_manifest(tmp_path / "set")


def test_the_first_of_equal_documents_stays_across_files_and_blocks(write_jsonl, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "BLOCK_BYTES", 200)
    generator = np.random.default_rng(0)
    texts = [f"document {n}" for n in generator.integers(0, 60, 300)]
    files = [write_jsonl(tmp_path / f"{i}.jsonl", texts[i * 100 : i * 100 + 100]) for i in range(3)]
    found, manifest = cleaned(files, tmp_path, tokenizer, exact_duplicates=True)
    assert found == list(dict.fromkeys(texts))
    assert manifest["dropped"] == {"duplicate": 300 - len(found)}
    assert not (tmp_path / "set.duplicates").exists()


def test_of_nearly_equal_documents_one_stays(write_jsonl, tokenizer, tmp_path):
    pytest.importorskip("datatrove")
    generator = np.random.default_rng(1)
    letters = "abcdefghij"
    words = [a + b + c for a in letters for b in letters for c in letters]  # numbers are all alike to datatrove
    base = [" ".join(generator.choice(words, 120)) for _ in range(12)]
    near = [text + " and one more" for text in base[:5]]
    found, manifest = cleaned(
        [write_jsonl(tmp_path / "a.jsonl", [*base, *near])], tmp_path, tokenizer, near_duplicates=NEAR
    )
    assert len(found) == 12
    assert manifest["dropped"] == {"duplicate": 5}
    assert manifest["options"]["near_duplicates"] == NEAR
    assert {text.removesuffix(" and one more") for text in found} == set(base)


def test_filters_count_what_they_leave_out_and_tags_are_kept(tokenizer, tmp_path):
    records = [
        {"text": "a" * 5, "lang": "en"},
        {"text": "b" * 50, "lang": "en"},
        {"text": "c" * 500, "lang": "de"},
        {"text": "#$%&" * 10, "lang": "de"},
        {"text": "d" * 51},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    filters = Filters(min_characters=10, max_characters=400, max_symbol_ratio=0.5)
    found, manifest = cleaned([tmp_path / "a.jsonl"], tmp_path, tokenizer, filters=filters, language_key="lang")
    assert found == ["b" * 50, "d" * 51]
    assert manifest["dropped"] == {"symbols": 1, "too_long": 1, "too_short": 1}
    assert manifest["languages"] == {"en": 1, "unknown": 1}
    found, manifest = cleaned(
        [tmp_path / "a.jsonl"], tmp_path, tokenizer, filters=Filters(languages=("de",)), language_key="lang"
    )
    assert len(found) == 2
    assert manifest["dropped"] == {"language": 3}


def test_a_dry_run_counts_and_writes_nothing(write_jsonl, tokenizer, tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", ["one", "two", "one", ""])
    before = set(tmp_path.iterdir())
    options = Options(exact_duplicates=True)
    counts = preprocess(
        [file], tmp_path / "out" / "set", tokenizer, options=options, settings=Settings(progress=False, dry_run=True)
    )
    assert (counts.documents, counts.empty, counts.dropped) == (2, 1, {"duplicate": 1})
    assert set(tmp_path.iterdir()) == before


def test_filters_that_leave_nothing_say_so(write_jsonl, tokenizer, tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    with pytest.raises(ConfigError, match=r"the filters drop every document \(2 too_short\)"):
        cleaned([file], tmp_path, tokenizer, filters=Filters(min_characters=10))


def test_the_share_of_symbols_counts_neither_spaces_nor_letters_of_any_script():
    assert symbol_ratio("ab cd") == 0
    assert symbol_ratio("日本 äö 12") == 0
    assert symbol_ratio("a # $ %") == 0.75
    assert symbol_ratio("  ") == 0
