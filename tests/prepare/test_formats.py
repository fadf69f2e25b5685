import bz2
import gzip
import itertools
import json
import lzma

import numpy as np
import pytest

from igla_mega.config.errors import ConfigError
from igla_mega.data.indexed import IndexedReader
from igla_mega.data.raw_files import LINES
from igla_mega.prepare import formats, giant
from igla_mega.prepare.formats import Block, How, Input, Position, blocks_of, line_start, share, whole
from igla_mega.prepare.preprocess import Options, Settings, preprocess
from igla_mega.prepare.raw import rows
from igla_mega.prepare.raw.inputs import input_files
from igla_mega.prepare.records import texts_of

zstandard = pytest.importorskip("zstandard")
pyarrow = pytest.importorskip("pyarrow")


def jsonl(texts) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


PACKERS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress}


def documents(prefix, tokenizer) -> list[str]:
    reader = IndexedReader(prefix)
    starts = reader.document_starts(0, reader.num_documents)
    return [tokenizer.decode(reader.tokens(a, b - 1)) for a, b in itertools.pairwise(starts)]


def prepared(inputs, tmp_path, tokenizer, name="set", **options):
    counts = preprocess(
        inputs,
        tmp_path / name,
        tokenizer,
        options=Options(**options),
        settings=Settings(progress=False, fast_path=False),
    )
    return counts, documents(tmp_path / name, tokenizer)


@pytest.mark.parametrize("packing", PACKERS)
def test_packed_files_hold_the_same_documents_in_one_member_or_several(packing, texts, tokenizer, tmp_path):
    half = len(texts) // 2
    pack = PACKERS[packing]
    (tmp_path / f"a.jsonl{packing}").write_bytes(pack(jsonl(texts)))
    (tmp_path / f"b.jsonl{packing}").write_bytes(pack(jsonl(texts[:half])) + pack(jsonl(texts[half:])))
    for name in "ab":
        assert prepared([tmp_path / f"{name}.jsonl{packing}"], tmp_path, tokenizer, name)[1] == texts


@pytest.mark.parametrize("packing", PACKERS)
def test_a_packed_file_cut_short_is_named_and_what_was_whole_is_kept_when_asked(packing, texts, tokenizer, tmp_path):
    packed = PACKERS[packing](jsonl(f"{i} {text}" for i, text in enumerate(texts * 8)))
    cut, sound = tmp_path / f"a.jsonl{packing}", tmp_path / "b.jsonl"
    cut.write_bytes(packed[: len(packed) * 2 // 3])
    sound.write_bytes(jsonl(["sound"]))
    with pytest.raises(ConfigError, match=r"a\.jsonl.*: truncated: the .* data ends before its end mark"):
        prepared([cut, sound], tmp_path, tokenizer)
    if packing == ".bz2":  # one block, of which nothing is whole
        with pytest.raises(
            ConfigError, match=r"a\.jsonl\.bz2: no text in any of its records \(1 broken; the first: trunc"
        ):
            prepared([cut, sound], tmp_path, tokenizer, on_error="quarantine")
        return
    counts, found = prepared([cut, sound], tmp_path, tokenizer, on_error="quarantine")
    assert found[-1] == "sound"
    assert found[:-1] == [f"{i} {text}" for i, text in enumerate(texts * 8)][: len(found) - 1]
    assert counts.broken == 1
    assert "truncated" in (tmp_path / "set.quarantine.jsonl").read_text()


def test_a_file_that_is_not_packed_as_its_name_says_is_named(tokenizer, tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(b'{"text": "a"}\n')
    with pytest.raises(ConfigError, match=r"a\.jsonl\.gz: damaged \.gz data"):
        prepared([tmp_path / "a.jsonl.gz"], tmp_path, tokenizer)


def write_parquet(path, columns, **options):
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def test_parquet_is_read_by_its_column_and_empty_rows_are_left_out(texts, tokenizer, tmp_path):
    column = [*texts, "", *texts]
    file = write_parquet(tmp_path / "a.parquet", {"n": range(len(column)), "text": column}, row_group_size=70)
    counts, found = prepared([file], tmp_path, tokenizer)
    assert found == texts + texts
    assert counts.empty == 1


def test_a_parquet_without_the_column_or_of_no_strings_is_refused(tokenizer, tmp_path):
    file = write_parquet(tmp_path / "a.parquet", {"body": ["a"], "n": [1]})
    with pytest.raises(ConfigError, match=r"a\.parquet: no column `text` \(its columns: body, n\)"):
        prepared([file], tmp_path, tokenizer)
    with pytest.raises(ConfigError, match="column `n` contains int64, not strings"):
        prepared([file], tmp_path, tokenizer, text_key="n")


def test_a_null_row_and_a_damaged_parquet_are_broken_records(tokenizer, tmp_path):
    file = write_parquet(tmp_path / "a.parquet", {"text": ["one", None, "two"]})
    with pytest.raises(ConfigError, match=r"a\.parquet: row 2: the text is null"):
        prepared([file], tmp_path, tokenizer)
    assert prepared([file], tmp_path, tokenizer, on_error="skip")[1] == ["one", "two"]
    cut = tmp_path / "b.parquet"
    cut.write_bytes(file.read_bytes()[:-6])
    with pytest.raises(
        ConfigError, match=r"b\.parquet: no text in any of its records \(1 broken; the first: not a Parq"
    ):
        prepared([file, cut], tmp_path, tokenizer, name="cut", on_error="skip")


def test_plain_text_is_a_document_a_file_or_a_line(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"four\r\nfive"))
    inputs = [tmp_path / "a.txt", tmp_path / "b.txt.gz"]
    assert prepared(inputs, tmp_path, tokenizer, "f")[1] == ["one\ntwo\n\nthree", "four\r\nfive"]
    by_line = prepared(inputs, tmp_path, tokenizer, "l", text_documents="line")[1]
    assert by_line == ["one", "two", "three", "four", "five"]


def test_texts_and_lines_of_many_blocks_are_read_like_short_ones(texts, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "BLOCK_BYTES", 100)
    (tmp_path / "a.txt").write_text("short\n" + " ".join(texts[:40]) + "\nshort")
    (tmp_path / "b.jsonl").write_bytes(jsonl(["short", " ".join(texts[:40]), "short"]))
    whole_file = (tmp_path / "a.txt").read_text()
    assert prepared([tmp_path / "a.txt"], tmp_path, tokenizer, "f")[1] == [whole_file]
    expected = whole_file.split("\n")
    assert prepared([tmp_path / "a.txt"], tmp_path, tokenizer, "l", text_documents="line")[1] == [
        line for line in expected if line
    ]
    assert prepared([tmp_path / "b.jsonl"], tmp_path, tokenizer, "j")[1] == ["short", " ".join(texts[:40]), "short"]


def test_a_folder_is_read_through_with_all_formats(tokenizer, tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "b.txt").write_text("b")
    (tmp_path / "in" / "deep" / "c.jsonl.gz").write_bytes(gzip.compress(jsonl(["c"])))
    (tmp_path / "in" / "readme.md").write_text("no")
    write_parquet(tmp_path / "in" / "a.parquet", {"text": ["a"]})
    assert [file.name for file in input_files([tmp_path / "in"])] == ["a.parquet", "b.txt", "c.jsonl.gz"]
    assert prepared([tmp_path / "in"], tmp_path, tokenizer)[1] == ["a", "b", "c"]


def test_null_bytes_are_text_when_escaped_and_broken_json_when_not(tokenizer, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "a\\u0000b"}\n{"text": "a\x00b"}\n' + bytes(50) + b"\n")
    counts, found = prepared([file], tmp_path, tokenizer, on_error="skip")
    assert (counts.broken, found) == (2, ["a\0b"])


def test_quarantined_records_are_kept_with_their_place_and_reason(tokenizer, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "one"}\n{"txt": "two"}\n')
    prepared([file], tmp_path, tokenizer, on_error="quarantine")
    (line,) = (tmp_path / "set.quarantine.jsonl").read_text().splitlines()
    reason = "no key `text` (its keys: 'txt')"
    assert json.loads(line) == {"place": f"{file}:2", "reason": reason, "record": '{"txt": "two"}'}


def test_a_document_of_one_token_stays(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["a"]))
    assert prepared([tmp_path / "a.jsonl"], tmp_path, tokenizer)[0].tokens == 2


def test_reading_goes_on_at_any_block_as_if_it_had_not_stopped(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "BLOCK_BYTES", 700)
    monkeypatch.setattr(formats, "_PACKED_CHUNK", 97)
    monkeypatch.setattr(rows, "_ROWS_AT_ONCE", 7)
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(jsonl(texts)))
    (tmp_path / "c.txt").write_text("\n".join(texts))
    inputs = [tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz", tmp_path / "c.txt"]
    inputs.append(write_parquet(tmp_path / "d.parquet", {"text": texts}, row_group_size=90))
    for how in (How(), How(text_documents="line")):
        unbroken = list(blocks_of(whole(inputs), how))
        assert len(unbroken) > 40
        for i in range(0, len(unbroken) - 1, 3):
            again = list(blocks_of(whole(inputs), how, unbroken[i].after))
            assert again == unbroken[i + 1 :], (how, i)
    total = sum(block.input_bytes for block in unbroken)
    assert total == sum(file.stat().st_size for file in inputs)


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_parts_read_every_line_once_and_in_order(parts, texts, tmp_path, write_jsonl):
    files = [write_jsonl(tmp_path / f"{i}.jsonl", texts[i * 50 : i * 50 + 50]) for i in range(6)]
    (tmp_path / "z.jsonl.gz").write_bytes(gzip.compress(jsonl(["packed"])))
    files.append(tmp_path / "z.jsonl.gz")
    found = []
    for part in range(parts):
        for block in blocks_of(share(files, part, parts), How()):
            found += texts_of(block, "text").texts
    assert found == [*texts, "packed"]


def test_a_line_s_start_is_found_across_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "BLOCK_BYTES", 2)
    (tmp_path / "a").write_bytes(b"12345\n78\n")
    assert [line_start(tmp_path / "a", offset, 9) for offset in (0, 1, 5, 6, 7, 9)] == [0, 6, 6, 6, 9, 9]


TEXTS = ["plain " * 50_000, 'quote " slash \\ newline \n tab \t nul \0', "äöü 日本語 🐇 " * 30_000, "\\" * 5000]


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("text", TEXTS, ids=["plain", "escapes", "unicode", "slashes"])
def test_a_giant_document_is_read_in_pieces_that_are_its_text(text, ascii_only, monkeypatch):
    monkeypatch.setattr(giant, "LEAST_BYTES", 1)
    monkeypatch.setattr(giant, "_PIECE_BYTES", 1001)
    record = {"meta": {"text": "no", "k": ["text", 1]}, "text": text, "more": 'text": "x'}
    line = bytearray(json.dumps(record, ensure_ascii=ascii_only).encode())
    found = giant.long_text(Block(LINES, "f", 1, line, Position(0, 0, 0), 0), "text")
    assert found is not None
    assert "".join(found.pieces()) == text


@pytest.mark.parametrize(
    "line", [b'{"text": 5, "a": "b"}', b'{"text": "a", "text": "b"}', b'{"t": "a"}', b'{"text": "a"', b"{}\n{}"]
)
def test_what_is_no_plain_giant_is_left_to_the_ordinary_reader(line, monkeypatch):
    monkeypatch.setattr(giant, "LEAST_BYTES", 1)
    assert giant.long_text(Block(LINES, "f", 1, line, Position(0, 0, 0), 0), "text") is None


@pytest.mark.parametrize("fast_path", [True, False])
def test_a_giant_document_gives_the_tokens_of_the_whole(fast_path, texts, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(giant, "LEAST_BYTES", 10_000)
    monkeypatch.setattr("igla_mega.prepare.fast.PIECE_CHARS", 3000)
    text = " ".join(texts)
    (tmp_path / "a.jsonl").write_bytes(jsonl(["before", text, "behind"]))
    monkeypatch.setattr(formats, "BLOCK_BYTES", 1000)
    preprocess(
        [tmp_path / "a.jsonl"], tmp_path / "set", tokenizer, settings=Settings(fast_path=fast_path, progress=False)
    )
    reader = IndexedReader(tmp_path / "set")
    expected = np.array([*tokenizer.encode(text), tokenizer.eod_id])
    assert reader.num_documents == 3
    assert np.array_equal(reader.tokens(reader.document_start(1), reader.document_start(2)), expected)


def test_an_input_says_what_it_is():
    kinds = [Input(name, 1).kind for name in ("a.jsonl", "a.txt.zst", "a.parquet", "a", "a.b.json.gz")]
    assert kinds == ["lines", "text", "rows", "lines", "lines"]


@pytest.mark.parametrize("unit", ["file", "line"])
def test_a_giant_text_loses_its_byte_order_mark_and_line_end_as_a_short_one_does(unit, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + "ä cat".encode() + b"\r\n" * (unit == "line"))
    (block,) = formats.blocks_of(formats.whole([tmp_path / "a.txt"]), formats.How(text_documents=unit))
    (short,) = texts_of(block, "text").texts
    monkeypatch.setattr(giant, "LEAST_BYTES", 1)
    found = giant.long_text(block, "text")
    assert found is not None and "".join(found.pieces()) == short == "ä cat"
