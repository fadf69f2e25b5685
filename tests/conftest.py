"""Shared fixtures, the order of the tests, and which of them are quick."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from igla_mega.data.indexed import IndexedWriter
from igla_mega.data.tokenizer import Tokenizer, train_bpe

DURATIONS = Path(__file__).parent / "durations.json"
"""Seconds by test id, set-up included, where they are at least `LISTED_SECONDS`; `make durations` measures again."""
LISTED_SECONDS, QUICK_SECONDS = 0.25, 0.5
ONE_OF_A_KIND = frozenset(
    f"tests/{test}"
    for test in (
        "checkpoint/test_hugging_face.py::test_a_round_trip_keeps_every_bit[bfloat16]",
        "checkpoint/test_hugging_face.py::test_logits_are_those_of_transformers_both_ways",
        "checkpoint/test_store.py::test_a_resumed_run_repeats_an_unbroken_one_bit_for_bit[2-tensor_parallel=2]",
        "integration/test_conversations.py::test_the_loss_of_packed_conversations_is_that_of_transformers_one_by_one",
        "integration/test_experts.py::test_a_layout_equals_one_process[2-expert_parallel=2-dropless]",
        "integration/test_layouts.py::test_a_layout_equals_one_process[2-pipeline_parallel=2]",
        "integration/test_layouts.py::test_a_layout_equals_one_process[2-strategy=FSDP]",
        "integration/test_layouts.py::test_a_layout_equals_one_process[2-tensor_parallel=2-sequence_parallel=True]",
        "integration/test_layouts.py::test_a_layout_with_context_parallelism_equals_one_process"
        "[2-context_parallel=2-context_schedule=p2p]",
        "model/test_lora.py::test_a_layout_equals_one_process[LoRA with dropout-2-strategy=FSDP]",
        "model/test_nf4.py::test_a_layout_equals_one_process[(2, {'tensor_parallel': 2, 'sequence_parallel': True})]",
        "objective/test_dpo.py::test_a_layout_equals_one_process[(2, {'strategy': 'FSDP'})]",
        "prepare/test_resume.py::test_a_run_killed_between_two_names_is_finished_by_the_next",
        "train/test_consolidation.py::test_the_pull_is_that_of_one_process[2-{'strategy': 'FSDP'}-coupled]",
        "train/test_fisher_estimate.py::test_a_layout_takes_the_same_fisher_as_one_process[2-tensor_parallel=2]",
    )
)
"""Tests that are quick although they take seconds: one of each kind of parity, of resume and of conversion."""
SENTENCES = [
    "The ring passes keys and values from rank to rank.",
    "Ein Satz mit Umlauten: äöü ß, und ein Kaninchen 🐇.",
    "def add(a, b):\n    return a + b\n",
    "日本語のテキストも一行だけ。",
]


def pytest_addoption(parser):
    parser.addoption("--record-durations", action="store_true", help=f"write {DURATIONS.name} of the tests that ran")


@pytest.hookimpl(tryfirst=True)  # before `-m quick` looks at marks
def pytest_collection_modifyitems(items):
    """Mark quick tests, and order files by their seconds: a long one that starts last is waited for by everybody."""
    seconds, files = json.loads(DURATIONS.read_text()), Counter()
    for item in items:
        taken = seconds.get(item.nodeid, 0.0)
        files[item.path] += taken
        if taken < QUICK_SECONDS or item.nodeid in ONE_OF_A_KIND:
            item.add_marker(pytest.mark.quick)
    items.sort(key=lambda item: -files[item.path])  # stable, so the tests of a file stay in its order


def pytest_terminal_summary(terminalreporter, config):
    if not config.getoption("record_durations"):
        return
    seconds: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if hasattr(report, "duration"):
                seconds[report.nodeid] += report.duration
    # Of tests that did not run, what was measured before stays.
    known = {test: taken for test, taken in json.loads(DURATIONS.read_text()).items() if test not in seconds}
    listed = known | {test: round(taken, 1) for test, taken in seconds.items() if taken >= LISTED_SECONDS}
    DURATIONS.write_text(json.dumps(dict(sorted(listed.items())), indent=0, ensure_ascii=False) + "\n")


@pytest.fixture(scope="session")
def write_jsonl():
    def write(path: Path, texts: list[str]) -> Path:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def write_dataset():
    """Write documents of token ids; returns the prefix."""

    def write(prefix: Path, documents: list[list[int]], dtype=np.uint16) -> Path:
        with IndexedWriter(prefix, dtype) as writer:
            for document in documents:
                writer.add(np.array(document), np.array([len(document)]))
        return prefix

    return write


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """300 texts of 1 to 12 sentences."""
    return ["\n".join(SENTENCES[(i * k) % 4] for k in range(1 + i % 12)) for i in range(300)]


@pytest.fixture(scope="session")
def jsonl(tmp_path_factory, texts, write_jsonl) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("text") / "text.jsonl", texts)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory, jsonl) -> Tokenizer:
    return train_bpe([jsonl], 320, tmp_path_factory.mktemp("tokenizer"))
