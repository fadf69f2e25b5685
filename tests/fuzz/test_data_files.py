"""Datasets, raw text and tokenizers that come from anybody."""

import bz2
import functools
import gzip
import hashlib
import itertools
import json
import lzma
import zlib
from pathlib import Path

import hostile
import numpy as np
import pytest
from hostile import altered, damaged, refused, scratch
from hypothesis import example, given
from hypothesis import strategies as st

from igla_mega.data import journal, raw_files
from igla_mega.data.indexed import HEADER, MAGIC, IndexedReader, IndexedWriter
from igla_mega.data.tokenizer import load_tokenizer, train_bpe
from igla_mega.data.tuning import chat, forms, limits, pairs
from igla_mega.prepare import formats, giant
from igla_mega.prepare.manifest import damage, index_entry, modified_inputs
from igla_mega.prepare.merge import merge
from igla_mega.prepare.raw import unpacking
from igla_mega.prepare.records import objects_of, texts_of
from igla_mega.prepare.state import State

LINES = [
    {"text": "The ring passes keys."},
    {"text": "äöü 🐇", "n": [1, {"a": None}]},
    {"text": ""},
    {"text": 'a\\"b\n'},
]
JSONL = b"".join(json.dumps(line).encode() + b"\n" for line in LINES)


@functools.cache
def dataset() -> tuple[bytes, bytes, dict]:
    """A good .bin, .idx and manifest."""
    prefix = scratch() / "good"
    with IndexedWriter(prefix, np.uint16) as writer:
        for document in ([1, 2, 3], [4], [], [5, 6, 7, 8, 9], [10, 11]):
            writer.add(np.array(document, np.uint16), np.array([len(document)]))
    counts = ("documents", "tokens", "characters", "text_bytes", "input_bytes", "empty", "broken")
    content = Path(f"{prefix}.bin").read_bytes()
    manifest = {
        "job": "0" * 64,
        "inputs": [{"file": "a.jsonl", "bytes": 3, "modified_ns": 5}],
        "tokenizer": {"path": "t", "digest": "1" * 64},
        "shards": [{"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}],
        "index": index_entry(f"{prefix}.idx"),
        **dict.fromkeys(counts, 5),
        "dropped": {"short": 1},
        "languages": {"en": 5},
    }
    return content, Path(f"{prefix}.idx").read_bytes(), manifest


def put(name: str, content: bytes) -> Path:
    path = scratch() / name
    path.write_bytes(content)
    return path


def read_all(prefix: Path) -> None:
    """Everything that a reader offers agrees with the bytes of its files."""
    reader = IndexedReader(prefix, vocab_size=70_000)
    raw = np.fromfile(f"{prefix}.bin", reader.dtype)
    assert reader.num_tokens == len(raw)
    starts = reader.document_starts(0, reader.num_documents)
    assert starts[0] >= 0 and starts[-1] == reader.num_tokens and (np.diff(starts) >= 0).all()
    for document, (start, stop) in enumerate(itertools.pairwise(starts)):
        assert np.array_equal(reader.tokens(int(start), int(stop)), raw[start:stop])
        if start < stop:
            assert reader.document_of(int(start)) >= document or (np.diff(starts) == 0).any()
    assert all(0 < inside < len(raw) for inside in reader.starts_within(0, len(raw)))


@given(damaged(dataset()[1]))
def test_a_damaged_index_is_refused_or_read_as_what_it_says(content):
    put("set.bin", dataset()[0])
    put("set.idx", content)
    refused(read_all, scratch() / "set")


@given(damaged(dataset()[0]), damaged(dataset()[1]))
def test_damaged_tokens_and_a_damaged_index_are_refused_together(tokens, index):
    put("set.bin", tokens)
    put("set.idx", index)
    refused(read_all, scratch() / "set")


def test_offsets_that_no_sample_looks_at_are_refused_when_they_are_used(tmp_path):
    with IndexedWriter(tmp_path / "set", np.uint16) as writer:
        writer.add(np.zeros(40_000, np.uint16), np.full(20_000, 2))
    index = bytearray((tmp_path / "set.idx").read_bytes())
    at = HEADER.size + 4 * 20_000 + 8 * 777
    index[at : at + 8] = (1 << 61).to_bytes(8, "little")
    (tmp_path / "set.idx").write_bytes(index)
    reader = IndexedReader(tmp_path / "set", 10)
    with pytest.raises(ValueError, match=r"offsets of documents 770 to 779 are not ascending"):
        reader.document_starts(770, 779)


@given(altered(dataset()[2]), st.booleans())
def test_an_altered_manifest_is_refused_or_names_what_differs(manifest, whole):
    put("set.bin", dataset()[0])
    put("set.idx", dataset()[1])
    put("set.manifest.json", json.dumps(manifest).encode(errors="surrogatepass"))
    prefix = scratch() / "set"
    found = refused(damage, prefix, whole=whole, tokenizer_digest="1" * 64)
    if found == []:
        assert manifest["shards"] == dataset()[2]["shards"] and manifest["index"] == dataset()[2]["index"]
    refused(modified_inputs, prefix)
    refused(merge, scratch() / "joined", [prefix, prefix], progress=False)


@given(damaged(json.dumps(dataset()[2]).encode()))
@example(b"[" * 100_000)
@example(b"{" * 100_000 + b"\xff")
@example(b"1" * 10_000)
def test_a_damaged_manifest_is_refused(content):
    put("set.manifest.json", content)
    refused(damage, scratch() / "set")


@given(altered({"parts": ["set", "other"]}) | damaged(b'{"parts": ["set"]}').map(lambda b: b))
def test_a_list_of_joined_datasets_is_refused_or_names_datasets(content):
    put("set.bin", dataset()[0])
    put("set.idx", dataset()[1])
    put("all.joined.json", content if isinstance(content, bytes) else json.dumps(content).encode())
    refused(IndexedReader, scratch() / "all")


SHARD = {
    **{"bytes": 4, "sha256": "a", "lengths_sha256": "b", "documents": 1, "tokens": 2, "characters": 3, "text_bytes": 3},
    **{"input_bytes": 9, "empty": 0, "broken": 0, "dropped": {}, "languages": {}, "digests": [""], "aside": 0},
    "position": [0, 9, 1, 9],
}


@given(st.lists(altered(SHARD) | damaged(b'{"documents": 1}'), max_size=3))
def test_a_journal_of_anybody_is_read_as_far_as_it_can_be_trusted(entries):
    lines = [b'{"job":"mine"}', *(e if isinstance(e, bytes) else json.dumps(e).encode() for e in entries)]
    path = put("a.journal", b"".join(b"%08x %s\n" % (zlib.crc32(line), line) for line in lines))
    for shard in journal.Journal(path, "mine").shards:
        if State.fits(shard, 1):
            state = State.restored(shard)
            assert formats.Position(*state.position) and state.documents + state.tokens >= 0
            assert bytes.fromhex(state.digests[0]) is not None


@given(damaged(JSONL))
@example(b'{"text": "a"}\n' + b"[" * 50_000 + b"\n")
@example(b'{"text": "\\ud800"}\n')
@example(b'{"text": "a", "n": ' + b"9" * 5000 + b"}\n")
def test_lines_give_the_texts_that_json_says_and_each_other_one_is_told(content):
    file = put("lines.jsonl", content)
    if not content:
        return
    expected, others = [], 0
    for line in content.split(b"\n"):
        try:
            text = json.loads(line.decode("utf-8-sig"))["text"]
            text.encode()
            expected.append(text)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            others += bool(line) and not line.isspace()
    read = [texts_of(block, "text") for block in formats.blocks_of(formats.whole([file]), formats.How())]
    assert [text for part in read for text in part.texts] == [text for text in expected if text]
    assert sum(len(part.broken) for part in read) == others


def _zstd(content: bytes) -> bytes:
    return pytest.importorskip("zstandard").compress(content)


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_packed_lines_are_read_as_plain_ones_or_their_damage_is_told(suffix):
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": _zstd}[suffix]

    @given(damaged(pack(JSONL) + pack(JSONL) + b"\0" * 20))
    def read(content):
        if not content:
            return
        file = put(f"lines.jsonl{suffix}", content)
        for block in formats.blocks_of(formats.whole([file]), formats.How()):
            texts_of(block, "text", "language")

    read()
    whole = put(f"whole.jsonl{suffix}", pack(JSONL * 9000) + pack(b"") + pack(JSONL) + b"\0" * 600)
    chunks = list(formats._Chunks(formats.whole([whole])[0], 0))
    assert b"".join(chunks) == JSONL * 9001 and max(map(len, chunks)) <= formats.BLOCK_BYTES


@functools.cache
def parquet() -> bytes:
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({"text": ["The ring.", None, "äöü" * 50, ""] * 40, "language": [1, 2, 3, 4] * 40})
    parquet.write_table(table, scratch() / "good.parquet", row_group_size=70)
    return (scratch() / "good.parquet").read_bytes()


@given(st.data())
def test_a_damaged_parquet_file_gives_rows_or_is_told(data):
    pytest.importorskip("pyarrow")
    file = put("rows.parquet", data.draw(damaged(parquet())) or b"x")

    def read():
        how = formats.How(language_key="language")
        return [texts_of(b, "text", "language") for b in formats.blocks_of(formats.whole([file]), how)]

    for part in refused(read) or ():
        assert all(isinstance(text, str) for text in part.texts)
        assert all(language is None or isinstance(language, str) for language in part.languages)


@given(st.text(max_size=200), st.booleans(), st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3))
@example("\\" * 70 + '"' * 40, True, {})
@example("🐇" * 60, True, {"text": "x"})
def test_a_giant_document_has_the_text_that_json_says(text, ascii_only, around):
    if any("\ud800" <= c <= "\udfff" for c in text + "".join(around) + "".join(around.values())):
        return
    line = json.dumps({**around, "text": text}, ensure_ascii=ascii_only).encode() + b"\n"
    block = formats.Block(raw_files.LINES, "f", 1, bytearray(line), formats.BEGIN, len(line))
    with pytest.MonkeyPatch.context() as patch:
        for name, size in (("LEAST_BYTES", 1), ("_PIECE_BYTES", 24), ("_RELEASE_BYTES", 50)):
            patch.setattr(giant, name, size)
        found = giant.long_text(block, "text")
        assert found is None or "".join(found.pieces()) == text


@functools.cache
def tokenizer():
    put("train.jsonl", JSONL * 20)
    return train_bpe([scratch() / "train.jsonl"], 300, scratch() / "tokenizer")


CONVERSATIONS = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"prompt": "a", "completion": "b"},
    {"instruction": "a", "input": "b", "output": "c", "system": "d"},
    {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
    {
        "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 1}],
        "tools": [{"function": {"name": "f", "parameters": {"properties": {"a": {}}}}}],
    },
    {
        "messages": [
            {"role": "user", "content": "a"},
            {
                "role": "assistant",
                "tool_calls": [{"function": {"name": "f", "arguments": {"a": [1, "b"]}}}],
                "train": True,
            },
            {"role": "tool", "content": "c", "name": "f"},
            {"role": "assistant", "content": "b", "reasoning_content": "d"},
        ]
    },
]
PAIRS = [
    {"prompt": "a", "chosen": "b", "rejected": "c"},
    {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
    {
        "prompt": "a",
        "chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        "rejected": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}],
    },
    {
        "prompt": [{"role": "user", "content": "a"}],
        "chosen": [{"role": "assistant", "content": "b"}],
        "rejected": [{"role": "assistant", "content": "c"}],
    },
]
TEXTS = [*hostile.ATOMS, "\ud800", "assistant", {"role": "assistant", "content": "\udfff"}]
RENDERS_ALL = (
    "{{ tools | tojson }}{% for m in messages %}{{ m['role'] ~ (m | tojson) ~ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


@given(st.sampled_from(CONVERSATIONS).flatmap(lambda c: altered(c, TEXTS)))
def test_an_altered_conversation_is_refused_or_tokenized(entry):
    if isinstance(entry, dict):
        conversation = refused(forms.conversation_of, entry, "f:1")
        put("all.jinja", RENDERS_ALL.encode())
        for given in ("plain", scratch() / "all.jinja") if conversation is not None else ():
            template = chat.load_template(scratch() / "tokenizer", given)
            sample = refused(chat.tokenize, conversation, tokenizer(), template, "f:1")
            assert sample is None or len(sample.tokens) == len(sample.targets)


@given(st.sampled_from(PAIRS).flatmap(lambda p: altered(p, TEXTS)))
def test_an_altered_preference_pair_is_refused_or_tokenized(entry):
    if not isinstance(entry, dict):
        return
    template = chat.load_template(scratch() / "tokenizer", "plain")
    pair = refused(pairs.pair_of, entry, tokenizer(), template, "f:1")
    if pair is not None:
        assert all(map(len, pair)) and pair.chosen.tolist() != pair.rejected.tolist()
        limits.limit_pair(pair, limits.Limits(64, 32, "cut"), limits.end_ids(tokenizer()), "f:1")


@given(damaged(b"".join(json.dumps(entry).encode() + b"\n" for entry in CONVERSATIONS)))
@example(b"[" * 100_000)
def test_damaged_lines_of_conversations_are_refused(content):
    file = put("sft.jsonl", content)
    refused(lambda: [forms.conversation_of(entry, place) for place, entry in objects_of([file])])


@given(st.data())
def test_an_altered_tokenizer_is_refused_or_gives_ids_below_its_size(data):
    good = json.loads((Path(tokenizer().file)).read_text())
    vocabulary = good["model"]["vocab"]
    good["model"]["vocab"] = dict(list(vocabulary.items())[:4])
    small = data.draw(altered(good))
    model = small.get("model") if isinstance(small, dict) else None
    if isinstance(model, dict) and model.get("vocab") == good["model"]["vocab"]:
        model["vocab"] = vocabulary
    (scratch() / "hf").mkdir(exist_ok=True)
    put("hf/tokenizer.json", json.dumps(small).encode())
    put("hf/tokenizer_config.json", json.dumps(data.draw(altered({"eos_token": {"content": "a"}}))).encode())
    found = refused(load_tokenizer, scratch() / "hf")
    if found is not None:
        assert found.eod_id is None or 0 <= found.eod_id < found.vocab_size <= 2**31


@functools.cache
def ranks() -> bytes:
    import base64

    return b"".join(b"%s %d\n" % (base64.b64encode(bytes([n])), n) for n in range(256))


@given(st.data())
def test_damaged_ranks_are_refused_or_encode_every_text(data):
    pytest.importorskip("tiktoken")
    put("own.tiktoken", data.draw(st.just(ranks()) | damaged(ranks())))
    about = data.draw(st.just(None) | altered({"pat_str": ".|\\n", "special_tokens": {"<|endoftext|>": 256}}))
    put("own.json", json.dumps(about or {"pat_str": "(?s:.)", "special_tokens": {}}).encode())
    found = refused(load_tokenizer, scratch() / "own.tiktoken")
    if found is not None and about is None:
        assert found.decode(found.encode("äöü 🐇")) == "äöü 🐇"


def test_ranks_are_those_of_the_file_as_it_is_now():
    pytest.importorskip("tiktoken")
    put("own.json", json.dumps({"pat_str": "(?s:.)"}).encode())
    put("own.tiktoken", ranks())
    assert load_tokenizer(scratch() / "own.tiktoken").encode("a") == [97]
    swapped = ranks().replace(b"YQ== 97", b"YQ== 98").replace(b"Yg== 98", b"Yg== 97")
    put("own.tiktoken", swapped)
    assert load_tokenizer(scratch() / "own.tiktoken").encode("a") == [98]


TEMPLATES = [
    "{{ cycler.__init__.__globals__.os.system('touch PWNED') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.append(1) }}{{ lipsum.__globals__ }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{{ f(n - 1) }}{{ f(n - 1) }}{% endmacro %}{{ f(900) }}",
    "{{ 'a' * 10 ** 10 }}",
    "{{ 10 ** 10 ** 10 }}",
    "{{ [0] * 10 ** 10 }}",
    "{{ '%10000000000d' % 1 }}",
    "{{ '{:10000000000}'.format(1) }}",
    "{{ 'a'.ljust(10000000000) }}",
    "{{ 'a' | center(10000000000) }}",
    "{% set ns = namespace(s='ab') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "{% set ns = namespace(s='ab') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "{% set ns = namespace(s='ab') %}{% for i in range(99) %}"
    "{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}{% endfor %}",
    "{{ 1 / 0 }}",
    "{{ messages[0]['role'] + 1 }}",
    "{% for " * 50,
    "{{ " + "(" * 5000,
    "{% if a %}" * 500 + "{% endif %}" * 500,
    "{% include '/etc/passwd' %}",
]


@pytest.mark.parametrize("source", TEMPLATES)
def test_a_hostile_chat_template_is_refused_in_bounded_time_and_memory(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.jinja").write_text(source)
    messages = CONVERSATIONS[0]["messages"]
    tokenizer()

    def render() -> str:
        template = chat.load_template(scratch() / "tokenizer", tmp_path / "t.jinja")
        return chat.tokenize(messages, tokenizer(), template, "f:1")

    assert hostile.within(500, render, seconds=10).startswith("ConfigError")
    assert not (tmp_path / "PWNED").exists()


def test_templates_that_people_use_mean_what_they_meant():
    template = (
        "{{ bos_token }}{% for m in messages if m.role != 'tool' %}{% if loop.first and not loop.last %}<{% endif %}"
        "{{ '<|' ~ m['role'] ~ '|>' + m['content'] | trim }}{{ loop.index0 }}/{{ loop.length }}"
        "{{ loop.cycle('x', 'y') }}"
        "{% endfor %}{{ messages | map(attribute='role') | join(',') }}{% set x = namespace(n=0) %}"
        "{% for k, v in messages[0].items() %}{% set x.n = x.n + v | length %}{% endfor %}{{ x.n }}"
        "{{ '%s-%d' % ('a', 3) }}{{ messages[1] | tojson }}{{ 'ab'.split('a')[1] }}{{ [1, 2] * 2 }}"
    )
    put("use.jinja", template.encode())
    tokenizer()
    found = chat.load_template(scratch() / "tokenizer", scratch() / "use.jinja")
    assert found.render(CONVERSATIONS[0]["messages"]) == (
        "<|endoftext|><<|user|>a0/2x<|assistant|>b1/2yuser,assistant5a-3"
        '{"role": "assistant", "content": "b"}b[1, 2, 1, 2]'
    )


def test_an_index_that_claims_exabytes_allocates_nothing():
    put("huge.bin", dataset()[0])
    put("huge.idx", HEADER.pack(MAGIC, 1, 8, 1 << 58, 1 << 58) + b"\0" * 100)
    assert "truncated or damaged" in hostile.within(50, lambda: IndexedReader(scratch() / "huge"))


def _bomb(suffix: str, size: int) -> bytes:
    """Lines of zeros as one packed member."""
    make = {".gz": lambda: zlib.compressobj(9, wbits=31), ".bz2": bz2.BZ2Compressor, ".xz": lzma.LZMACompressor}
    packer = (
        make[suffix]() if suffix in make else pytest.importorskip("zstandard").ZstdCompressor(level=3).compressobj()
    )
    piece = b"0" * ((1 << 24) - 1) + b"\n"
    return b"".join([*(packer.compress(piece) for _ in range(size >> 24)), packer.flush()])


@pytest.mark.parametrize(
    ("suffix", "size", "megabytes"),
    [(".gz", 1 << 27, 40), (".bz2", 1 << 26, 40), (".xz", 1 << 27, 80), (".zst", 1 << 28, 80)],
)
def test_a_bomb_of_packed_text_is_unpacked_in_bounded_memory(suffix, size, megabytes):
    file = put(f"bomb.jsonl{suffix}", _bomb(suffix, size))
    chunks = formats._Chunks(formats.whole([file])[0], 0)
    assert hostile.within(megabytes, lambda: sum(map(len, chunks))) == str(size)


def _one_line(suffix: str, size: int) -> bytes:
    """A JSON line of so many zeros as one packed member, after a short line."""
    make = {".gz": lambda: zlib.compressobj(9, wbits=31), ".bz2": bz2.BZ2Compressor, ".xz": lzma.LZMACompressor}
    packer = (
        make[suffix]() if suffix in make else pytest.importorskip("zstandard").ZstdCompressor(level=3).compressobj()
    )
    pieces = [b'{"text": "first"}\n{"text": "', *[b"0" * (1 << 24)] * (size >> 24), b'"}\n']
    return b"".join([*map(packer.compress, pieces), packer.flush()])


@pytest.mark.parametrize("name", ["line.jsonl", "lines.txt", "whole.txt"])
@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_a_record_packed_too_densely_is_damage_and_what_came_before_is_kept(suffix, name, monkeypatch):
    for bound, size in (("MAX_DENSE_BYTES", 1 << 22), ("MAX_EXPANSION", 50)):
        monkeypatch.setattr(unpacking, bound, size)
    file = put(f"{name}{suffix}", _one_line(suffix, 1 << 25))
    how = formats.How(text_documents="file" if name == "whole.txt" else "line")

    def read() -> str:
        found = [(texts_of(b, "text").texts, b.damage) for b in formats.blocks_of(formats.whole([file]), how)]
        return f"{[text[:20] for texts, _ in found for text in texts]} {found[-1][1]}"

    said = hostile.within(150, read)
    first = {"line.jsonl": "['first']", "lines.txt": """['{"text": "first"}']""", "whole.txt": "[]"}[name]
    assert said.startswith(first) and "a decompression bomb" in said, said
    if name == "line.jsonl":
        monkeypatch.setattr(unpacking, "MAX_DENSE_BYTES", 1 << 27)
        assert read() == "['first', '00000000000000000000'] None"


def test_a_packed_file_that_claims_gigabytes_of_window_is_told():
    zstandard = pytest.importorskip("zstandard")
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=31)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    file = put("window.jsonl.zst", packer.compress(JSONL) + packer.flush())
    blocks = hostile.within(200, lambda: [b.damage for b in formats.blocks_of(formats.whole([file]), formats.How())])
    assert "damaged .zst data" in blocks and "memory" in blocks
