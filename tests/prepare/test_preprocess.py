import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from igla_mega.config.errors import ConfigError
from igla_mega.config.schema import Recipe
from igla_mega.data.indexed import IndexedReader
from igla_mega.data.prepared import source_prefixes
from igla_mega.data.tokenizer import train_bpe
from igla_mega.layout.stages import drawn_data
from igla_mega.plan.resolve import resolve
from igla_mega.prepare import formats
from igla_mega.prepare.check import check_prepared
from igla_mega.prepare.preprocess import Options, Settings, preprocess
from igla_mega.prepare.raw.inputs import input_files
from igla_mega.prepare.sources import prepare_sources, unigram_entropy

TOOLS = Path(__file__).parents[2] / "tools"


def section(tmp_path, tokenizer, sources, **changes) -> SimpleNamespace:
    values = dict(tokenizer=tokenizer.path, prepared=str(tmp_path / "prepared"), text_key="text")
    return SimpleNamespace(sources=sources, skip_broken_lines=False, workers=1, **(values | changes))


def refusal(inputs, tmp_path, tokenizer, **settings) -> str:
    with pytest.raises(ConfigError) as raised:
        preprocess(inputs, tmp_path / "out" / "set", tokenizer, settings=Settings(progress=False, **settings))
    assert list((tmp_path / "out").glob("*")) == [], "something was left half-written"
    return str(raised.value)


def test_each_line_is_a_document_that_ends_with_the_end_of_document(jsonl, texts, tokenizer, tmp_path):
    counts = preprocess([jsonl], tmp_path / "set", tokenizer, settings=Settings(progress=False))
    reader = IndexedReader(tmp_path / "set", tokenizer.vocab_size)
    assert (counts.documents, counts.tokens) == (reader.num_documents, reader.num_tokens)
    assert reader.dtype == np.uint16
    for i in (0, 1, 150, 299):
        document = reader.tokens(reader.document_start(i), reader.document_start(i + 1)).tolist()
        assert document == [*tokenizer.encode(texts[i]), tokenizer.eod_id]


def test_without_append_eod_documents_are_the_texts_alone(jsonl, texts, tokenizer, tmp_path):
    preprocess(
        [jsonl], tmp_path / "set", tokenizer, options=Options(append_eod=False), settings=Settings(progress=False)
    )
    reader = IndexedReader(tmp_path / "set")
    assert reader.num_tokens == sum(map(len, tokenizer.encode_batch(texts)))


def test_the_output_does_not_depend_on_workers_or_blocks(jsonl, tokenizer, tmp_path, monkeypatch):
    preprocess([jsonl], tmp_path / "one", tokenizer, settings=Settings(workers=1, progress=False))
    monkeypatch.setattr(formats, "BLOCK_BYTES", 3000)
    preprocess([jsonl], tmp_path / "three", tokenizer, settings=Settings(workers=3, progress=False))
    preprocess([jsonl], tmp_path / "small", tokenizer, settings=Settings(workers=1, fast_path=False, progress=False))
    preprocess([jsonl], tmp_path / "processes", tokenizer, settings=Settings(workers=5, progress=False))
    for suffix in (".bin", ".idx"):
        expected = (tmp_path / f"one{suffix}").read_bytes()
        for name in ("three", "small", "processes"):
            assert (tmp_path / f"{name}{suffix}").read_bytes() == expected


def test_files_folders_and_patterns_are_read_in_order(tmp_path, write_jsonl):
    (tmp_path / "folder").mkdir()
    for name in ("b.jsonl", "a.jsonl", "folder/d.jsonl", "folder/c.jsonl"):
        write_jsonl(tmp_path / name, ["x"])
    names = [str(tmp_path / "folder"), str(tmp_path / "*.jsonl")]
    assert [file.name for file in input_files(names)] == ["c.jsonl", "d.jsonl", "a.jsonl", "b.jsonl"]


BROKEN_LINES = [
    (b'{"text": "a', r"not JSON \(Unterminated string"),
    (b'{"text": "\xff"}', r"not UTF-8 \(byte 0xff at column 11\)"),
    (b'{"body": "a"}', r"no key `text` \(its keys: 'body'\)"),
    (b'{"text": 5}', "`text` is a JSON number, not a string"),
    (b'{"text": null}', "`text` is a JSON null, not a string"),
    (b'["a"]', "a JSON array, not an object"),
    (b'{"text": "\\ud800"}', "`text` has half of a surrogate pair"),
    (b'{"text": ' + b"[" * 100_000, "JSON nested too deeply"),
]


@pytest.mark.parametrize(("line", "words"), BROKEN_LINES, ids=[words for _, words in BROKEN_LINES])
def test_a_broken_line_is_named_and_skipped_only_when_asked_for(line, words, tokenizer, tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_bytes(b'{"text": "one"}\n\n' + line + b'\n{"text": "two"}\n')
    message = refusal([file], tmp_path, tokenizer)
    assert message.startswith(f"{file}:3: ")
    assert "--skip-broken-lines" in message
    with pytest.raises(ConfigError, match=words):
        preprocess([file], tmp_path / "set", tokenizer, settings=Settings(progress=False))
    counts = preprocess(
        [file], tmp_path / "set", tokenizer, options=Options(on_error="skip"), settings=Settings(progress=False)
    )
    assert (counts.documents, counts.broken) == (2, 1)


def test_a_broken_line_is_named_by_a_worker_too(jsonl, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "BLOCK_BYTES", 3000)
    file = tmp_path / "text.jsonl"
    file.write_bytes(jsonl.read_bytes() + b"{\n")
    assert refusal([file], tmp_path, tokenizer, workers=2).startswith(f"{file}:301: not JSON")


def test_empty_texts_are_left_out_and_counted(write_jsonl, tokenizer, tmp_path, capsys):
    file = write_jsonl(tmp_path / "text.jsonl", ["", "one", ""])
    counts = preprocess([file], tmp_path / "set", tokenizer)
    assert (counts.documents, counts.empty) == (1, 2)
    assert "1 documents, " in capsys.readouterr().err


def test_a_byte_order_mark_is_no_part_of_the_text(tokenizer, tmp_path):
    (tmp_path / "text.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n')
    assert (
        preprocess([tmp_path / "text.jsonl"], tmp_path / "set", tokenizer, settings=Settings(progress=False)).documents
        == 1
    )


def test_a_text_of_nothing_but_empty_lines_is_refused(write_jsonl, tokenizer, tmp_path):
    file = write_jsonl(tmp_path / "text.jsonl", ["", ""])
    assert f"{file}: no text under `text` in any line" in refusal([file], tmp_path, tokenizer)


def test_missing_and_empty_inputs_are_told_together(jsonl, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError) as raised:
        input_files([tmp_path / "none.jsonl", tmp_path / "empty.jsonl", tmp_path / "folder", jsonl])
    message = str(raised.value)
    assert len(raised.value.breaches) == 3
    assert "none.jsonl: no such file" in message
    assert "empty.jsonl: the file is empty" in message
    assert "folder: no *.jsonl, *.txt, *.parquet or *.arrow in this folder" in message


def test_a_place_that_cannot_be_written_is_told_in_words(jsonl, tokenizer, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file.*while preparing set"):
        preprocess([jsonl], tmp_path / "file" / "set", tokenizer, settings=Settings(progress=False))


def test_a_full_disk_is_told_in_words_and_the_same_command_goes_on(jsonl, tokenizer, tmp_path, monkeypatch):
    def full(_descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("igla_mega.data.indexed.os.fsync", full)
        with pytest.raises(ConfigError, match="no space left on device, while preparing set") as raised:
            preprocess([jsonl], tmp_path / "set", tokenizer, settings=Settings(progress=False))
    assert "Run the same command again" in str(raised.value) and "Free some space" in str(raised.value)
    assert not (tmp_path / "set.idx").exists()
    assert preprocess([jsonl], tmp_path / "set", tokenizer, settings=Settings(progress=False)).documents == 300


def test_prepare_writes_every_source_and_a_manifest(jsonl, tokenizer, tmp_path, capsys):
    copy = shutil.copy(jsonl, tmp_path / "copy.jsonl")
    data = section(tmp_path, tokenizer, {"web": str(jsonl), "code": [str(jsonl), str(copy)]})
    prefixes = prepare_sources(data)
    assert prefixes == source_prefixes(data) == {n: str(tmp_path / "prepared" / n) for n in ("web", "code")}
    manifest = json.loads((tmp_path / "prepared" / "manifest.json").read_text())["sources"]
    assert manifest["code"]["tokens"] == 2 * manifest["web"]["tokens"] == IndexedReader(prefixes["code"]).num_tokens
    assert manifest["web"]["inputs"][0]["bytes"] == jsonl.stat().st_size
    assert capsys.readouterr().err.count("MB/s") == 2


def test_prepare_does_again_only_what_changed(jsonl, tokenizer, tmp_path, write_jsonl, capsys):
    web = write_jsonl(tmp_path / "web.jsonl", ["one", "two"])
    data = section(tmp_path, tokenizer, {"web": str(web), "code": str(jsonl)})
    prefixes = prepare_sources(data)
    made = {name: os.stat(f"{prefix}.bin").st_ino for name, prefix in prefixes.items()}

    capsys.readouterr()
    prepare_sources(data)
    assert capsys.readouterr().err.count("up to date") == 2
    write_jsonl(web, ["one", "three"])
    prepare_sources(data)
    assert os.stat(f"{prefixes['web']}.bin").st_ino != made["web"]
    assert os.stat(f"{prefixes['code']}.bin").st_ino == made["code"]
    os.truncate(f"{prefixes['code']}.bin", 10)
    prepare_sources(data)
    assert IndexedReader(prefixes["code"]).num_documents == 300


def test_another_tokenizer_makes_prepare_do_all_again(jsonl, tokenizer, tmp_path):
    data = section(tmp_path, tokenizer, {"web": str(jsonl)})
    prepare_sources(data, progress=False)
    before = (tmp_path / "prepared" / "web.bin").stat().st_size
    data.tokenizer = train_bpe([jsonl], 280, tmp_path / "smaller").path
    prepare_sources(data, progress=False)
    assert (tmp_path / "prepared" / "web.bin").stat().st_size > before


@pytest.mark.parametrize("missing", ["sources", "tokenizer", "prepared"])
def test_prepare_without_a_needed_key_names_it(missing, jsonl, tokenizer, tmp_path):
    data = section(tmp_path, tokenizer, {"web": str(jsonl)})
    setattr(data, missing, None)
    with pytest.raises(ConfigError, match=rf"data\.{missing}: not set"):
        prepare_sources(data)


def test_a_source_whose_name_is_no_file_name_is_refused(jsonl, tokenizer, tmp_path):
    with pytest.raises(ConfigError, match=r"data\.sources\.\.\./web: not usable as a file name"):
        prepare_sources(section(tmp_path, tokenizer, {"../web": str(jsonl)}))


def test_the_unigram_entropy_is_that_of_the_weighted_frequencies(tmp_path, write_dataset):
    prefixes = {
        "a": write_dataset(tmp_path / "a", [[0, 1]]),
        "b": write_dataset(tmp_path / "b", [[2] * 9], np.int32),
        "c": write_dataset(tmp_path / "c", [[7]]),
    }
    expected = -(2 * 0.25 * math.log(0.25) + 0.5 * math.log(0.5))
    assert unigram_entropy(prefixes, {"a": 1, "b": 1, "c": 0}) == pytest.approx(expected)


def test_the_tool_writes_under_megatron_s_names(jsonl, tokenizer, tmp_path):
    command = [sys.executable, TOOLS / "preprocess_data.py", "--input", jsonl, "--output-prefix", tmp_path / "out"]
    command += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer.path]
    environment = {**os.environ, "PYTHONPATH": str(TOOLS.parent)}
    run = subprocess.run([*command, "--append-eod"], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "300 documents" in run.stderr
    preprocess([jsonl], tmp_path / "same", tokenizer, settings=Settings(progress=False))
    assert (tmp_path / "out_text_document.bin").read_bytes() == (tmp_path / "same.bin").read_bytes()
    assert (tmp_path / "out_text_document.idx").read_bytes() == (tmp_path / "same.idx").read_bytes()

    wrong = subprocess.run([*command, "--json-keys", "body"], env=environment, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith(f"{jsonl}:1: no key `body`")
    assert "Traceback" not in wrong.stderr


def test_preparation_imports_neither_torch_nor_transformers():
    code = "import sys, igla_mega.prepare.preprocess as p; print({'torch', 'transformers', 'rich'} & set(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(TOOLS.parent)}
    assert subprocess.check_output([sys.executable, "-c", code], env=environment, text=True).strip() == "set()"


def test_epochs_said_before_a_run_count_no_held_out_token_and_a_source_of_weight_zero_is_left_alone(
    jsonl, tokenizer, tmp_path, capsys
):
    recipe = Recipe.model_validate(
        {
            "model": {"hidden_size": 64, "num_layers": 1, "num_heads": 1, "intermediate_size": 64, "vocab_size": 400},
            "training": {"total_steps": 10, "batch_size": 4, "sequence_length": 16},
            "data": {
                "sources": {"web": str(jsonl), "none": "none.jsonl"},
                "mix": {"web": 1.0, "none": 0},
                "tokenizer": tokenizer.path,
                "prepared": str(tmp_path / "prepared"),
                "validation_fraction": 0.5,
            },
        }
    )
    prefixes = prepare_sources(drawn_data(recipe), progress=False)
    assert list(prefixes) == ["web"]
    check_prepared(recipe, resolve(recipe, 1, "cpu").layouts[0])
    said = capsys.readouterr().out
    reader = IndexedReader(prefixes["web"])
    training = reader.document_start(reader.num_documents // 2)
    assert f"640 of {training:,} tokens, {640 / training:.2f} epochs" in " ".join(said.split())
