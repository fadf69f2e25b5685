"""What is measured between steps: that it is right in every layout, and that training does not notice."""

import json
import math
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ranks
import tiny
import torch
import torch.distributed as dist
from typer.testing import CliRunner

from igla_mega import cli
from igla_mega import run as whole_run
from igla_mega.checkpoint import store
from igla_mega.checkpoint.progress import Progress, Retention
from igla_mega.config import needed
from igla_mega.config.errors import ConfigError
from igla_mega.config.load import dump, load_recipe
from igla_mega.config.schema import Needle, Tasks
from igla_mega.data.indexed import IndexedReader, IndexedWriter
from igla_mega.data.micro_batch import MicroBatch
from igla_mega.data.tokenizer import load_tokenizer, train_bpe
from igla_mega.distributed.mesh import single_process_mesh
from igla_mega.engine.step import train_step
from igla_mega.evaluate import needle, scoring
from igla_mega.evaluate.checkpoint import evaluate_tasks
from igla_mega.evaluate.tasks import open_harness, run_tasks
from igla_mega.plan.choose import choose_layout
from igla_mega.train.evaluation import log_validation

pytest.importorskip("lm_eval")
VOCAB, LENGTH = 320, 64
WORDS = [left + right for left in ("ab", "co", "di", "fo", "gu") for right in ("rat", "len", "mip", "sos", "nud")]
MODEL = {"vocab_size": VOCAB, "max_position": LENGTH, "init_std": 0.1, "num_layers": 2}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Sentences of a few words, their tokenizer, and the prepared data set."""
    folder = tmp_path_factory.mktemp("corpus")
    draws = np.random.default_rng(0)
    texts = [" ".join(draws.choice(WORDS, 40)) + "." for _ in range(120)]
    (folder / "web.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = train_bpe([folder / "web.jsonl"], VOCAB, folder / "tokenizer")
    with IndexedWriter(folder / "web", np.uint16) as writer:
        for text in texts:
            ids = [*tokenizer.encode(text), tokenizer.eod_id]
            writer.add(np.array(ids), np.array([len(ids)]))
    return folder


@pytest.fixture(scope="module")
def task_files(tmp_path_factory) -> Path:
    """Three tasks on local files: choices, a text's perplexity, and an answer to write."""
    folder = tmp_path_factory.mktemp("tasks")
    draws = np.random.default_rng(1)
    docs = []
    for _ in range(24):
        words = draws.choice(WORDS, 6).tolist()
        choices = draws.choice(WORDS, 3, replace=False).tolist()
        docs.append(
            {"question": " ".join(words), "choices": choices, "gold": int(draws.integers(3)), "answer": "abrat"}
        )
    docs[0]["question"] = " ".join(WORDS * 4)  # beyond what the model reads
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    shared = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/docs.jsonl}}}}\ntest_split: test\n"
    accuracy = "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
    (folder / "choose.yaml").write_text(
        f"task: choose\n{shared}output_type: multiple_choice\ndoc_to_text: '{{{{question}}}}'\n"
        f"doc_to_choice: '{{{{choices}}}}'\ndoc_to_target: gold\n{accuracy}num_fewshot: 2\nfewshot_split: test\n"
    )
    (folder / "read.yaml").write_text(
        f"task: read\n{shared}output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{{{question}}}}'\n"
        "metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}]\n"
    )
    (folder / "write.yaml").write_text(
        f"task: write\n{shared}output_type: generate_until\ndoc_to_text: '{{{{question}}}}'\ndoc_to_target: answer\n"
        "generation_kwargs: {until: ['.'], max_gen_toks: 5, do_sample: false}\n"
        "metric_list: [{metric: exact_match}]\n"
    )
    return folder


def recipe_of(corpus: Path, *, moe: bool = False, evaluated: dict | None = None, **distributed):
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "bias_update_rate": 1e-3}
    small = tiny.recipe(
        model=MODEL, training={"total_steps": 4, "batch_size": 4}, moe=experts if moe else None, **distributed
    ).model_dump()
    small["data"] |= {
        "mix": {"web": 1.0},
        "sources": {"web": str(corpus / "web")},
        "tokenizer": str(corpus / "tokenizer"),
        "validation_fraction": 0.2,
    }
    small["evaluation"] |= evaluated or {"every_steps": 0}
    small["logging"]["tensorboard"] = False
    small["checkpoint"]["every_steps"] = 0
    return type(tiny.recipe()).model_validate(small)


def everything(task_files: Path) -> dict:
    return {
        "every_steps": 2,
        "num_batches": 1,
        "needle": {"every_steps": 1, "lengths": [56, 64], "depths": [0, 100], "num_samples": 2},
        "tasks": {"names": ["choose", "write"], "every_steps": 2, "limit": 4, "include_path": str(task_files)},
        "prompts": ["abrat", "colen dimip"],
        "prompts_every_steps": 2,
        "prompts_tokens": 3,
    }


def as_run(text: str, run_dir: str, stop_after: int | None = None):
    """Leave the world the test made, so that the run makes its own."""
    import os

    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False) if dist.get_rank() == 0 else None
    port = [server.port if server else None]
    dist.broadcast_object_list(port)
    dist.destroy_process_group()
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port[0]), TORCHELASTIC_USE_AGENT_STORE="True")
    path = Path(run_dir) / f"recipe_{os.environ['RANK']}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    try:
        whole_run.train(load_recipe(path), Path(run_dir), stop_after=stop_after)
    except ConfigError as error:
        return str(error)


def entries(run_dir: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def evaluated_run(corpus, task_files, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("evaluated")
    recipe = recipe_of(corpus, moe=True, evaluated=everything(task_files))
    assert ranks.run(2, as_run, dump(recipe), str(run_dir)) == [None, None]
    return run_dir


def test_training_does_not_notice_that_it_is_evaluated(evaluated_run, corpus, tmp_path):
    ranks.run(2, as_run, dump(recipe_of(corpus, moe=True)), str(tmp_path))
    kept = ("step", "loss", "grad_norm", "expert_load", "moe_aux_loss")
    with_it, without = (
        [[entry.get(key) for key in kept] for entry in entries(folder) if "loss" in entry]
        for folder in (evaluated_run, tmp_path)
    )
    assert len(without) == 4 and with_it == without


def test_a_run_writes_down_what_it_has_measured_at_each_interval_and_at_its_end(evaluated_run):
    found = entries(evaluated_run)
    grids = [entry for entry in found if "needle" in entry]
    assert [entry["step"] for entry in grids] == [1, 2, 3, 4]
    for grid in grids:
        assert {length: set(by_depth) for length, by_depth in grid["needle"].items()} == {
            "56": {"0", "100"},
            "64": {"0", "100"},
        }
        assert all(0 <= share <= 1 for by_depth in grid["needle"].values() for share in by_depth.values())
    scores = [entry for entry in found if "tasks" in entry]
    assert [entry["step"] for entry in scores] == [2, 4]
    assert set(scores[0]["tasks"]) == {"choose/acc", "choose/acc_norm", "write/exact_match"}
    assert [entry["step"] for entry in found if "validation_loss" in entry] == [2, 4]
    texts = entries(evaluated_run, "samples.jsonl")
    assert [(entry["step"], entry["prompt"]) for entry in texts] == [
        (step, prompt) for step in (2, 4) for prompt in ("abrat", "colen dimip")
    ]
    assert all(isinstance(entry["text"], str) and entry["stage"] == "tiny" for entry in texts)


def test_eval_of_the_last_checkpoint_gives_the_run_s_own_last_scores(evaluated_run, task_files):
    asked = Tasks(names=("choose", "write"), limit=4, include_path=str(task_files))
    [found] = ranks.run(1, alone, evaluated_run, asked)
    assert found == pytest.approx([entry for entry in entries(evaluated_run) if "tasks" in entry][-1]["tasks"])


def alone(checkpoint: Path, asked: Tasks):
    dist.destroy_process_group()
    import os

    for name in ("RANK", "WORLD_SIZE"):
        os.environ.pop(name)
    return evaluate_tasks(checkpoint, asked, choose_layout)


def test_a_resumed_run_takes_back_the_samples_of_steps_it_repeats(tmp_path):
    from igla_mega.config.schema import Logging
    from igla_mega.train.trackers import Trackers

    for resume_step in (0, 3):
        trackers = Trackers(tmp_path, Logging(tensorboard=False), {})
        trackers.open(resume_step)
        for step in (2, 4):
            trackers.sample({"step": step, "stage": "s", "prompt": "p", "text": "t"})
        trackers.close()
    assert [entry["step"] for entry in entries(tmp_path, "samples.jsonl")] == [2, 2, 4]


# --- needle ---


def held_out_corpus(corpus: Path):
    reader = IndexedReader(corpus / "web", VOCAB)
    first = reader.document_start(96)
    return SimpleNamespace(
        readers={"web": reader}, validation_names=lambda: ["web"], held_out=lambda _: (first, reader.num_tokens)
    )


def haystack(corpus: Path, depths=(0, 100), samples: int = 16, seed: int = 1, lengths=(56,)):
    asked = Needle(lengths=lengths, depths=depths, num_samples=samples)
    tokenizer = load_tokenizer(corpus / "tokenizer")
    return needle.prepare(asked, held_out_corpus(corpus), tokenizer, LENGTH, seed)


def test_a_fact_stands_at_its_depth_in_a_context_of_its_length(corpus):
    hay = haystack(corpus, lengths=(56, 64))
    tokenizer = load_tokenizer(corpus / "tokenizer")
    for length in (56, 64):
        for depth in (0, 50, 100):
            row = hay.row(length, depth, 3)
            assert len(row.tokens) == length + needle.VALUE_TOKENS == length + row.num_targets
            text = tokenizer.decode(row.tokens)
            opening, *_ = text.partition(" is")
            assert text.count(needle.OPENING) == 2 and text.endswith(tokenizer.decode(row.tokens[-3:]))
            assert opening.startswith(needle.OPENING) == (depth == 0)
            assert tokenizer.decode(row.tokens[-3:]) + "." in text[: text.rindex(needle.OPENING)]
    assert hay.row(56, 0, 3) == haystack(corpus).row(56, 0, 3) != hay.row(56, 0, 4)


def searched(corpus: Path, trained_steps: int):
    """The grid of a model that has learned to say again what stands at the end of its context, and only there."""
    torch.set_num_threads(1)
    model = MODEL | {"init_std": 0.05}
    engine, _ = tiny.engine(tiny.recipe(model=model, training={"batch_size": 16}, micro_batch_size=16))
    learned = haystack(corpus, seed=99)
    for step in range(trained_steps):
        ids = torch.tensor([learned.row(56, 100, 16 * step + n).tokens for n in range(16)])
        mask = torch.zeros(16, ids.size(1) - 1)
        mask[:, -needle.VALUE_TOKENS :] = 1
        positions = torch.arange(ids.size(1) - 1).expand(16, -1)
        batch = MicroBatch(tokens=ids[:, :-1], labels=ids[:, 1:], loss_mask=mask, position_ids=positions)
        batch = batch.map_tensors(torch.Tensor.contiguous)
        train_step(engine, iter([batch]), step=step, seed=1, learning_rate=4e-3)
    return needle.measure(engine, haystack(corpus))


def test_the_needle_is_found_by_a_model_that_learned_to_and_only_by_chance_by_one_that_did_not(corpus):
    [(untrained, exact)] = ranks.run(1, searched, corpus, 0)
    # 48 tokens a cell, right one time in ten: 0.1 with a deviation of 0.043.
    assert all(share < 0.3 for share in untrained["56"].values())
    assert all(share == 0 for share in exact["56"].values())
    [(trained, exact)] = ranks.run(1, searched, corpus, 150, limit_seconds=200)
    assert trained["56"]["100"] > 0.9 and exact["56"]["100"] > 0.8
    assert trained["56"]["0"] < 0.5, "what it was not taught to find"


def test_a_context_too_short_for_the_fact_is_refused_with_both_numbers(corpus):
    with pytest.raises(
        ConfigError, match=r"evaluation.needle.lengths: 12 tokens .* need \d+ tokens with this tokenizer"
    ):
        haystack(corpus, lengths=(12,))


# --- tasks ---


def tasks_in(corpus: Path, task_files: Path, moe: bool, distributed: dict):
    recipe = recipe_of(corpus, moe=moe, **distributed)
    engine, _ = tiny.engine(recipe)
    asked = Tasks(names=("choose", "read", "write"), limit=8, include_path=str(task_files))
    harness = None
    if engine.mesh.is_main:
        harness = open_harness(asked, load_tokenizer(corpus / "tokenizer"), LENGTH)
    with scoring.undisturbed(engine):
        return run_tasks(engine, harness, 1)


@pytest.fixture(scope="module")
def scores_of_one_process(corpus, task_files):
    return cache(lambda moe: ranks.run(1, tasks_in, corpus, task_files, moe, {})[0])


@pytest.mark.parametrize(
    ("moe", "num_ranks", "distributed"),
    [
        (False, 2, {"strategy": "FSDP"}),
        (False, 2, {"tensor_parallel": 2}),
        (False, 2, {"pipeline_parallel": 2}),
        (False, 2, {"context_parallel": 2}),
        (True, 2, {"expert_parallel": 2}),
    ],
    ids=["FSDP", "tensor", "pipeline", "context", "expert"],
)
def test_tasks_have_the_scores_of_one_process_in_every_layout(
    corpus, task_files, moe, num_ranks, distributed, scores_of_one_process
):
    expected = scores_of_one_process(moe)
    main, *others = ranks.run(num_ranks, tasks_in, corpus, task_files, moe, distributed)
    assert main == pytest.approx(expected, rel=1e-4) and others == [{}] * (num_ranks - 1)
    assert len(main) == 5


def failing(corpus: Path, task_files: Path):
    from igla_mega.evaluate.harness import Asker

    engine, _ = tiny.engine(recipe_of(corpus))
    broken = SimpleNamespace(results=lambda *_: 1 / 0)
    said = run_tasks(engine, broken if engine.mesh.is_main else None, 1)
    return said, Asker(engine).failed


def test_a_task_whose_own_code_fails_is_reported_and_holds_up_no_rank(corpus, task_files):
    (said, _), (other, _) = ranks.run(2, failing, corpus, task_files)
    assert said == "failed (ZeroDivisionError: division by zero)" and other == {}


def saved(corpus: Path, folder: Path):
    recipe = recipe_of(corpus)
    engine, _ = tiny.engine(recipe)
    writer = store.CheckpointWriter(folder, engine.mesh, Retention(1), asynchronous=False)
    writer.save(engine.optimizer.states(), Progress(1, 4, 4 * LENGTH), dump(recipe))


@pytest.fixture(scope="module")
def checkpoint(corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    ranks.run(1, saved, corpus, folder)
    return folder / "step_00000001"


def both_ways(checkpoint: Path, hf_dir: Path, task_files: Path):
    """Log-likelihoods of the same requests and scores of the same tasks: ours, and the harness's own of the export."""
    from lm_eval import evaluator, tasks
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from igla_mega.checkpoint.load_model import load_model
    from igla_mega.checkpoint.load_model import single_process_layout as alone_layout
    from igla_mega.engine.step import Engine
    from igla_mega.evaluate.harness import Asker, EngineLM

    model, recipe = load_model(checkpoint)
    mesh = single_process_mesh(alone_layout(recipe.model), torch.device("cpu"), 0)
    engine = Engine(mesh, alone_layout(recipe.model), [model], None)
    ours = EngineLM(load_tokenizer(hf_dir), LENGTH, Asker(engine), 0)
    theirs = HFLM(pretrained=str(hf_dir), device="cpu", batch_size=3, dtype="float32")
    assert theirs.max_length == LENGTH
    pairs = [("abrat colen", " dimip"), ("", "abrat gunud."), ("fosos ", "abrat"), (" ".join(WORDS * 6), " fomip")]
    requests = [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(pairs)]
    texts = [Instance("loglikelihood_rolling", {}, (" ".join(WORDS * n),), n) for n in (1, 7)]
    results = []
    for lm in (ours, theirs):
        manager = tasks.TaskManager(include_path=str(task_files), include_defaults=False)
        found = evaluator.simple_evaluate(
            lm, tasks=["choose", "read", "write"], task_manager=manager, bootstrap_iters=0, log_samples=True
        )
        written = [sample["resps"] for sample in found["samples"]["write"]]
        results.append((lm.loglikelihood(requests), lm.loglikelihood_rolling(texts), found["results"], written))
    return results


def test_scores_are_those_of_the_harness_s_own_hugging_face_model_on_the_exported_folder(
    checkpoint, task_files, tmp_path
):
    from igla_mega.checkpoint import hugging_face

    pytest.importorskip("transformers")
    hugging_face.export_folder(checkpoint, tmp_path / "hf", say=lambda _: None)
    [(ours, theirs)] = ranks.run(1, both_ways, checkpoint, tmp_path / "hf", task_files, limit_seconds=170)
    assert [value for value, _ in ours[0]] == pytest.approx([value for value, _ in theirs[0]], abs=1e-4)
    assert [greedy for _, greedy in ours[0]] == [greedy for _, greedy in theirs[0]]
    assert ours[1] == pytest.approx(theirs[1], abs=1e-4 * LENGTH)
    for task, metrics in theirs[2].items():
        numbers = {key: value for key, value in metrics.items() if isinstance(value, float)}
        assert numbers and {key: ours[2][task][key] for key in numbers} == pytest.approx(numbers, rel=1e-5)
    assert ours[3] == theirs[3], "word for word what it writes"


def refused(names: tuple, include_path: str | None, corpus: Path):
    try:
        asked = Tasks(names=names, include_path=include_path)
        open_harness(asked, load_tokenizer(corpus / "tokenizer"), LENGTH)
    except ConfigError as error:
        return str(error)


def test_tasks_that_cannot_run_are_refused_in_words_before_the_first_step(corpus, task_files, tmp_path):
    (tmp_path / "remote.yaml").write_text(
        "task: remote\ndataset_path: nobody/nothing\ntest_split: test\noutput_type: loglikelihood\n"
        "doc_to_text: x\ndoc_to_target: y\n"
    )
    shared = (task_files / "write.yaml").read_text()
    (tmp_path / "drawn.yaml").write_text(
        shared.replace("task: write", "task: drawn").replace("do_sample: false", "do_sample: true, top_p: 0.9")
    )
    assert "include_path /nowhere is not a folder" in refused(("choose",), "/nowhere", corpus)
    assert "remote cannot be opened" in (said := refused(("remote",), str(tmp_path), corpus))
    assert "Nothing is downloaded" in said
    assert '{"top_p": 0.9}' in refused(("drawn",), str(tmp_path), corpus)
    assert "did you mean `choose`?" in refused(("chose",), str(task_files), corpus)


def test_without_lm_eval_a_recipe_with_tasks_is_refused_with_the_extra_s_name(monkeypatch, corpus, task_files):
    recipe = recipe_of(corpus, evaluated=everything(task_files))
    assert needed.not_installed(recipe) == []
    monkeypatch.setattr(needed.importlib.util, "find_spec", lambda name: None)
    [said] = needed.not_installed(recipe)
    assert "igla-mega[eval]" in said
    assert needed.not_installed(recipe_of(corpus)) == []


def test_a_run_without_a_tokenizer_is_refused_before_a_step(corpus, tmp_path):
    recipe = recipe_of(corpus, evaluated={"prompts": ["abrat"]})
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"tokenizer": None})})
    [said] = ranks.run(1, as_run, dump(recipe), str(tmp_path))
    assert "data.tokenizer: not given" in said and not (tmp_path / "metrics.jsonl").exists()


# --- the command ---


def test_options_of_tasks_without_tasks_are_refused_in_words(tmp_path):
    for words, said in (
        (["--limit", "3"], "--limit: only with --tasks"),
        (["--tasks", " , "], "--tasks: names no task"),
        (["--tasks", "a", "--data", "x", "--nproc", "2"], "--data: is measured in one process"),
    ):
        result = CliRunner().invoke(cli.app, ["eval", str(tmp_path), *words])
        assert isinstance(result.exception, ConfigError) and said in str(result.exception)


def test_eval_for_machines_is_one_object_also_where_a_perplexity_overflows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    monkeypatch.setattr("igla_mega.evaluate.checkpoint.evaluate", lambda *_: {"web": (1000.0, math.inf, 7)})
    monkeypatch.setattr("igla_mega.evaluate.checkpoint.evaluate_tasks", lambda *_: {"choose/acc": 0.5})
    words = ["eval", "run", "--data", "web", "--tasks", "choose", "--json"]
    printed = json.loads(CliRunner().invoke(cli.app, words).stdout)
    assert printed == {
        "checkpoint": "run",
        "sources": {"web": {"loss": 1000.0, "perplexity": None, "tokens": 7}},
        "tasks": {"choose/acc": 0.5},
    }


@pytest.mark.parametrize(("num_batches", "said"), [(4, "first 37 of 45 held-out sequences; `igla-mega eval`"), (5, "")])
def test_a_loss_on_a_part_of_the_held_out_data_says_so(num_batches, said):
    sizes = {"web": 40, "code": 5}
    corpus = SimpleNamespace(validation_names=lambda: [*sizes], num_validation_samples=sizes.get)
    evaluation = SimpleNamespace(num_batches=num_batches)
    recipe = SimpleNamespace(evaluation=evaluation, form="text", name="mine")
    lines: list[str] = []
    session = SimpleNamespace(say=lines.append, trackers=SimpleNamespace(metrics=lambda entry: None))
    share = SimpleNamespace(global_batch=8)
    run = SimpleNamespace(corpus=corpus, recipe=recipe, share=share, session=session)
    log_validation({"web": {"loss": 1.5}}, run, Progress(step=3))
    assert lines[0].startswith("step 3: validation loss (nats/token)  web 1.500") and said in lines[0]
    assert ("eval" in lines[0]) == bool(said)
