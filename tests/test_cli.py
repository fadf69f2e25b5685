"""The command line from outside: what a wrong input says, how a run stops, resumes and ends.

Whatever the mistake: one message that names the place and the way out, exit code 2 (1 for the machine's), no
traceback, within seconds, no process left behind.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import yaml
from command_line import LIMIT_SECONDS, VOCAB, environment, igla, metrics, refused, write_dataset, write_recipe

from igla_mega import cli, verbs
from igla_mega.config.errors import ConfigError
from igla_mega.data.indexed import IndexedWriter
from igla_mega.data.tokenizer import train_bpe


@pytest.fixture
def recipe(tmp_path):
    write_dataset(tmp_path / "prepared" / "words")
    return write_recipe(tmp_path)


def digests(run: Path, step: int) -> dict[str, str]:
    """Of the files that hold a checkpoint's tensors."""
    manifest = json.loads((run / f"checkpoints/step_{step:08d}/manifest.json").read_text())
    return {name: entry["blake2b"] for name, entry in manifest["files"].items() if name.endswith(".distcp")}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["training.learning_rat=1e-3"], ["training.learning_rat", "did you mean", "learning_rate"]),
        (["trainin.learning_rate=1e-3"], ["trainin", "training"]),
        (["training.batch_size=4X tokens"], ["training.batch_size", "4X tokens"]),
        (["training.batch_size=1000 tokens"], ["training.batch_size", "1000", "sequences of 32", "992"]),
        (["distributed.tensor_parallel=3"], ["distributed.tensor_parallel", "num_heads 4", "Use"]),
        (["distributed.pipeline_parallel=3"], ["distributed.pipeline_parallel", "num_layers 2", "Use"]),
        (["model.num_heads=5"], ["model.num_heads", "5", "64"]),
        (["model.hidden_size=-4"], ["model.hidden_size", "-4"]),
        (["training.min_lr=1"], ["training.min_lr", "0.01"]),
        (["model=3"], ["model"]),
        (["training.total_steps"], ["training.total_steps"]),
    ],
    ids=lambda value: " ".join(value) if "=" in value[0] else "",
)
@pytest.mark.parametrize("verb", ["check", "train"])
def test_a_wrong_key_or_value_is_refused_with_place_and_way_out(verb, changes, words, recipe, tmp_path):
    said = refused(verb, recipe, *(part for change in changes for part in ("--set", change)), cwd=tmp_path)
    assert [word for word in words if word not in said] == [], said
    assert not (tmp_path / "runs").exists()


def test_every_breach_is_reported_at_once(recipe):
    changes = ("model.num_heads=5", "distributed.pipeline_parallel=3", "training.min_lr=1")
    said = refused("check", recipe, *(part for change in changes for part in ("--set", change)))
    assert all(key in said for key in ("model.num_heads", "pipeline_parallel", "min_lr")), said


@pytest.mark.parametrize(
    ("nproc", "change", "words"),
    [
        (3, "distributed.tensor_parallel=2", ["tensor_parallel 2", "world of 3", "Start 2 or 4 ranks"]),
        (3, "distributed.strategy=DDP", ["training.batch_size", "8", "3 data-parallel"]),
    ],
)
@pytest.mark.parametrize("verb", ["check", "train"])
def test_a_world_that_the_layout_or_the_batch_does_not_divide_is_refused(verb, nproc, change, words, recipe, tmp_path):
    said = refused(verb, recipe, "--set", change, "--nproc", nproc, cwd=tmp_path)
    assert [word for word in words if word not in said] == [], said


@pytest.mark.parametrize("name", ["no_such_recipe", "nowhere/recipe.yaml"])
def test_a_recipe_that_is_not_there_is_named(name, tmp_path):
    assert name in refused("check", name, cwd=tmp_path)


def test_broken_yaml_is_refused_with_its_line(tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text("model:\n  hidden_size: 64\n num_layers: [2\n")
    said = refused("check", path)
    assert "broken.yaml" in said and "line 3" in said


@pytest.mark.parametrize("arguments", [["trian", "pretrain_7b"], ["check"], ["check", "pretrain_7b", "--sacle", "x"]])
def test_a_wrong_verb_or_option_is_one_line(arguments):
    refused(*arguments)


def cut(file: Path):
    file.write_bytes(file.read_bytes()[:-10])


def empty(file: Path):
    file.write_bytes(b"")


def claim_int32(file: Path):
    content = bytearray(file.read_bytes())
    content[17] = 4  # the dtype code behind magic (9 bytes) and version (8)
    file.write_bytes(content)


def claim_float(file: Path):
    content = bytearray(file.read_bytes())
    content[17] = 7
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("file", "hurt", "words"),
    [
        ("words.bin", os.remove, ["words.bin", "no such file", "prepare"]),
        ("words.idx", os.remove, ["words.idx", "no such file", "prepare"]),
        ("words.bin", empty, ["words.bin", "empty", "prepare"]),
        ("words.idx", empty, ["words.idx", "empty", "prepare"]),
        ("words.bin", cut, ["words.bin", "39990 bytes", "40000", "truncated", "prepare"]),
        ("words.idx", cut, ["words.idx", "truncated", "prepare"]),
        ("words.idx", claim_int32, ["words.bin", "40000 bytes", "int32", "prepare"]),
        ("words.idx", claim_float, ["words.idx", "float32", "not a type for token ids"]),
    ],
    ids=lambda value: getattr(value, "__name__", value if isinstance(value, str) else ""),
)
def test_a_damaged_dataset_is_refused_before_ranks_start(file, hurt, words, recipe, tmp_path):
    hurt(tmp_path / "prepared" / file)
    said = refused("train", recipe, "--nproc", 2, cwd=tmp_path)
    assert [word for word in words if word not in said] == [], said


@pytest.mark.parametrize("highest_id", [VOCAB, 60_000])
def test_a_vocabulary_smaller_than_a_token_id_is_refused(highest_id, recipe, tmp_path):
    write_dataset(tmp_path / "prepared" / "words", highest_id=highest_id)
    said = refused("train", recipe, cwd=tmp_path)
    words = ["words.bin", "token 150", f"id {highest_id}", f"vocab_size {VOCAB}", "tokenizer"]
    assert [word for word in words if word not in said] == [], said


def test_a_broken_line_stops_prepare_with_its_number_and_is_skipped_when_asked(tmp_path):
    tokenizer = tmp_path / "tokenizer"
    (tmp_path / "letters.jsonl").write_text('{"text": "one two three four"}\n')
    train_bpe([tmp_path / "letters.jsonl"], 260, tokenizer)
    (tmp_path / "words.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n{"text": "thr\n{"text": "four"}\n')
    recipe = write_recipe(tmp_path, data={"tokenizer": str(tokenizer)})
    said = refused("prepare", recipe)
    assert "words.jsonl:3" in said and "skip_broken_lines" in said
    done = igla("prepare", recipe, "--set", "data.skip_broken_lines=true")
    assert done.returncode == 0 and "1 broken lines skipped" in done.stderr


@pytest.mark.parametrize(
    "section",
    ["koshey: {dynamic_batching: true}"],
)
def test_a_feature_that_is_not_built_yet_is_refused_by_train_in_one_sentence(section, recipe, tmp_path):
    recipe.write_text(recipe.read_text() + section + "\n")
    said = refused("train", recipe, cwd=tmp_path)
    assert section.split(":")[0] in said and "not supported yet" in said and len(said.splitlines()) == 1
    assert refused("check", recipe, cwd=tmp_path) == said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": {"sources": {"own": "own.jsonl"}, "tokenizer": "t"}}, "data.prepared: not set"),
        ({"data": {}}, "data.sources: not set"),
        ({"data": {"sources": {"own": "own.jsonl"}, "tokenizer": "t", "prepared": "p"}}, "p/own.bin: no such file"),
        ({"training": {"total_steps": 3, "batch_size": 2, "min_lr": 1e-4}}, "is above sft.learning_rate 1e-05"),
    ],
)
def test_train_refuses_before_it_imports_a_base_model(changes, said, tmp_path):
    from igla_mega.checkpoint.hf_config import config_of
    from igla_mega.config.schema import Model

    # Without its weights: an import would say that they are missing.
    (tmp_path / "hf").mkdir()
    shape = Model(hidden_size=64, num_layers=2, num_heads=4, intermediate_size=96, vocab_size=VOCAB, max_position=64)
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config_of(shape, None, "float32")))
    recipe = {"base_model": "hf", "training": {"total_steps": 3, "batch_size": 2}, "sft": {"learning_rate": 1e-5}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({**recipe, **changes}))
    assert said in refused("train", "r.yaml", cwd=tmp_path)
    assert not (tmp_path / "runs").exists()
    if "no such file" not in said and "sources: not set" not in said:
        assert said in refused("check", "r.yaml", cwd=tmp_path)


def test_a_hugging_face_folder_with_a_missing_shard_is_refused(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, vocab_size=VOCAB
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "hf", max_shard_size="100KB")
    shards = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert len(shards) > 1
    shards[1].unlink()
    said = refused("import", tmp_path / "hf", tmp_path / "native")
    assert shards[1].name in said
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("arguments", [["eval"], ["report"]])
def test_a_run_that_is_not_there_is_named(arguments, tmp_path):
    verb, *rest = arguments
    assert "nowhere" in refused(verb, "nowhere", *rest, cwd=tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a recipe and a run of it, done in one go by one process."""
    folder = tmp_path_factory.mktemp("finished")
    write_dataset(folder / "prepared" / "words")
    recipe = write_recipe(folder)
    done = igla("train", recipe, "--run", folder / "run")
    assert done.returncode == 0, done.stderr
    return recipe, folder / "run"


def test_a_run_says_how_far_it_has_read_each_source(finished):
    lines = [json.loads(line) for line in (finished[1] / "metrics.jsonl").read_text().splitlines()]
    read = [line for line in lines if "read_tokens" in line][-1]
    tokens = {line["step"]: line["tokens"] for line in lines if "tokens" in line}
    assert sum(read["read_tokens"].values()) == tokens[read["step"]]
    assert all(passes > 0 for passes in read["read_epochs"].values())


def copy_of(run: Path, folder: Path) -> Path:
    subprocess.run(["cp", "-r", run, folder], check=True)
    return folder / run.name


def test_a_run_writes_what_the_run_folder_promises(finished):
    _, run = finished
    assert sorted(metrics(run)) == list(range(1, 9))
    assert (run / "checkpoints" / "latest").read_text().strip() == "step_00000008"
    assert yaml.safe_load((run / "recipe.yaml").read_text())["training"]["total_steps"] == 8
    assert len((run / "ledger.jsonl").read_text().splitlines()) == 8


def test_a_finished_run_says_that_there_is_nothing_to_do(finished):
    recipe, run = finished
    before = (run / "metrics.jsonl").read_text()
    done = igla("train", recipe, "--run", run)
    assert done.returncode == 0 and "nothing to do" in done.stderr and "step 8 of 8" in done.stderr
    assert (run / "metrics.jsonl").read_text() == before


def test_a_checkpoint_of_another_model_is_refused_with_both_shapes(finished, tmp_path):
    recipe, run = finished
    train = ("train", recipe, "--set", "model.intermediate_size=80", "--run", copy_of(run, tmp_path))
    said = refused(*train)
    assert "model.intermediate_size: " in said and "96" in said and "80" in said and "new run folder" in said
    said = refused(*train, "--accept-changes", "model.intermediate_size")
    assert "[192, 64]" in said and "[160, 64]" in said and "new run folder" in said


def test_another_batch_size_is_refused_on_resume(finished, tmp_path):
    recipe, run = finished
    changes = ("--set", "training.batch_size=16", "--set", "training.total_steps=10")
    said = refused("train", recipe, *changes, "--run", copy_of(run, tmp_path))
    assert "training.batch_size" in said and "64 sequences" in said and "128" in said


def test_the_fisher_of_a_finished_model_is_written_once_and_overwrites_nothing(finished, tmp_path):
    recipe, run = finished
    sizes = ("--set", "koshey.ewc_enabled=true", "--set", "koshey.ewc_lambda=100", "--set", "koshey.fisher_samples=4")
    out = tmp_path / "held"
    done = igla("fisher", run, recipe, "--out", out, *sizes)
    assert done.returncode == 0, done.stderr
    origin = json.loads((out / "fisher.json").read_text())
    assert (origin["normalization"], origin["samples"], origin["labels"]) == ("per token", 4, "model")
    assert "every file has the size and digest" in igla("check", out).stdout
    before = sorted(path.stat().st_mtime_ns for path in out.iterdir())
    assert "would be overwritten" in refused("fisher", run, recipe, "--out", out, *sizes)
    assert sorted(path.stat().st_mtime_ns for path in out.iterdir()) == before


def test_a_half_written_checkpoint_falls_back_to_the_last_good_one_and_repeats_the_run(finished, tmp_path):
    recipe, run = finished
    hurt = copy_of(run, tmp_path)
    newest = hurt / "checkpoints" / "step_00000008"
    cut(next(newest.glob("*.distcp")))
    said = refused("check", newest)
    assert "step_00000008" in said and "bytes" in said and "A resume passes it over" in said
    done = igla("train", recipe, "--run", hurt)
    assert done.returncode == 0, done.stderr
    assert "step_00000008" in done.stdout + done.stderr and "resuming at step 6" in done.stderr
    assert metrics(hurt) == metrics(run)
    assert digests(hurt, 8) == digests(run, 8)


def test_a_run_stopped_and_resumed_equals_the_unbroken_one_bit_for_bit(finished, tmp_path):
    recipe, run = finished
    for arguments in (["--stop-after", 3], []):
        done = igla("train", recipe, "--run", tmp_path / "run", *arguments)
        assert done.returncode == 0, done.stderr
    assert "resuming at step 3" in done.stderr
    assert metrics(tmp_path / "run") == metrics(run)
    assert digests(tmp_path / "run", 8) == digests(run, 8)


def start_run(recipe: Path, run: Path, nproc: int) -> subprocess.Popen:
    """Start a run of many steps."""
    changes = ("--set", "training.total_steps=100000", "--set", "checkpoint.every_steps=0")
    return subprocess.Popen(
        [sys.executable, "-m", "igla_mega", "train", recipe, *changes, "--run", run, "--nproc", str(nproc)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_long_run(recipe: Path, run: Path, nproc: int) -> subprocess.Popen:
    """Start a run of many steps and return when it has taken a few."""
    process = start_run(recipe, run, nproc)
    deadline = time.monotonic() + LIMIT_SECONDS
    while not (run / "metrics.jsonl").exists() or len(metrics_lines(run)) < 3:
        if process.poll() is not None or time.monotonic() > deadline:
            # A run left behind would take the processors from every test after this one.
            family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            process.kill()
            raise AssertionError(ended(process, family, within_seconds=60))
        time.sleep(0.05)
    return process


def metrics_lines(run: Path) -> list[str]:
    return (run / "metrics.jsonl").read_text().splitlines()


def ended(process: subprocess.Popen, family: list[psutil.Process], within_seconds: float) -> str:
    """Wait for the end of the command; nothing of its family may outlive it."""
    try:
        said, _ = process.communicate(timeout=within_seconds)
    finally:
        for member in (alive := psutil.wait_procs(family, timeout=60)[1]):
            member.kill()
        process.kill()
    assert alive == [], said
    return said


def test_when_one_rank_dies_the_command_fails_and_no_process_stays(recipe, tmp_path):
    process = start_long_run(recipe, tmp_path / "run", 2)
    family = psutil.Process(process.pid).children(recursive=True)
    [second] = [p for p in family if p.is_running() and p.environ().get("RANK") == "1"]
    second.kill()
    said = ended(process, family, within_seconds=60)
    assert process.returncode == 1
    assert "Traceback" not in said and "error" in said, said


def test_when_the_launcher_is_killed_no_rank_trains_on(recipe, tmp_path):
    process = start_long_run(recipe, tmp_path / "run", 2)
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    ended(process, family, within_seconds=60)


def test_when_the_launcher_is_killed_before_its_ranks_have_imported_anything_none_goes_on(recipe, tmp_path):
    process = start_run(recipe, tmp_path / "run", 2)
    deadline = time.monotonic() + LIMIT_SECONDS
    while not (family := psutil.Process(process.pid).children(recursive=True)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    ended(process, family, within_seconds=60)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_when_one_rank_meets_an_id_out_of_range_the_command_names_it_and_every_rank_ends(recipe, tmp_path):
    # In the middle of the file, beyond what opening it looks at: the rank that draws the sample finds it.
    tokens = np.random.default_rng(3).integers(0, VOCAB, 320_000)
    tokens[90_000:94_000] = 4_000
    with IndexedWriter(tmp_path / "prepared" / "words", np.uint16) as writer:
        writer.add(tokens, np.full(1600, 200))
    changes = ("--set", "training.total_steps=2000", "--set", "distributed.tensor_parallel=1")
    said = refused("train", recipe, *changes, "--nproc", 2, "--run", tmp_path / "run")
    assert "words.bin: token 9" in said and "id 4000" in said and f"vocab_size {VOCAB}" in said


def test_check_lists_the_checkpoints_of_a_run_and_names_the_damaged_file(tmp_path):
    root = tmp_path / "run" / "checkpoints"
    for step in (10, 20):
        folder = root / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / ".metadata").write_bytes(b"weights")
        entry = {"bytes": 7, "blake2b": hashlib.blake2b(b"weights", digest_size=16).hexdigest()}
        (folder / "manifest.json").write_text(json.dumps({"format": 1, "files": {".metadata": entry}}))
    done = igla("check", tmp_path / "run")
    assert done.returncode == 0 and done.stdout.count("every file has the size and digest") == 2
    (root / "step_00000020" / ".metadata").write_bytes(b"Weights")
    said = refused("check", tmp_path / "run")
    assert "step_00000020: .metadata does not have the digest" in said
    assert "A resume passes over what is damaged and takes the newest whole checkpoint" in said
    (root / "step_00000010" / ".metadata").unlink()
    assert "A resume passes it over. With no whole checkpoint left" in refused("check", tmp_path / "run")
    assert "holds no checkpoint" in refused("check", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Commands:"),
        (["-h"], "--install-completion"),
        (["--version"], "igla-mega "),
        (["train", "-h"], "--nproc"),
        (["explain", "training.seed"], "Seed of the initial weights"),
    ],
)
def test_the_command_alone_and_its_help_print_what_there_is(arguments, words):
    done = igla(*arguments)
    assert done.returncode == 0 and words in done.stdout, done.stderr


def test_completion_knows_verbs_and_packaged_recipes():
    words = {"_IGLA_MEGA_COMPLETE": "complete_bash", "COMP_WORDS": "igla-mega check pre", "COMP_CWORD": "2"}
    program = "import sys; sys.argv = ['igla-mega']; from igla_mega.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", program], env=environment(**words), capture_output=True, text=True)
    assert done.stdout.split() == ["pretrain_7b"], done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "nowhere"],
        ["generate", "nowhere", "--prompt", "Once"],
        ["eval", "nowhere"],
        ["export", "nowhere", "hf"],
        ["import", "nowhere", "native"],
        ["fisher", "nowhere", "continual_7b"],
        ["train", "nowhere/"],
    ],
    ids=" ".join,
)
def test_a_path_that_does_not_exist_is_named_before_anything_is_printed_or_imported(arguments, tmp_path):
    program = (
        "import os, sys, igla_mega.cli as cli\n"
        "leave, os._exit = os._exit, lambda code: leave(99 if 'torch' in sys.modules else code)\n"
        f"sys.argv = {['igla-mega', *arguments]!r}\ncli.main()"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout, done.stderr
    assert "nowhere" in done.stderr and "no such f" in done.stderr and not list(tmp_path.iterdir())


def test_check_knows_that_a_path_may_have_been_meant(tmp_path):
    said = refused("check", "nothere", cwd=tmp_path)
    assert "nothere: no such file or folder, and no packaged recipe of this name." in said and "run folder" in said
    assert "did you mean the packaged recipe `pretrain_7b`?" in refused("check", "pretrain_7", cwd=tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("name: a\n")
    assert "a folder, not a recipe. Give its recipe: run/recipe.yaml." in refused("train", "run", cwd=tmp_path)


def test_a_run_folder_of_another_recipe_and_a_layout_are_refused_before_a_base_is_made(tmp_path):
    step = tmp_path / "run" / "checkpoints" / "step_00000010"
    step.mkdir(parents=True)
    (step / "manifest.json").write_text("{}")
    (tmp_path / "run" / "recipe.yaml").write_text("name: pretrain_7b\ntraining: {total_steps: 10}\n")
    train = ["train", "lora_7b", "--scale", "laptop", "--run", tmp_path / "run"]
    said = refused(*train, IGLA_CACHE=tmp_path / "cache", cwd=tmp_path)
    assert "contains a run of another recipe: recipe `pretrain_7b` and not `lora_7b`" in said
    said = refused(*train[:-1], tmp_path / "new", "--nproc", 3, IGLA_CACHE=tmp_path / "cache", cwd=tmp_path)
    assert "training.batch_size" in said and not (tmp_path / "cache").exists()


def test_without_data_a_packaged_recipe_names_the_laptop_scale(tmp_path):
    assert "--scale laptop" in refused("train", "pretrain_7b", cwd=tmp_path)


def test_sources_with_the_same_fault_are_one_error(tmp_path):
    sources = {name: str(tmp_path / f"{name}.jsonl") for name in ("a", "b", "c")}
    for name in sources:
        write_dataset(tmp_path / "prepared" / name, highest_id=VOCAB + 7)
    recipe = write_recipe(tmp_path, data={"mix": dict.fromkeys(sources, 1.0), "sources": sources})
    said = refused("train", recipe, cwd=tmp_path)
    assert said.count("token 150") == 1 and "Likewise in b, c." in said


def test_init_writes_a_recipe_and_names_the_next_commands(tmp_path):
    (tmp_path / "notes.jsonl").write_text(json.dumps({"body": "one two three " * 20}) + "\n")
    given = ["--data", "notes.jsonl", "--goal", "pretrain", "--out", "my recipe.yaml"]
    done = igla("init", *given, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-4:] == [
        "made: my recipe.yaml", *(f"next: igla-mega {verb} 'my recipe.yaml'" for verb in ("check", "prepare", "train"))
    ]  # fmt: skip
    assert igla("check", "my recipe.yaml", cwd=tmp_path).returncode == 0
    assert "already exists" in refused("init", *given, cwd=tmp_path)
    assert "--goal: not given" in refused("init", "--data", "notes.jsonl", cwd=tmp_path)


def test_init_asks_on_a_terminal_for_what_is_not_given(tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("one two three " * 20)
    answers = iter(["notes.txt", "pretrain", ""])
    monkeypatch.chdir(tmp_path)
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("typer.prompt", lambda *words, **options: next(answers))
    cli.init()
    assert (tmp_path / "pretrain.yaml").is_file() and next(answers, None) is None


@pytest.mark.parametrize(
    ("drawn", "temperature", "words"),
    [
        ([" upon", " a time"], 0.8, ""),
        (["\n", "\n \n"], 0.0, "white space alone. Try --temperature 0.8"),
        ([], 0.8, "the end of the text at once. Try another prompt"),
    ],
)
def test_a_blank_answer_is_named(drawn, temperature, words, monkeypatch, capsys):
    def generate(checkpoint, prompt, *, stream, temperature):
        for piece in drawn:
            stream(piece)

    monkeypatch.setitem(sys.modules, "igla_mega.evaluate.generate", SimpleNamespace(generate=generate))
    verbs.continue_text(Path("run"), "Once", temperature=temperature)
    out, err = capsys.readouterr()
    assert out == "Once" + "".join(drawn) + "\n"
    assert words in err and bool(err) == bool(words)


def test_a_stopped_run_ends_with_its_checkpoint_and_the_command_that_resumes_it(tmp_path, monkeypatch, capsys):
    for step in (3, 12):
        (tmp_path / f"checkpoints/step_{step:08d}").mkdir(parents=True)
        (tmp_path / f"checkpoints/step_{step:08d}/manifest.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["igla-mega", "train", "my recipe.yaml"])
    verbs.trained(tmp_path, 130)
    newest = tmp_path / "checkpoints/step_00000012"
    assert capsys.readouterr().out == f"made: {newest}\nnext: igla-mega train 'my recipe.yaml'\n"
    verbs.trained(tmp_path, 0)
    assert f"next: igla-mega report {tmp_path}\n" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["²", "0", "3:2", "1:2:3", "-1", "9" * 5000])
def test_what_is_no_number_of_nodes_is_refused_in_words(text):
    with pytest.raises(ConfigError, match="is neither a number of nodes nor MIN:MAX"):
        verbs.ranks(1, text, "node1:29500")
