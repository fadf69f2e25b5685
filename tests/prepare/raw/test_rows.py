"""Parquet and Arrow: every type of text column, both formats of Arrow, resuming, damage; and lists of sentences."""

import itertools
import json

import numpy as np
import pytest

from igla_mega.config.errors import ConfigError
from igla_mega.data.indexed import IndexedReader
from igla_mega.prepare import formats
from igla_mega.prepare.formats import How, Position, blocks_of, whole
from igla_mega.prepare.preprocess import Options, Settings, preprocess
from igla_mega.prepare.raw import rows, unpacking
from igla_mega.prepare.raw.unpacking import Damaged

pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.parquet")
TEXTS = ["one", "zwei äöü", "", "three"]
PARTS = [["one.", " two."], ["drei äöü"], [], ["", "four"]]
TYPES = ["string", "large_string", "string_view", "binary", "large_binary", "binary_view"]


def write(path, table):
    from pyarrow import feather, ipc, parquet

    if path.suffix == ".parquet":
        parquet.write_table(table, path)
    elif path.suffix == ".feather":
        feather.write_feather(table, path)
    else:
        with (ipc.new_file if path.stem == "file" else ipc.new_stream)(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    return path


def column(kind):
    """Return a column of TEXTS, or of PARTS for a type of lists, and its rows as texts."""
    made = {
        "dictionary": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
        "list": pyarrow.list_(pyarrow.string()),
        "large_list": pyarrow.large_list(pyarrow.large_string()),
        "list_of_binary": pyarrow.list_(pyarrow.binary()),
    }
    is_list = "list" in kind
    values = PARTS if is_list else TEXTS
    if "binary" in kind:
        values = [[p.encode() for p in v] if is_list else v.encode() for v in values]
    if kind == "dictionary":
        return pyarrow.array(values).dictionary_encode(), TEXTS
    return pyarrow.array(values, made.get(kind) or getattr(pyarrow, kind)()), list(
        map("".join, PARTS)
    ) if is_list else TEXTS


def prepared(path, tokenizer, name="set", **options):
    prefix = path.parent / name
    preprocess(
        [path], prefix, tokenizer, options=Options(**options), settings=Settings(progress=False, fast_path=False)
    )
    reader = IndexedReader(prefix)
    starts = reader.document_starts(0, reader.num_documents)
    return [reader.tokens(a, b).tolist() for a, b in itertools.pairwise(starts)]


@pytest.mark.parametrize("kind", [*TYPES, "dictionary", "list", "large_list", "list_of_binary"])
@pytest.mark.parametrize("file", ["a.parquet", "stream.arrow", "file.arrow", "a.feather"])
def test_a_column_of_text_is_read_whatever_its_type(kind, file, tokenizer, tmp_path):
    values, texts = column(kind)
    table = pyarrow.table({"n": list(range(len(texts))), "text": values})
    try:
        write(tmp_path / file, table)
    except (pyarrow.ArrowException, ValueError) as error:
        pytest.skip(f"this pyarrow does not write it: {error}")
    found = [tokenizer.decode(ids[:-1]) for ids in prepared(tmp_path / file, tokenizer)]
    assert found == [text for text in texts if text]


@pytest.mark.parametrize("kind", ["int64", "float32", "bool_", "null", "date32"])
def test_a_column_of_anything_else_is_refused(kind, tokenizer, tmp_path):
    values = pyarrow.array([None, None], getattr(pyarrow, kind)())
    for file in ("a.parquet", "stream.arrow"):
        write(tmp_path / file, pyarrow.table({"text": values}))
        with pytest.raises(ConfigError, match="not strings"):
            prepared(tmp_path / file, tokenizer)
        with pytest.raises(ConfigError, match="no column `body`"):
            prepared(tmp_path / file, tokenizer, text_key="body")


@pytest.mark.parametrize("file", ["a.parquet", "stream.arrow", "file.arrow"])
def test_reading_goes_on_after_any_block_with_the_same_blocks(file, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "BLOCK_BYTES", 2000)
    monkeypatch.setattr(rows, "_ROWS_AT_ONCE", 2)
    table = pyarrow.table({"text": [f"row {i} " + "x" * 300 for i in range(40)], "lang": ["en"] * 40})
    given = whole([write(tmp_path / file, table)])
    how = How("text", "file", "lang")
    blocks = list(blocks_of(given, how))
    assert len(blocks) > 3 and [row for b in blocks for row in b.data] == [tuple(r.values()) for r in table.to_pylist()]
    assert sum(b.input_bytes for b in blocks) == given[0].size
    for number, block in enumerate(blocks):
        again = list(blocks_of(given, how, Position(*block.after)))
        assert [(b.first, b.data, b.after) for b in again] == [(b.first, b.data, b.after) for b in blocks[number + 1 :]]


@pytest.mark.parametrize("file", ["a.parquet", "stream.arrow", "file.arrow"])
def test_without_a_key_whole_rows_are_read(file, tmp_path):
    held = [{"prompt": "a", "turns": [{"role": "user", "content": "b"}]}, {"prompt": "c", "turns": []}]
    path = write(tmp_path / file, pyarrow.Table.from_pylist(held))
    found = list(rows.read_rows(str(path), path.stat().st_size, None, None, 0))
    assert [row for batch in found for row, _ in batch.rows] == held
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["b", "b"])
    with pytest.raises(ConfigError, match="several columns of one name"):
        list(rows.read_rows(str(write(tmp_path / file, twice)), 1, None, None, 0))


def read(path, content: bytes):
    path.write_bytes(content)
    return [row for batch in rows.read_rows(str(path), len(content), "text", None, 0) for row in batch.rows]


@pytest.mark.parametrize("file", ["stream.arrow", "file.arrow"])
def test_a_damaged_arrow_file_is_told_wherever_it_is_cut_and_changed_bytes_end_in_an_error_or_rows(file, tmp_path):
    path = write(tmp_path / file, pyarrow.table({"text": [f"row {i}" for i in range(7)]}))
    good, draw = path.read_bytes(), np.random.default_rng(0)
    assert len(read(path, good)) == 7
    for cut in {*range(0, len(good), 13), *range(len(good) - 20, len(good))}:
        with pytest.raises(Damaged, match=r"not an Arrow file, or truncated|damaged Arrow data"):
            read(path, good[:cut])
    for more in (good, b"x"):
        if file == "stream.arrow":
            with pytest.raises(Damaged, match="its stream does not end where the file ends"):
                read(path, good + more)
    for place in draw.integers(0, len(good) - 4, 100):
        try:
            read(path, good[:place] + draw.bytes(4) + good[place + 4 :])
        except (Damaged, ConfigError):
            continue


def test_a_list_of_sentences_is_encoded_as_megatron_s_tool_does(tokenizer, tmp_path):
    lines = [{"text": parts} for parts in [*PARTS, ["a", "", " b"]]] + [{"text": "plain"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    # Its tool encodes each sentence by itself, joins the ids, and appends one end token to the document.
    expected = []
    for line in lines:
        sentences = line["text"] if isinstance(line["text"], list) else [line["text"]]
        ids = [one for sentence in sentences for one in tokenizer.encode(sentence)]
        expected += [[*ids, tokenizer.eod_id]] if ids else []
    assert prepared(tmp_path / "a.jsonl", tokenizer) == expected
    assert prepared(tmp_path / "a.jsonl", tokenizer, "clean", exact_duplicates=True) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (["a", 1], "a JSON array with a number, not of strings"),
        (["a", None], "a JSON array with a null, not of strings"),
        ([["a"]], "a JSON array with a array, not of strings"),
        ({"a": 1}, "a JSON object, not a string"),
        (["a\ud83d", "\ude00"], "half of a surrogate pair"),
    ],
)
def test_a_list_of_anything_else_is_a_broken_record(text, said, tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}) + "\n")
    with pytest.raises(ConfigError, match=said):
        prepared(tmp_path / "a.jsonl", tokenizer)


@pytest.mark.parametrize("key", ["text", None])
@pytest.mark.parametrize("kind", ["one", "last", "shared"])
def test_a_row_packed_too_densely_is_refused_and_repeated_rows_are_read(kind, key, tmp_path, monkeypatch):
    for module in (rows, unpacking):
        monkeypatch.setattr(module, "MAX_DENSE_BYTES", 1 << 20)
    bomb = "0" * (1 << 21)
    texts = {"one": ["a", bomb], "last": ["a"] * 5000 + [bomb], "shared": [bomb] * 20}[kind]
    repeated = ["the cat sat on the mat " * 9] * 9000
    for name, held in (("bomb", texts), ("repeated", repeated)):
        table = pyarrow.table({"text": held})
        dictionary = kind == "shared"
        pyarrow.parquet.write_table(table, tmp_path / name, compression="zstd", use_dictionary=dictionary)
        (tmp_path / name).rename(tmp_path / f"{name}.parquet")

    def read_all(name):
        path = tmp_path / f"{name}.parquet"
        return sum(len(batch.rows) for batch in rows.read_rows(str(path), path.stat().st_size, key, None, 0))

    with pytest.raises(Damaged, match="a decompression bomb"):
        read_all("bomb")
    assert read_all("repeated") == 9000


@pytest.mark.parametrize("key", ["text", None])
def test_a_row_of_arrow_packed_too_densely_is_refused(key, tmp_path, monkeypatch):
    from pyarrow import feather

    monkeypatch.setattr(unpacking, "MAX_DENSE_BYTES", 1 << 20)
    path = tmp_path / "bomb.feather"
    feather.write_feather(pyarrow.table({"text": ["a", "0" * (1 << 21)]}), path, compression="zstd")
    with pytest.raises(Damaged, match="a decompression bomb"):
        list(rows.read_rows(str(path), path.stat().st_size, key, None, 0))
