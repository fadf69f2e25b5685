"""`prepare`, `merge`, `check` and `train` on prepared data, from outside."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from igla_mega.data.indexed import IndexedReader

ROOT = Path(__file__).parents[2]


def igla(*arguments, fails: bool = False) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "igla_mega", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    said = done.stdout + done.stderr
    assert done.returncode == (2 if fails else 0), said
    assert "Traceback" not in said
    return said


@pytest.fixture
def recipe(tmp_path, jsonl, texts, tokenizer, write_jsonl) -> Path:
    code = write_jsonl(tmp_path / "code.jsonl", [text[::-1] for text in texts])
    sections = {
        "model": {
            "hidden_size": 32,
            "num_layers": 1,
            "num_heads": 2,
            "intermediate_size": 48,
            "vocab_size": 320,
            "max_position": 32,
        },
        "training": {"learning_rate": 1e-3, "batch_size": 8, "total_steps": 6, "warmup_steps": 1},
        "distributed": {"precision": "FP32"},
        "data": {
            "mix": {"web": 3, "code": 1},
            "sources": {"web": [str(jsonl)], "code": str(code)},
            "prepared": str(tmp_path / "prepared"),
            "tokenizer": tokenizer.path,
        },
        "checkpoint": {"every_steps": 2},
        "evaluation": {"every_steps": 0, "num_batches": 1},
        "logging": {"tensorboard": False},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def test_parts_made_apart_and_merged_are_what_prepare_makes_at_once(recipe, tmp_path):
    said = igla("prepare", recipe, "--report")
    assert "the weights add up to 4, not 1; normalized to code 0.25, web 0.75" in said
    assert (tmp_path / "prepared" / "report.html").stat().st_size > 2000
    for i in range(2):
        igla("prepare", recipe, "--shard", f"{i}/2", "--set", f"data.prepared={tmp_path / 'parts'}")
    parts = [tmp_path / "parts" / f"web_0000{i}-of-00002" for i in range(2)]
    igla("merge", tmp_path / "parts" / "web", *parts)
    for suffix in (".bin", ".idx"):
        made = (tmp_path / "prepared" / f"web{suffix}").read_bytes()
        assert (tmp_path / "parts" / f"web{suffix}").read_bytes() == made
    igla("merge", "--reference", tmp_path / "referring", *parts)
    assert IndexedReader(tmp_path / "referring").num_documents == 300
    assert "every byte" in igla("check", tmp_path / "parts" / "web")
    assert "is not i/n" in igla("prepare", recipe, "--shard", "2/2", fails=True)


def test_a_dry_run_writes_nothing_and_wrong_choices_are_refused(recipe, tmp_path):
    said = igla("prepare", recipe, "--dry-run", "--set", "data.cleaning={exact_duplicates: true}")
    assert "left out: duplicate; nothing written" in said
    assert not (tmp_path / "prepared").exists()
    assert "neither `local` nor `ray`" in igla("prepare", recipe, "--engine", "spark", fails=True)
    assert "data.on_error: 'ignore'" in igla("prepare", recipe, "--on-error", "ignore", fails=True)


def test_train_refuses_data_that_is_not_what_its_manifest_says(recipe, tmp_path, jsonl):
    igla("prepare", recipe)
    file = tmp_path / "prepared" / "web.bin"
    content = file.read_bytes()
    file.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    said = igla("train", recipe, "--run", tmp_path / "run", fails=True)
    assert f"{file}: bytes 0 to" in said and "damaged" in said
    assert "damaged" in igla("check", tmp_path / "prepared" / "web", fails=True)
    file.write_bytes(content)

    from igla_mega.data.tokenizer import train_bpe

    other = train_bpe([jsonl], 310, tmp_path / "other").path
    said = igla("train", recipe, "--run", tmp_path / "run", "--set", f"data.tokenizer={other}", fails=True)
    assert "prepared with another tokenizer" in said


def test_train_and_check_refuse_data_of_another_rule_for_the_begin_of_text_token(recipe, tmp_path):
    igla("prepare", recipe)
    other = ("--set", "data.add_bos=always")
    for verb in (("train", recipe, "--run", tmp_path / "run"), ("check", recipe)):
        said = igla(*verb, *other, fails=True)
        assert "data.sources.web: prepared with data.add_bos: never, but the recipe's data.add_bos is always." in said
    assert not (tmp_path / "run").exists()


def test_a_weight_changed_in_mid_run_takes_effect_at_the_next_step_and_loses_nothing(recipe, tmp_path):
    igla("prepare", recipe)
    run = tmp_path / "run"
    said = igla("train", recipe, "--run", run, "--stop-after", 4)
    assert "75.00%" in said and "epochs" in said
    said = igla("train", recipe, "--run", run, "--set", "data.mix={web: 0, code: 1}")
    assert "changed from sample 32 on" in said
    entries = [json.loads(line)["sources"] for line in (run / "ledger.jsonl").read_text().splitlines()]
    assert len(entries) == 6
    for name in ("web", "code"):
        spans = [entry[name]["samples"] for entry in entries if name in entry]
        assert [first for first, _ in spans] == [0, *(end for _, end in spans[:-1])]
    assert all("web" in entry for entry in entries[:4]) and not any("web" in entry for entry in entries[4:])
    changes = json.loads((run / "mix.json").read_text())
    assert [change["first_sample"] for change in changes] == [0, 32]
    assert changes[1]["consumed"] == {"web": 24, "code": 8}


def test_packed_documents_are_trained_on(recipe, tmp_path):
    igla("prepare", recipe)
    sets = ["--set", "data.document_packing=best_fit", "--set", "data.document_mask=true"]
    igla("train", recipe, "--run", tmp_path / "run", "--nproc", 2, *sets)
    losses = [json.loads(line).get("loss") for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(loss is not None for loss in losses) == 6
