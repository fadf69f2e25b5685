import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from igla_mega.data.indexed import IndexedReader
from igla_mega.data.tokenizer import load_tokenizer
from igla_mega.prepare import fast
from igla_mega.prepare.fast import FastTokenizer, difference, open_fast, pieces, probes
from igla_mega.prepare.preprocess import Settings, preprocess

pytest.importorskip("gigatoken")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def sentence_piece(tmp_path_factory, texts) -> Path:
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("sp")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in texts for line in text.split("\n")]),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Path:
    """A file of tiktoken ranks of the 256 bytes and some pairs, with what tiktoken must know of it."""
    import base64

    pytest.importorskip("tiktoken")
    tokens = [bytes([b]) for b in range(256)] + [b"th", b"the", b"in", b"ing", b" t", b"an"]
    file = tmp_path_factory.mktemp("tt") / "small.tiktoken"
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)]
    file.write_text("\n".join(lines) + "\n")
    about = {"pat_str": r"\p{L}+|\s+|\S", "special_tokens": {"<|endoftext|>": 300}}
    file.with_suffix(".json").write_text(json.dumps(about))
    return file


def changed(tokenizer, folder: Path, change) -> str:
    """A copy of a tokenizer's folder with another tokenizer.json."""
    described = json.loads(tokenizer.file.read_text())
    change(described)
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(described))
    (folder / "tokenizer_config.json").write_text((tokenizer.file.parent / "tokenizer_config.json").read_text())
    return str(folder)


def test_the_fast_path_is_used_where_it_gives_the_same_ids(tokenizer, texts):
    engine, why = open_fast(tokenizer, texts)
    assert engine is not None, why
    ids, lengths = engine.encode_flat(texts)
    expected = tokenizer.encode_batch(texts)
    assert lengths.tolist() == [len(e) for e in expected]
    assert ids.tolist() == [i for e in expected for i in e]


def test_the_sample_holds_special_tokens_normal_forms_and_every_category(tokenizer):
    found = probes(tokenizer)
    assert any(text.startswith("a<|endoftext|>") for text in found)
    assert "e\u0301 é ﬁ Å Å ㎏ ǅ" in found
    import unicodedata

    categories = {unicodedata.category(c) for text in found for c in text}
    assert {
        "Lu",
        "Ll",
        "Lt",
        "Lm",
        "Lo",
        "Mn",
        "Mc",
        "Me",
        "Nd",
        "Nl",
        "No",
        "Cc",
        "Cf",
        "Co",
        "Zs",
        "Zl",
        "Zp",
    } <= categories


class Wrong(FastTokenizer):
    def encode_flat(self, texts):
        ids, lengths = super().encode_flat(texts)
        return ids + np.uint32(len(texts) > 3 and "unusual" in texts[-1]), lengths


def test_ids_that_differ_on_the_input_alone_lead_to_the_reference(jsonl, tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fast, "FastTokenizer", Wrong)
    assert open_fast(tokenizer, ["fine"])[0] is not None
    engine, why = open_fast(tokenizer, ["fine", "unusual"])
    assert engine is None
    assert "ids differ from the reference's on" in why
    file = tmp_path / "a.jsonl"
    file.write_bytes(jsonl.read_bytes() + b'{"text": "unusual"}\n')
    preprocess([file], tmp_path / "set", tokenizer)
    assert "using the reference tokenizer: gigatoken's ids differ" in capsys.readouterr().err
    reader = IndexedReader(tmp_path / "set")
    last = reader.tokens(reader.document_start(300), reader.num_tokens).tolist()
    assert last == [*tokenizer.encode("unusual"), tokenizer.eod_id]


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(normalizer={"type": "NFKC"}),
        lambda d: d.update(normalizer={"type": "Lowercase"}),
        lambda d: d.update(pre_tokenizer={"type": "Whitespace"}),
        lambda d: d["added_tokens"].append(
            {"id": 320, "content": "Kaninchen", "single_word": True, "lstrip": True, "rstrip": True}
            | {"normalized": True, "special": False}
        ),
    ],
    ids=["nfkc", "lowercase", "whitespace", "added"],
)
def test_whatever_the_tokenizer_the_dataset_is_the_reference_s(change, tokenizer, jsonl, texts, tmp_path):
    odd = load_tokenizer(changed(tokenizer, tmp_path / "odd", change))
    preprocess([jsonl], tmp_path / "set", odd, settings=Settings(progress=False))
    reader = IndexedReader(tmp_path / "set")
    expected = [i for text in texts for i in [*odd.encode(text), odd.eod_id]]
    assert reader.tokens(0, reader.num_tokens).tolist() == expected


def test_without_gigatoken_the_reference_is_used_and_that_is_said(tokenizer, monkeypatch):
    monkeypatch.setattr(fast, "version", lambda library: None)
    engine, why = open_fast(tokenizer, [])
    assert engine is None
    assert "not installed" in why


def test_pieces_of_a_long_text_give_the_ids_of_the_whole(tokenizer, texts, monkeypatch):
    monkeypatch.setattr(fast, "PIECE_CHARS", 500)
    text = " ".join(texts)
    cut = list(pieces(iter([text[i : i + 333] for i in range(0, len(text), 333)]), tokenizer))
    assert "".join(cut) == text
    assert len(cut) > 20
    assert [i for piece in cut for i in tokenizer.encode(piece)] == tokenizer.encode(text)


class MarksTheBegin:
    """A tokenizer whose ids depend on where a text begins."""

    def encode_flat(self, texts):
        ids = np.concatenate([np.array([0, *text.encode()], np.uint32) for text in texts])
        return ids, np.array([len(text.encode()) + 1 for text in texts])


def test_a_tokenizer_that_marks_the_begin_of_a_text_is_given_it_whole(monkeypatch):
    monkeypatch.setattr(fast, "PIECE_CHARS", 500)
    text = "word " * 1000
    assert list(pieces(iter([text]), MarksTheBegin())) == [text]


def test_a_sentencepiece_model_is_read_alone_and_in_its_folder(sentence_piece, texts):
    import sentencepiece

    engine = sentencepiece.SentencePieceProcessor(model_file=str(sentence_piece))
    for path in (sentence_piece, sentence_piece.parent):
        tokenizer = load_tokenizer(path)
        assert tokenizer.eod_id == engine.eos_id()
        assert tokenizer.vocab_size == engine.get_piece_size()
        assert tokenizer.encode_batch(texts[:20]) == engine.encode(texts[:20])
        assert tokenizer.decode(tokenizer.encode(texts[1])) == engine.decode(engine.encode(texts[1]))


def test_gigatoken_is_not_trusted_with_special_tokens_that_sentencepiece_reads_as_text(sentence_piece):
    tokenizer = load_tokenizer(sentence_piece)
    engine, why = open_fast(tokenizer, [])
    assert engine is None
    assert "differ" in why


def test_tiktoken_ranks_are_read_with_the_description_beside_them(ranks, tmp_path):
    tokenizer = load_tokenizer(ranks)
    assert tokenizer.encode("the thing") == [257, 32, 256, 259]
    assert (tokenizer.eod_id, tokenizer.vocab_size) == (300, 301)
    assert tokenizer.decode([257, 300], skip_special_tokens=True) == "the"
    alone = tmp_path / "unknown.tiktoken"
    alone.write_bytes(ranks.read_bytes())
    from igla_mega.config.errors import ConfigError

    with pytest.raises(ConfigError, match="tiktoken has no encoding unknown"):
        load_tokenizer(alone)
    (tmp_path / "cl100k_base.tiktoken").write_bytes(ranks.read_bytes())
    assert load_tokenizer(tmp_path / "cl100k_base.tiktoken").eod_id == 100257
    (tmp_path / "tokenizer.model").write_bytes(ranks.read_bytes())
    with pytest.raises(ConfigError, match="ranks alone"):
        load_tokenizer(tmp_path / "tokenizer.model")


def test_a_folder_of_an_older_class_is_converted(tokenizer, texts, tmp_path):
    pytest.importorskip("transformers")
    model = json.loads(tokenizer.file.read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"])
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + merges + "\n")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"})
    )
    converted = load_tokenizer(tmp_path)
    assert converted.encode_batch(texts[:30]) == tokenizer.encode_batch(texts[:30])


def test_ids_above_uint16_are_written_in_four_bytes(jsonl, texts, tokenizer, tmp_path):
    def high(described):
        last = max(described["model"]["vocab"].values())
        described["added_tokens"].append(
            {"id": last + 1, "content": "Kaninchen", "single_word": False, "lstrip": False, "rstrip": False}
            | {"normalized": False, "special": False}
        )
        for number in range(70_000 - last - 1):
            described["model"]["vocab"][f"unused{number}"] = last + 2 + number

    large = load_tokenizer(changed(tokenizer, tmp_path / "large", high))
    assert large.vocab_size > 65_536
    preprocess([jsonl], tmp_path / "set", large, settings=Settings(progress=False))
    reader = IndexedReader(tmp_path / "set")
    assert reader.dtype == np.int32
    expected = [i for text in texts for i in [*large.encode(text), large.eod_id]]
    assert reader.tokens(0, reader.num_tokens).tolist() == expected


def peak_mib(inputs: list[Path], prefix: Path, tokenizer: str) -> float:
    # The peak that the system reports to a parent begins with the parent's own.
    code = (
        "import atexit, pathlib, runpy, sys; sys.argv = sys.argv[1:]; atexit.register(lambda: print("
        "pathlib.Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])); "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    tool = str(ROOT / "tools" / "preprocess_data.py")
    words = [sys.executable, "-c", code, tool, "--input", *map(str, inputs), "--output-prefix", str(prefix)]
    words += ["--tokenizer-model", tokenizer, "--append-eod", "--workers", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return int(done.stdout) / 1024


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus_and_but_with_a_giant_document(jsonl, tokenizer, tmp_path):
    line = jsonl.read_bytes()
    small, large, giant = (tmp_path / f"{name}.jsonl" for name in ("small", "large", "giant"))
    small.write_bytes(line * 60)
    large.write_bytes(line * 600)
    text = "A document that does not end. " * 3_000_000
    giant.write_text(json.dumps({"text": text}) + "\n")
    peaks = [peak_mib([file], tmp_path / file.stem, tokenizer.path) for file in (small, large)]
    assert max(peaks) < 256
    assert peaks[1] < peaks[0] + 40
    assert peak_mib([giant], tmp_path / "giant", tokenizer.path) < 256 + 1.25 * giant.stat().st_size / 2**20


def test_nothing_of_torch_is_imported_on_the_way(jsonl, tokenizer, tmp_path):
    code = (
        "import sys; from igla_mega.prepare.preprocess import Settings, preprocess; "
        "from igla_mega.data.tokenizer import load_tokenizer; "
        f"preprocess([{str(jsonl)!r}], {str(tmp_path / 'set')!r}, load_tokenizer({tokenizer.path!r}), "
        "settings=Settings(progress=False)); "
        "print({'torch', 'megatron', 'transformers', 'datatrove', 'pandas'} & set(sys.modules))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.check_output([sys.executable, "-c", code], env=environment, text=True).strip() == "set()"


def test_the_comparison_finds_the_text_that_differs(tokenizer):
    class Off(FastTokenizer):
        def encode_flat(self, texts):
            ids, lengths = super().encode_flat(texts)
            ids = ids.copy()
            ids[int(lengths[:2].sum())] += 1
            return ids, lengths

    assert difference(tokenizer, Off(tokenizer), ["a", "b", "c", "d"]) == "c"
    assert isinstance(tokenizer.engine, tokenizers.Tokenizer)
