import base64
import json
import os
import re
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
from report_runs import append, small_run, train_entry

from igla_mega.config.errors import ConfigError
from igla_mega.config.load import dump, load_recipe
from igla_mega.monitor.heartbeat import write_end
from igla_mega.plan.time import model_flops_per_token
from igla_mega.report import page as page_module
from igla_mega.report.page import MAX_KEYS, Page, _flat, write_report


@pytest.fixture
def run_dir(tmp_path):
    folder = small_run(tmp_path / "run")
    (folder / "recipe.yaml").write_text(dump(load_recipe("pretrain_7b")))
    ledger = [
        {"step": s, "sources": {"web": {"samples": [3 * s, 3 * s + 3]}, "code": {"samples": [s, s + 1]}}}
        for s in range(1, 201)
    ]
    append(folder / "ledger.jsonl", *ledger)
    return folder


def data_of(path) -> dict:
    [data] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), flags=re.S)
    return json.loads(data)


def rows_of(packed) -> dict[str, np.ndarray]:
    """What the page's script makes of packed rows."""
    content, at, found = zlib.decompress(base64.b64decode(packed["blob"])), 0, {}
    for name, kind, scale in packed["names"]:
        size, dtype = (8, np.float64) if kind == "d" else (4, np.float32)
        block = np.frombuffer(content, np.uint8, size * packed["rows"], at).reshape(size, -1).T.copy()
        values, at = block.view(dtype).reshape(-1), at + size * packed["rows"]
        found[name] = np.cumsum(values) * scale if kind == "d" else values
    return found


def test_the_page_holds_the_run_and_needs_no_network(run_dir):
    path = write_report(run_dir)
    text, data = path.read_text(), data_of(path)
    assert path == run_dir / "report.html" and len(text) < 250_000
    rows = rows_of(data["runs"][0]["rows"])
    assert rows["step"].tolist() == list(range(1, 201)) and rows["tokens"][-1] == 20_000
    assert rows["loss"][0] == pytest.approx(train_entry(1)["loss"], rel=1e-6)
    assert rows["seconds"] == pytest.approx(np.arange(1, 201) * 0.02, abs=1e-3)
    assert "mfu" not in rows, "no device has a known peak here"
    assert not re.search(r"""<(script|link|img)[^>]+(src|href)=["']?(https?:)?//""", text)
    assert "connect-src &#x27;none&#x27;" in text and "default-src &#x27;none&#x27;" in text


def test_every_script_beside_the_page_is_a_part_of_it():
    assert {path.stem for path in page_module.ASSETS.glob("*.js")} == {*page_module.SCRIPTS, "uPlot.min"}


def test_the_head_says_state_steps_tokens_and_last_losses(run_dir):
    summary = Page([run_dir]).runs[0].summary()
    facts = dict(summary["facts"])
    assert summary["state"] == "running" and summary["total_steps"] == 100_000
    assert facts["step"] == "200 of 100,000" and facts["tokens"] == "20k" and facts["validation, code"] == "2.700"
    assert facts["devices"] == "4" and facts["time left"] == "33 min"
    assert summary["subtitle"].startswith("5.93B parameters, sequences of 8,192 tokens")


def test_why_a_run_ended_and_what_resumes_it_stand_in_the_head(run_dir):
    assert Page([run_dir]).runs[0].summary()["cause"] == ""
    write_end(run_dir, {"kind": "failed", "message": "step 201 is bad", "exit_code": 1})
    summary = Page([run_dir]).runs[0].summary()
    assert (summary["state"], summary["says"]) == ("failed", "failed, just now") and "time left" not in dict(
        summary["facts"]
    )
    assert summary["cause"].startswith("step 201 is bad. No step is lost") and summary["command"].startswith(
        "igla-mega "
    )


def test_the_head_names_the_layout_that_ran_and_not_the_one_that_was_asked_for(run_dir):
    assert Page([run_dir]).runs[0].summary()["subtitle"].endswith("BF16, FSDP")
    layout = "DDP on one rank"
    append(run_dir / "events.jsonl", {"time": 1.7e9, "step": 200, "event": "resumed", "message": "", "layout": layout})
    assert Page([run_dir]).runs[0].summary()["subtitle"].endswith("BF16, DDP on one rank")


def test_one_rate_stands_in_the_head_and_beside_the_plan(tmp_path):
    """The first steps are slow, and rates differ: over other steps each would be another number."""
    shape = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "intermediate_size": 128, "vocab_size": 64}
    training = {"batch_size": 8, "sequence_length": 64, "total_steps": 1000, "learning_rate": 1e-3}
    (tmp_path / "recipe.yaml").write_text(json.dumps({"name": "small", "model": shape, "training": training}))
    flops = model_flops_per_token(load_recipe(tmp_path / "recipe.yaml"), 64)
    rates = {step: 10.0 if step < 4 else 1000.0 * step for step in range(1, 131)}

    def entry(step):
        rate = rates[step]
        more = {"tokens_per_second": rate, "mfu": rate / 1e6, "tflops_per_device": flops * rate / 1e12}
        return train_entry(step) | more

    for first, last in ((1, 8), (9, 40), (41, 130)):
        append(tmp_path / "metrics.jsonl", *map(entry, range(first, last + 1)))
        page = Page([tmp_path])
        [news] = page.news(())["runs"]
        expected = np.median([rates[one] for one in range(max(4, last - 49), last + 1)])
        facts, plan = dict(news["summary"]["facts"]), news["rest"]["plan"]
        measured = {name: value for name, _, value, _ in plan["rows"]}
        assert measured["throughput"] == expected and measured["MFU"] == pytest.approx(expected / 1e4)
        assert facts["tokens/s"] == f"{expected / 1000:.3g}k" and facts["MFU"] == f"{expected / 1e6:.1%}"
        assert news["summary"]["note"] == f"tokens/s and MFU: medians of the last {min(50, last - 3)} steps"
        assert plan["note"].startswith(f"medians of the last {min(50, last - 3)} steps, as above")


def test_damage_kills_and_restarts_stand_among_the_events_with_their_lost_steps(run_dir):
    append(
        run_dir / "events.jsonl",
        {"time": 1.7e9, "step": 6, "event": "damaged", "message": "step_00000008 is damaged", "lost_steps": 2},
        {"time": 1.7e9, "step": 8, "event": "killed", "message": "rank 1 ended; 1 step is lost", "lost_steps": 1},
        {"time": 1.7e9, "step": 8, "event": "killed", "message": "rank 1 ended", "lost_steps": -1},
        {"time": 1.7e9, "step": 8, "event": "rewound", "message": "back", "lost_steps": True},
    )
    [run] = Page([run_dir]).news(())["runs"]
    said = [event["message"] for event in run["rest"]["events"]]
    assert "step_00000008 is damaged (2 steps are lost)" in said and "rank 1 ended; 1 step is lost" in said
    assert "rank 1 ended" in said and "back" in said


def test_a_run_at_its_last_step_is_finished_only_if_it_recorded_that(run_dir):
    append(run_dir / "metrics.jsonl", train_entry(100_000))
    assert Page([run_dir]).runs[0].summary()["state"] == "running"
    write_end(run_dir, {"kind": "finished", "message": "", "exit_code": 0})
    assert Page([run_dir]).runs[0].summary()["state"] == "finished"


def test_a_run_says_on_how_many_devices_it_goes_on(run_dir):
    append(run_dir / "events.jsonl", {"time": 1.7e9, "step": 200, "event": "resumed", "message": "", "ranks": 56})
    assert dict(Page([run_dir]).runs[0].summary()["facts"])["devices"] == "56"


@pytest.mark.parametrize("content", [None, "", '{"step": 1, "los', '{"step": 0, "unigram_entropy": 6.0}\n', "\0\0\0\n"])
def test_of_an_empty_or_broken_run_what_there_is_is_shown_and_what_is_broken_said(tmp_path, content):
    (tmp_path / "recipe.yaml").write_text(dump(load_recipe("pretrain_7b")))
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    [run] = data_of(write_report(tmp_path))["runs"]
    assert run["rest"]["problems"][0].startswith("metrics.jsonl: ") and "rows" not in run
    assert run["summary"]["state"] == "empty" and "hidden_size: 4096" in run["rest"]["recipe"]


def test_a_folder_of_no_run_is_refused_in_words(tmp_path):
    with pytest.raises(ConfigError, match="not the folder of a run: it has none of metrics"):
        write_report(tmp_path)
    with pytest.raises(ConfigError, match="no such folder"):
        write_report(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file, not a folder"):
        write_report(tmp_path / "file")


def test_a_page_that_cannot_be_written_names_the_way_out(run_dir, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="Give another path: --out FILE"):
        write_report(run_dir, out=tmp_path / "file" / "page.html")
    assert write_report(run_dir, out=tmp_path / "new" / "page.html").is_file()
    assert not (run_dir / "report.html").exists()


def test_names_are_data_on_the_page_and_never_markup(tmp_path):
    evil = "</script><script>alert(1)</script><!--"
    append(
        tmp_path / "metrics.jsonl",
        {"step": 1, "loss": 1.0, "stage": evil, evil: 2.0},
        {"step": 1, "validation_loss": {evil: 2.0}},
    )
    append(tmp_path / "samples.jsonl", {"step": 1, "prompt": evil, "text": evil})
    append(tmp_path / "events.jsonl", {"step": 1, "event": evil, "message": evil})
    (tmp_path / "recipe.yaml").write_text(f"name: '{evil}'\n")
    path = write_report(tmp_path)
    assert "<script>alert" not in path.read_text() and path.read_text().count("<!--") == 0
    assert data_of(path)["runs"][0]["rest"]["samples"][0]["text"] == evil


def test_a_name_that_no_text_can_hold_is_no_hindrance(tmp_path):
    folder = small_run(tmp_path / os.fsdecode(b"run\xff"), steps=3)
    append(folder / "samples.jsonl", {"step": 1, "prompt": "\ud800", "text": "\ud800"})
    assert "<h1>run?</h1>" in write_report(folder).read_text()


def test_a_recipe_that_is_none_is_said_and_the_plots_do_without(run_dir):
    for text in ("model: [", "[" * 5000, "nonsense: 1\n", "a: &a [1,1]\nb: &b [*a,*a]\nc: &c [*b,*b]\n"):
        (run_dir / "recipe.yaml").write_text(text)
        [run] = Page([run_dir]).news(())["runs"]
        assert any(problem.startswith("recipe.yaml: ") for problem in run["rest"]["problems"]), text
        assert run["rows"]["rows"] == 200


def test_runs_beside_each_other_differ_in_the_keys_that_differ(run_dir, tmp_path):
    other = small_run(tmp_path / "other" / "run")
    (other / "recipe.yaml").write_text(dump(load_recipe("pretrain_7b", overrides=["training.learning_rate=1e-4"])))
    found = data_of(write_report(run_dir, [other]))
    assert [run["name"] for run in found["runs"]] == [f"{run_dir.parent.name}/run", "other/run"]
    assert found["difference"]["rows"] == [["training.learning_rate", "0.0003", "0.0001"]]


def test_a_small_file_of_many_aliases_makes_no_large_difference():
    lines = ["a0: &a0 {x: 1}"] + [f"a{i}: &a{i} {{p: *a{i - 1}, q: *a{i - 1}}}" for i in range(1, 40)]
    start = time.process_time()
    assert len(_flat("\n".join(lines))) <= MAX_KEYS and time.process_time() - start < 10


def test_what_is_new_is_what_the_page_lacks(run_dir):
    page = Page([run_dir])
    [first] = page.news(())["runs"]
    [second] = page.news([first["since"]])["runs"]
    assert "rows" not in second and second["rest"] == {}
    append(run_dir / "metrics.jsonl", *({**train_entry(step), "stage": "books"} for step in (201, 202)))
    page.update()
    [third] = page.news([second["since"]])["runs"]
    assert third["rest"] == {}, "nothing but rows"
    assert third["first"] == 200 and rows_of(third["rows"])["step"].tolist() == [201, 202]
    for mark in ("", "x", "9.9.9", "-1.0.0", "1.2", "9" * 5000):
        assert page.news([mark])["runs"][0]["first"] == 0


def test_a_long_run_is_thinned_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(page_module, "MAX_ROWS", 1000)
    append(tmp_path / "metrics.jsonl", *(train_entry(step) for step in range(1, 5001)))
    [run] = Page([tmp_path]).news(())["runs"]
    assert (
        run["rows"]["rows"] == 1000
        and "5,000 steps: the minimum and the maximum of each 10" in run["rest"]["problems"][0]
    )
    assert rows_of(run["rows"])["loss"].max() == pytest.approx(train_entry(1)["loss"])


def test_values_of_a_long_run_keep_five_digits(tmp_path, monkeypatch):
    monkeypatch.setattr(page_module, "EXACT_ROWS", 100)
    append(tmp_path / "metrics.jsonl", *(train_entry(step) for step in range(1, 201)))
    rows = rows_of(Page([tmp_path]).news(())["runs"][0]["rows"])
    assert rows["loss"] == pytest.approx([train_entry(step)["loss"] for step in range(1, 201)], rel=2**-16)
    assert rows["step"].tolist() == list(range(1, 201))


def test_the_page_is_written_without_torch():
    subprocess.run(
        [sys.executable, "-c", "import sys, igla_mega.report.serve; sys.exit('torch' in sys.modules)"], check=True
    )
