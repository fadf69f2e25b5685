import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from igla_mega.config.errors import ConfigError
from igla_mega.data.indexed import IndexedReader
from igla_mega.data.journal import Journal, Lock
from igla_mega.prepare.manifest import damage, read_manifest
from igla_mega.prepare.preprocess import Options, Settings, preprocess

ROOT = Path(__file__).parents[2]
SUFFIXES = (".bin", ".idx", ".manifest.json", ".quarantine.jsonl")


def command(inputs: list[Path], prefix: Path, tokenizer, *more: str) -> list[str]:
    words = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--input", *map(str, inputs)]
    words += ["--output-prefix", str(prefix), "--tokenizer-model", tokenizer.path, "--append-eod"]
    return [*words, "--shard-mb", "0.05", "--workers", "1", "--reference-tokenizer", *more]


def contents(prefix: Path) -> dict[str, bytes]:
    return {suffix: file.read_bytes() for suffix in SUFFIXES if (file := Path(f"{prefix}{suffix}")).exists()}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, texts) -> list[Path]:
    """Three files of several formats, with broken lines, that take the reference tokenizer some seconds."""
    import gzip

    folder = tmp_path_factory.mktemp("corpus")
    lines = [json.dumps({"text": " ".join(texts[i : i + 3]), "n": i}) for i in range(len(texts))] * 3
    lines[100] = '{"text": 5}'
    (folder / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with gzip.open(folder / "b.jsonl.gz", "wt", encoding="utf-8") as stream:
        stream.write("\n".join([*lines[:500], "{", *lines[500:]]))
    (folder / "c.txt").write_text("\n".join(texts), encoding="utf-8")
    return [folder / "a.jsonl", folder / "b.jsonl.gz", folder / "c.txt"]


def test_twenty_random_kills_leave_the_bytes_of_an_unbroken_run(corpus, tokenizer, tmp_path, monkeypatch):
    quarantine = ["--on-error", "quarantine"]
    began = time.monotonic()
    subprocess.run(command(corpus, tmp_path / "whole", tokenizer, *quarantine), check=True, capture_output=True)
    seconds = time.monotonic() - began
    expected = contents(tmp_path / "whole_text_document")
    assert len(expected) == 4

    chance = random.Random(7)
    kills = went_on = 0
    again = command(corpus, tmp_path / "killed", tokenizer, *quarantine)
    # A kill before the first complete block leaves nothing to resume: on a busy machine most are so early.
    while kills < 20 or (went_on < 3 and kills < 60):
        run = subprocess.Popen(again, stderr=subprocess.PIPE, text=True)
        try:
            run.wait(chance.uniform(0.2, 1.0) * seconds)
        except subprocess.TimeoutExpired:
            run.kill()
            kills += 1
        said = run.communicate()[1]
        went_on += "resuming after" in said
        if run.returncode == 0:
            # It was complete: checked, and started again.
            assert contents(tmp_path / "killed_text_document") == expected
            for file in tmp_path.glob("killed*"):
                file.unlink()
    subprocess.run(again, check=True, capture_output=True)
    assert contents(tmp_path / "killed_text_document") == expected
    assert went_on >= 3
    assert {file.name for file in tmp_path.glob("killed*")} == {f"killed_text_document{suffix}" for suffix in SUFFIXES}


def test_what_is_finished_is_not_encoded_again(corpus, tokenizer, tmp_path, monkeypatch):
    from igla_mega.prepare import encoding

    encoded = []
    encode = encoding.Encoder.encode

    def counting(self, block, unwanted=None):
        encoded.append(block.file)
        if len(encoded) == 3:
            raise OSError(28, "No space left on device")
        return encode(self, block, unwanted)

    monkeypatch.setattr("igla_mega.prepare.formats.BLOCK_BYTES", 1 << 16)
    settings = Settings(workers=1, shard_bytes=1, progress=False)
    options = {"options": Options(on_error="skip"), "settings": settings}
    preprocess(corpus, tmp_path / "whole", tokenizer, **options)
    monkeypatch.setattr(encoding.Encoder, "encode", counting)
    with pytest.raises(ConfigError, match="no space left"):
        preprocess(corpus, tmp_path / "set", tokenizer, **options)
    done = (tmp_path / "set.journal").read_text().count('"documents"')
    assert done >= 1
    preprocess(corpus, tmp_path / "set", tokenizer, **options)
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


def test_a_shard_damaged_between_the_runs_is_made_again(corpus, tokenizer, tmp_path):
    whole = command(corpus[:1], tmp_path / "whole", tokenizer, "--on-error", "skip")
    subprocess.run(whole, check=True, capture_output=True)
    again = command(corpus[:1], tmp_path / "set", tokenizer, "--on-error", "skip")
    run = subprocess.Popen(again, stderr=subprocess.DEVNULL)
    partial = tmp_path / "set_text_document.bin.partial"
    deadline = time.monotonic() + 30
    while (
        run.poll() is None and time.monotonic() < deadline and not (partial.exists() and partial.stat().st_size > 1000)
    ):
        time.sleep(0.005)
    run.kill()
    run.wait()
    if partial.exists():
        with open(partial, "r+b") as stream:
            stream.seek(100)
            stream.write(b"\xff\xff")
    subprocess.run(again, check=True, capture_output=True)
    assert contents(tmp_path / "set_text_document")[".bin"] == contents(tmp_path / "whole_text_document")[".bin"]


def test_a_run_killed_between_two_names_is_finished_by_the_next(jsonl, tokenizer, tmp_path, monkeypatch):
    preprocess([jsonl], tmp_path / "whole", tokenizer, settings=Settings(progress=False))

    class Killed(BaseException):
        pass

    replace, count = os.replace, 0

    def killing(source, target):
        nonlocal count
        if str(target).endswith((".bin", ".set.manifest.json", "set.idx")):
            count += 1
            if count == 2:
                raise Killed
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr("igla_mega.data.indexed.os.replace", killing)
        with pytest.raises(Killed):
            preprocess([jsonl], tmp_path / "set", tokenizer, settings=Settings(progress=False))
    assert not (tmp_path / "set.idx").exists()
    preprocess([jsonl], tmp_path / "set", tokenizer, settings=Settings(progress=False))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"set{suffix}").read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()
    assert not (tmp_path / "set.journal").exists()


def test_a_run_stopped_by_a_broken_record_goes_on_when_it_may_be_skipped(
    corpus, tokenizer, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("igla_mega.prepare.formats.BLOCK_BYTES", 1 << 12)
    settings = Settings(workers=1, shard_bytes=1 << 13, fast_path=False)
    preprocess(corpus, tmp_path / "whole", tokenizer, options=Options(on_error="quarantine"), settings=settings)
    with pytest.raises(ConfigError, match="a JSON number"):
        preprocess(corpus, tmp_path / "set", tokenizer, options=Options(), settings=settings)
    assert "resuming" not in capsys.readouterr().err
    preprocess(corpus, tmp_path / "set", tokenizer, options=Options(on_error="quarantine"), settings=settings)
    assert "resuming after" in capsys.readouterr().err
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


def test_other_options_or_inputs_begin_anew(jsonl, tokenizer, tmp_path, write_jsonl):
    file = write_jsonl(tmp_path / "text.jsonl", ["one", "two"])
    journal = Journal(tmp_path / "set.journal", "another job")
    journal.add({"documents": 5, "tokens": 7, "bytes": 14})
    assert preprocess([file], tmp_path / "set", tokenizer, settings=Settings(progress=False)).documents == 2


def test_a_torn_line_of_the_journal_is_not_there(tmp_path):
    journal = Journal(tmp_path / "j", "job")
    journal.add({"documents": 1})
    journal.add({"documents": 2})
    content = (tmp_path / "j").read_bytes()
    (tmp_path / "j").write_bytes(content[:-3])
    assert [shard["documents"] for shard in Journal(tmp_path / "j", "job").shards] == [1]
    (tmp_path / "j").write_bytes(content.replace(b'"documents":2', b'"documents":3'))
    assert [shard["documents"] for shard in Journal(tmp_path / "j", "job").shards] == [1]
    assert Journal(tmp_path / "j", "other").shards == []


def test_the_lock_says_who_writes(jsonl, tokenizer, tmp_path):
    with Lock(tmp_path / "set"), pytest.raises(ConfigError, match=f"process {os.getpid()} of .* on .*, since"):
        preprocess([jsonl], tmp_path / "set", tokenizer, settings=Settings(progress=False))
    assert preprocess([jsonl], tmp_path / "set", tokenizer, settings=Settings(progress=False)).documents == 300
    assert not (tmp_path / "set.lock").exists()


def test_the_manifest_tells_what_the_dataset_was_made_from(jsonl, tokenizer, tmp_path):
    counts = preprocess([jsonl], tmp_path / "set", tokenizer, settings=Settings(progress=False))
    manifest = read_manifest(tmp_path / "set")
    assert manifest["inputs"][0]["bytes"] == jsonl.stat().st_size
    assert len(manifest["inputs"][0]["digest"]) == 64
    assert manifest["tokenizer"]["digest"] == tokenizer.digest()
    assert (manifest["documents"], manifest["tokens"]) == (counts.documents, counts.tokens)
    assert manifest["versions"]["tokenizers"]
    assert damage(tmp_path / "set", tokenizer_digest=tokenizer.digest(), whole=True) == []


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_byte_changed_afterwards_is_found(jsonl, tokenizer, tmp_path, suffix):
    preprocess([jsonl], tmp_path / "set", tokenizer, settings=Settings(progress=False))
    with open(tmp_path / f"set{suffix}", "r+b") as stream:
        stream.seek(500)
        byte = stream.read(1)
        stream.seek(500)
        stream.write(bytes([byte[0] ^ 1]))
    (breach,) = damage(tmp_path / "set")
    assert breach.startswith(f"{tmp_path}/set{suffix}: ")
    assert "damaged" in breach


def test_another_tokenizer_than_the_recipe_s_is_found(jsonl, tokenizer, tmp_path):
    preprocess([jsonl], tmp_path / "set", tokenizer, settings=Settings(progress=False))
    (breach,) = damage(tmp_path / "set", tokenizer_digest="0" * 64)
    assert "prepared with another tokenizer" in breach


def test_a_dataset_of_another_tool_has_no_manifest_to_hold_it_to(tmp_path, write_dataset):
    assert damage(write_dataset(tmp_path / "set", [[1, 2]])) == []
    assert IndexedReader(tmp_path / "set").num_tokens == 2
