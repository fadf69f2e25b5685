"""Recipes, hardware and calibrations that come from anybody, and what the command line makes of them."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import hostile
import pytest
import yaml
from hostile import altered, damaged, refused, scratch
from hypothesis import example, given
from hypothesis import strategies as st

from igla_mega.config import yaml_text
from igla_mega.config.errors import ConfigError
from igla_mega.config.load import RECIPES, load_recipe, packaged
from igla_mega.layout import hardware
from igla_mega.plan import base_model, calibration, finished

ROOT = Path(__file__).resolve().parents[2]


@functools.cache
def good(name: str) -> dict:
    return yaml_text.read_mapping(RECIPES / f"{name}.yaml")


def loaded(text: str | bytes, **options):
    path = scratch() / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode(errors="surrogatepass"))
    return refused(load_recipe, path, **options)


@given(st.sampled_from(sorted(packaged())).flatmap(lambda name: altered(good(name))), st.sampled_from([None, "laptop"]))
def test_an_altered_recipe_is_refused_or_is_one_that_can_be_written_and_read_again(recipe, scale):
    found = loaded(json.dumps(recipe), scale=scale)  # JSON is YAML
    if found is not None:
        assert found.model is None or found.model.num_layers < 2**63


@given(damaged((RECIPES / "koshey_7b.yaml").read_bytes()))
def test_a_damaged_recipe_is_refused_or_loaded(text):
    loaded(text)


PIECES = st.sampled_from(
    [
        *("a: ", "b:\n", "- ", "  ", "\n", "[", "]", "{", "}", ",", ": ", "? ", "&a ", "*a", "<<: *a", "!!", "!!int "),
        *("!!python/object/apply:os.system [id]", "!!timestamp ", "!!binary ", "!!float ", "!!omap ", "!!set ", "|\n"),
        *(">\n", "---\n", "...\n", "%YAML 1.1\n", "'", '"', "#", "\t", "\0", "0x", "1e999", ".nan", "9" * 30, "~"),
        *("true", "model", "é", "\ud800"),
    ]
)


@given(st.lists(PIECES, max_size=14).map("".join))
@example("a: !!timestamp x")
@example("a: !!bool x")
@example("a: !!float ''")
@example("a: !!map x")
@example("a: 0x" + "f" * 20_000)
@example("model: {hidden_size: 0x" + "f" * 300 + "}")
@example("&a {<<: *a}")
def test_any_yaml_is_plain_data_or_refused(text):
    found = refused(yaml_text.parse, text, "f")
    if found is not None:
        assert "python" not in str(type(found).__module__)
    loaded(text)


@pytest.mark.parametrize(
    "text",
    [
        "a0: &a0 [x, x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)),
        "a0: &a0 {k: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 12)),
        "[" * 300_000,
        "{a: " * 300_000,
        "- " * 300_000,
        "? " * 300_000,
        "x: [" + "1," * 3_000_000 + "]",
        "a: " + "9" * 1_000_000,
        "!" + "x" * 1_000_000,
        "'" + "\n" * 3_000_000,
    ],
    ids=["aliases", "merges", "lists", "maps", "sequences", "keys", "wide", "digits", "tag", "lines"],
)
def test_a_yaml_bomb_is_refused_in_bounded_time_and_memory(text):
    assert hostile.within(400, lambda: yaml_text.parse(text, "f"), seconds=5).startswith("ConfigError")


NAMES = st.sampled_from(
    ["model", "hidden_size", "training", "stages", "0", "999999999999999999999", "-1", "a", "mix", ""]
)


@given(st.lists(NAMES, min_size=1, max_size=5), PIECES | st.sampled_from(["=", "[1, 2]", "{a: 1}", "1e400"]))
def test_any_override_is_refused_or_taken(parts, value):
    refused(load_recipe, "sft_dpo_7b", overrides=[f"{'.'.join(parts)}={value}"])
    refused(load_recipe, "pretrain_7b", overrides=["training.total_steps=1", f"model.{parts[-1]}={value}", value])


@pytest.mark.parametrize(
    "parent",
    [
        "recipe",
        "recipe.yaml",
        "./recipe.yaml",
        "../x.yaml",
        "/dev/zero",
        "a\0b",
        "x" * 5000,
        "",
        "/",
        ".",
        "[a, b]",
        "~/x",
    ],
)
def test_a_recipe_extends_no_circle_no_device_and_nothing_that_is_not_there(parent, tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"extends": parent, "model": {}}))
    with pytest.raises((ConfigError, OSError)):  # a name too long for the file system is the system's to refuse
        load_recipe(tmp_path / "recipe.yaml")


def test_a_long_line_of_parents_is_refused(tmp_path):
    for number in range(200):
        (tmp_path / f"r{number}.yaml").write_text(f"extends: r{number + 1}.yaml\n")
    (tmp_path / "r200.yaml").write_text("model: {}\n")
    with pytest.raises(ConfigError, match="extends"):
        load_recipe(tmp_path / "r0.yaml")


HARDWARE = {"my-gpu": {"like": "h100", "memory_bytes": 1e11, "price": 2.5, "node_size": 8, "title": "x"}}


@given(altered(HARDWARE).map(json.dumps) | damaged(yaml.safe_dump(HARDWARE).encode()))
def test_altered_hardware_is_refused_or_has_positive_numbers(content):
    file = scratch() / "hardware.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    for entry in (refused(hardware.read, file) or {}).values():
        assert entry.memory_bytes > 0 and entry.node_size >= 1 and entry.bf16_flops < float("inf")


RATES = {"hardware": "h200", "format": 1, "rates": {"gemm": 0.5, "overlap": 0}, "gemm_sizes": [[1e9, 0.5]], "ranks": 1}


@given(altered(RATES).map(json.dumps) | damaged(json.dumps(RATES).encode()))
@example(b"[" * 100_000)
@example(b'{"hardware": "h200", "rates": {"gemm": 1' + b"0" * 400 + b"}}")
def test_an_altered_calibration_is_refused_or_has_shares_that_can_be_used(content):
    file = scratch() / "calibration.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    found = refused(calibration.read, file, hardware.TABLE["h200"])
    if found is not None:
        assert all(0 < found.rates.gemm_share(flops) < 1e300 for flops in (1.0, 1e9, 1e15))


METRICS = [
    {"step": n, "loss": 5.0, "tokens_per_second": 1000.0, "tflops_per_device": 1.0, "mfu": 0.5, "memory_bytes": 2**30}
    for n in range(10)
]


@given(st.lists(st.sampled_from(METRICS).flatmap(altered), max_size=4), damaged(b'{"step": 11}\n'))
@example([], b"[" * 100_000)
def test_a_run_of_altered_metrics_is_refused_or_compared(entries, tail):
    folder = scratch() / "run"
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_bytes((RECIPES / "pretrain_7b.yaml").read_bytes())
    lines = [json.dumps(entry).encode() for entry in [*METRICS, *entries]]
    (folder / "metrics.jsonl").write_bytes(b"\n".join([*lines, tail]))
    run = refused(finished.find, folder)
    if run is not None:
        refused(lambda: (run.num_ranks, run.hardware()))


SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 256,
}


@given(altered(SHAPE).map(json.dumps) | damaged(json.dumps(SHAPE).encode()))
@example(b"[" * 100_000)
def test_a_base_model_of_altered_shape_is_refused_or_planned(content):
    (scratch() / "base").mkdir(exist_ok=True)
    (scratch() / "base" / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    recipe = load_recipe("lora_7b").model_copy(update={"base_model": str(scratch() / "base"), "model": None})
    refused(base_model.with_base, recipe, None)


def igla(*words: object) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "igla_mega", *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize(
    ("words", "content"),
    [
        (["check", "FILE"], b"a: !!python/object/apply:os.system ['touch PWNED']"),
        (["check", "FILE"], b"model: {num_layers: " + b"9" * 15 + b", hidden_size: 64}"),
        (["check", "FILE"], b"\x80\x81"),
        (["plan", "pretrain_7b", "--hardware", "FILE"], b"a: &a [*a]"),
        (["plan", "pretrain_7b", "--gpus", "8", "--calibration", "FILE"], b"[" * 50_000),
        (["plan", "pretrain_7b", "--gpus", "8", "--set", "model.num_layers=1" + "0" * 17], b""),
    ],
)
def test_the_command_line_refuses_in_words_and_without_a_traceback(words, content, tmp_path):
    (tmp_path / "file.yaml").write_bytes(content)
    done = igla(*[tmp_path / "file.yaml" if word == "FILE" else word for word in words])
    assert done.returncode in (1, 2), done.stdout
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert not Path("PWNED").exists()
