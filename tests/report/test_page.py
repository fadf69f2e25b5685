import json
import math
import re
import subprocess
import sys

import pytest

from igla_mega.config.errors import ConfigError
from igla_mega.config.load import dump, load_recipe
from igla_mega.report.page import MAX_POINTS, _smooth, _thin, tokens_by_source, write_report


def train_entry(step):
    return {
        "step": step,
        "stage": "toy",
        "loss": 8 * math.exp(-step / 80) + 1,
        "grad_norm": 1.0,
        "learning_rate": 1e-3,
        "tokens": step * 100,
        "tokens_per_second": 5000.0,
        "step_seconds": 0.02,
        "tflops_per_device": 0.1,
        "mfu": None,
        "memory_bytes": 2**30,
    }


@pytest.fixture
def run_dir(tmp_path):
    entries = [{"step": 0, "unigram_entropy": 6.2}]
    for step in range(1, 201):
        entries.append(train_entry(step))
        if step % 50 == 0:
            entries.append({"step": step, "stage": "toy", "validation_loss": {"web": 3.5, "code": 2.5}})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries) + '{"step": 201, "lo')
    (tmp_path / "recipe.yaml").write_text(dump(load_recipe("pretrain_7b")))
    ledger = [
        {"step": s, "sources": {"web": {"samples": [3 * s, 3 * s + 3]}, "code": {"samples": [s, s + 1]}}}
        for s in range(1, 201)
    ]
    (tmp_path / "ledger.jsonl").write_text("".join(json.dumps(e) + "\n" for e in ledger) + "{")
    return tmp_path


def test_the_page_holds_all_plots_and_needs_no_network(run_dir):
    page = write_report(run_dir).read_text()
    for title in ("Loss", "Learning rate", "Gradient norm", "Throughput", "Memory", "Tokens by source"):
        assert f"<h2>{title}</h2>" in page
    for line in ("training, running mean", "validation, web", "validation, code", "unigram entropy", "data.mix"):
        assert f'"name":"{line}"' in page
    assert "Model FLOP/s utilization" not in page, "no device has a known peak here"
    assert not re.search(r"""<(script|link|img)[^>]+(src|href)=["']?(https?:)?//""", page)
    assert page.count("plotly.js v") == 1


def test_the_head_says_name_steps_tokens_and_last_losses(run_dir):
    page = write_report(run_dir).read_text()
    assert "<h1>pretrain_7b</h1>" in page and "5.93B parameters" in page
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page))
    assert facts["steps"] == "200" and facts["tokens"] == "20k" and facts["validation, code"] == "2.500"


def test_a_run_with_only_metrics_has_a_page_too(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 5.0}\n{"step": 2, "loss": NaN}\n')
    page = write_report(tmp_path).read_text()
    assert "<h2>Loss</h2>" in page and "Tokens by source" not in page


@pytest.mark.parametrize("content", [None, "", '{"step": 1, "los', '{"step": 0, "unigram_entropy": 6.0}\n'])
def test_a_folder_without_a_training_step_is_refused_in_words(tmp_path, content):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=r"has no metrics\.jsonl with a training step"):
        write_report(tmp_path)
    with pytest.raises(ConfigError, match="no such folder"):
        write_report(tmp_path / "absent")


def test_names_are_text_on_the_page_and_never_markup(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        json.dumps({"step": 1, "loss": 1.0})
        + "\n"
        + json.dumps({"step": 1, "validation_loss": {"<script>alert(1)</script>": 2.0}})
    )
    page = write_report(tmp_path).read_text()
    assert "<script>alert(1)" not in page


def test_the_ledger_is_counted_in_tokens_where_their_number_is_known():
    first, second = {"web": {"samples": [0, 3]}}, {"web": {"samples": [3, 7]}, "code": {"samples": [0, 1]}}
    ledger = [{"step": 1, "sources": first}, {"step": 2, "sources": second}]
    assert tokens_by_source(ledger, 10) == {"web": 70, "code": 10}
    assert tokens_by_source(ledger, None) == {"web": 7, "code": 1}


def test_a_phases_tokens_are_counted_in_its_own_length():
    ledger = [{"step": 1, "sources": {"web": {"samples": [0, 3]}}, "sequence_length": 5}]
    assert tokens_by_source(ledger, 10) == {"web": 15}


def test_a_run_over_phases_shows_what_was_forgotten_and_the_pull(run_dir):
    matrix = {
        "step": 200,
        "stage": "books",
        "domains": ["code", "<books>"],
        "phases": ["code", "<books>"],
        "forgetting_matrix": [[2.5, None], [3.25, 2.0]],
        "backward_transfer": -0.75,
    }
    pulled = {**train_entry(201), "ewc_nats": 0.1, "ewc_grad_norm": 0.5, "task_grad_norm": 1.0}
    entries = (run_dir / "metrics.jsonl").read_text().splitlines()[:-1]
    (run_dir / "metrics.jsonl").write_text("\n".join([*entries, json.dumps(matrix), json.dumps(pulled), ""]))
    page = write_report(run_dir).read_text()
    for title in ("Forgetting", "What is held", "Gradient norm of the pull"):
        assert f"<h2>{title}</h2>" in page
    assert '[["2.500",""],["3.250","2.000"]]' in page and '"z":[[0.0,null],[0.75,0.0]]' in page
    assert "<books>" not in page.split("</head>")[1].split("<details>")[0]


def test_a_long_line_is_thinned_to_its_means():
    steps, values = _thin(list(range(10 * MAX_POINTS)), [float(i % 2) for i in range(10 * MAX_POINTS)])
    assert len(steps) == MAX_POINTS and set(values) == {0.5}


def test_the_running_mean_of_a_constant_is_that_constant():
    assert _smooth([3.0] * 100) == pytest.approx([3.0] * 100)


def test_the_page_is_written_without_torch():
    subprocess.run(
        [sys.executable, "-c", "import sys, igla_mega.report.page; sys.exit('torch' in sys.modules)"], check=True
    )


def test_the_load_of_experts_is_drawn_over_steps_with_what_each_layer_drops(run_dir):
    lines = []
    for step in range(1, 1001):
        busy = 0.5 + 0.4 * step / 1000
        lines.append(
            {
                **train_entry(step),
                "moe_aux_loss": 1.1, "moe_drop_rate": 0.02, "moe_router_entropy": 0.6, "moe_max_violation": busy,
                "expert_load": [[busy, 1 - busy], [0.5, 0.5]],
                "moe_layers": {"drop_rate": [0.03, 0.01], "max_violation": [2 * busy - 1, 0.0]},
            }
        )  # fmt: skip
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = write_report(run_dir).read_text()
    for title in ("Load of the experts", "Busiest expert", "Dropped visits by layer", "Balance of the experts"):
        assert f"<h2>{title}</h2>" in page
    [rows] = re.findall(r'"y":(\["0\.0","0\.1","1\.0","1\.1"\])', page)
    assert json.loads(rows) == ["0.0", "0.1", "1.0", "1.1"]
    heat = re.search(r'"z":(\[\[.*?\]\]),', page)
    values = json.loads(heat[1])
    assert len(values) == 4 and len(values[0]) <= 400, "means over stretches of steps"
    assert values[0][-1] == pytest.approx(1.8, abs=0.01) and values[1][-1] == pytest.approx(0.2, abs=0.01)
    assert values[2][0] == 1.0


def test_a_dense_run_has_no_page_of_experts(run_dir):
    assert "Load of the experts" not in write_report(run_dir).read_text()
