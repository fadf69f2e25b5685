"""Whole runs over phases: what is logged, held, replayed, and what a resume repeats."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
import ranks
from small_run import Fault, as_rank, lines, train_hurt

from igla_mega import run as engine
from igla_mega.config.errors import ConfigError
from igla_mega.config.load import dump, load_recipe
from igla_mega.data.indexed import IndexedWriter
from igla_mega.distributed.mesh import destroy_process_groups
from igla_mega.train import phases

VOCAB = 64
RECIPE = """
model: {hidden_size: 32, num_layers: 2, num_heads: 4, num_kv_heads: 2, intermediate_size: 48, vocab_size: 64,
  max_position: 64}
training: {batch_size: 8, sequence_length: 32, gradient_clip: 1.0}
distributed: {strategy: DDP, precision: FP32, tensor_parallel: 1, micro_batch_size: 2}
data: {mix: {a: 0.5, b: 0.25, c: 0.25}, validation_fraction: 0.1}
continual: {ewc_lambda: 100, fisher_samples: 6}
checkpoint: {every_steps: 4}
evaluation: {every_steps: 0, num_batches: 1}
logging: {tensorboard: false}
curriculum:
  phases:
    - {name: a, tokens: 1536, lr: 1e-2}
    - {name: second, data: b, tokens: 1400, lr: 1e-2, sequence_length: 16}
    - {name: c, tokens: 1536, lr: 5e-3, replay: 0.25}
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    for number, name in enumerate("abc"):
        generator = np.random.default_rng(number)
        follow = generator.integers(0, VOCAB, (VOCAB, 2))
        with IndexedWriter(folder / name, np.uint16) as writer:
            for _ in range(30):
                tokens = [int(generator.integers(0, VOCAB))]
                for _ in range(99):
                    tokens.append(int(follow[tokens[-1], generator.integers(0, 2)]))
                writer.add(np.array(tokens), np.array([100]))
    return {name: str(folder / name) for name in "abc"}


@pytest.fixture(scope="module")
def recipe_of(sources, tmp_path_factory):
    def make(*overrides: str, text: str = RECIPE) -> str:
        path = tmp_path_factory.mktemp("recipe") / "small.yaml"
        path.write_text(text)
        given = [f"data.sources={json.dumps(sources)}", *overrides]
        return dump(load_recipe(path, overrides=given))

    return make


def call_train(recipe, run_dir: Path, stop_after: int | None, fail_in_finish: bool):
    if fail_in_finish:

        def fail(*_):
            destroy_process_groups()
            raise InterruptedError

        phases.Learning.finish = fail  # type: ignore[method-assign]
    with contextlib.suppress(InterruptedError):
        engine.train(recipe, run_dir, stop_after=stop_after)


def train(text: str, run_dir: Path, *, num_ranks: int = 1, stop_after: int | None = None, fail: bool = False) -> str:
    return ranks.run(num_ranks, as_rank, call_train, text, str(run_dir), stop_after, fail)[0]


def steps(run_dir: Path) -> list[tuple]:
    kept = ("step", "stage", "loss", "grad_norm", "learning_rate", "tokens", "ewc_nats", "ewc_grad_norm")
    return [tuple(entry.get(key) for key in kept) for entry in lines(run_dir, "metrics.jsonl") if "loss" in entry]


def matrix(run_dir: Path) -> dict:
    return next(entry for entry in reversed(lines(run_dir, "metrics.jsonl")) if "forgetting_matrix" in entry)


@pytest.fixture(scope="module")
def unbroken(recipe_of, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("unbroken")
    return run_dir, train(recipe_of(), run_dir)


def test_a_run_over_phases_says_what_it_does(unbroken):
    _, said = unbroken
    for line in (
        "steps 1 to 6: a, 8 x 32 tokens at 0.01 (a 0.57 epochs)",
        "second: 1,400 tokens are rounded up to 11 batches of 128, 1,408 in all.",
        "EWC: no base model, so nothing is anchored until step 6, where the Fisher of a is taken",
        "EWC: second is anchored from here on (6 sequences, 96 tokens)",
        "backward transfer",
    ):
        assert line in said


def test_nothing_pulls_in_the_first_phase_and_something_in_the_others(unbroken):
    for step, stage, *_, nats, grad_norm in steps(unbroken[0]):
        if stage == "a":
            assert nats is None
        else:
            # The first step of a phase is at its anchor.
            assert (nats == grad_norm == 0.0) == (step in (7, 18)) and nats >= 0.0


def test_after_each_phase_every_domain_so_far_is_measured(unbroken):
    found = [entry for entry in lines(unbroken[0], "metrics.jsonl") if "forgetting_matrix" in entry]
    assert [entry["step"] for entry in found] == [6, 17, 23]
    last = found[-1]
    assert (last["domains"], last["phases"]) == (["a", "second", "c"], ["a", "second", "c"])
    rows = last["forgetting_matrix"]
    assert [[loss is not None for loss in row] for row in rows] == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert found[0]["forgetting_matrix"] == [[rows[0][0]]] and found[0]["backward_transfer"] is None
    expected = ((rows[0][0] - rows[2][0]) + (rows[1][1] - rows[2][1])) / 2
    assert last["backward_transfer"] == pytest.approx(expected)


def test_replay_draws_its_share_from_the_phases_before(unbroken):
    lines = [json.loads(line) for line in (unbroken[0] / "ledger.jsonl").read_text().splitlines()]
    drawn = {"a": 0, "b": 0, "c": 0}
    for line in lines[17:]:
        for name, taken in line["sources"].items():
            drawn[name] += taken["samples"][1] - taken["samples"][0]
    assert drawn == {"a": 6, "b": 6, "c": 36}
    assert {line["sequence_length"] for line in lines[6:17]} == {16}


@pytest.mark.parametrize("stops", [[3, 10], [6, 17]], ids=["inside phases", "between phases"])
def test_a_resume_repeats_an_unbroken_run_bit_for_bit(stops, unbroken, recipe_of, tmp_path):
    for stop in stops:
        train(recipe_of(), tmp_path, stop_after=stop)
    train(recipe_of(), tmp_path)
    assert steps(tmp_path) == steps(unbroken[0])
    assert matrix(tmp_path) == matrix(unbroken[0])


def test_a_run_killed_before_its_fisher_was_taken_takes_it_on_resume(unbroken, recipe_of, tmp_path):
    train(recipe_of(), tmp_path, fail=True)
    assert len(steps(tmp_path)) == 6
    train(recipe_of(), tmp_path)
    assert steps(tmp_path) == steps(unbroken[0]) and matrix(tmp_path) == matrix(unbroken[0])


@pytest.mark.parametrize(
    ("num_ranks", "layout"),
    [
        (2, ["distributed.strategy=FSDP"]),
        (4, ["distributed.tensor_parallel=2", "distributed.pipeline_parallel=2"]),
    ],
)
def test_a_layout_learns_and_forgets_as_one_process(num_ranks, layout, unbroken, recipe_of, tmp_path):
    train(recipe_of(*layout), tmp_path, num_ranks=num_ranks)
    for found, expected in zip(steps(tmp_path), steps(unbroken[0]), strict=True):
        assert found[:2] == expected[:2] and found[2:4] == pytest.approx(expected[2:4], abs=2e-4)
    for row, expected in zip(
        matrix(tmp_path)["forgetting_matrix"], matrix(unbroken[0])["forgetting_matrix"], strict=True
    ):
        assert [x for x in row if x is not None] == pytest.approx([x for x in expected if x is not None], abs=2e-4)


def test_lambda_zero_measures_forgetting_and_holds_nothing(recipe_of, tmp_path):
    said = train(recipe_of("continual.ewc_lambda=0"), tmp_path)
    assert "EWC" not in said and len(matrix(tmp_path)["forgetting_matrix"]) == 3
    assert not list(tmp_path.glob("checkpoints/*/fisher.json"))


def refused(recipe, run_dir: Path):
    with pytest.raises(ConfigError, match="fisher_samples: 200 takes 200 sequences of 32 tokens from a, which has 84"):
        engine.train(recipe, run_dir)
    destroy_process_groups()


def test_more_samples_than_the_data_has_are_refused(recipe_of, tmp_path):
    ranks.run(1, as_rank, refused, recipe_of("continual.fisher_samples=200"), str(tmp_path))


def call_fisher(recipe, run_dir: Path, checkpoint: str):
    engine.take_fisher(Path(checkpoint), recipe, run_dir / "fisher")


@pytest.fixture(scope="module")
def base(unbroken):
    return unbroken[0] / "checkpoints" / "step_00000023"


def test_a_base_model_is_held_by_the_fisher_of_its_data(base, recipe_of, tmp_path):
    based = recipe_of("model=null", f"base_model={base}", "continual.base_data=b")
    said = train(based, tmp_path / "run", stop_after=6)
    assert f"EWC: {base} is anchored with lambda 100 per token, by its Fisher on b (6 sequences, 192 tokens)" in said
    found = matrix(tmp_path / "run")
    assert (found["domains"], found["phases"]) == (["b", "a"], ["base", "a"])
    assert found["forgetting_matrix"][0][1] is None
    assert steps(tmp_path / "run")[1][-2] > 0

    # The same Fisher, taken beforehand, pulls the same.
    ranks.run(1, as_rank, call_fisher, based, str(tmp_path), str(base))
    given = recipe_of("model=null", f"base_model={base}", f"continual.fisher={tmp_path / 'fisher'}")
    said = train(given, tmp_path / "given", stop_after=6)
    assert f"by the Fisher of {tmp_path / 'fisher'}" in said
    assert steps(tmp_path / "given") == steps(tmp_path / "run")


def test_a_base_model_of_unknown_data_is_not_held_at_first(base, recipe_of, tmp_path):
    said = train(recipe_of("model=null", f"base_model={base}"), tmp_path, stop_after=2)
    assert "continual.base_data does not say what" in said and "a trains without a pull" in said
    assert steps(tmp_path)[1][-1] is None


KOSHEY = RECIPE.split("continual:")[0] + RECIPE[RECIPE.index("checkpoint:") : RECIPE.index("curriculum:")]


def test_koshey_takes_its_first_fisher_at_the_first_consolidation_or_at_the_end(recipe_of, tmp_path):
    held = "koshey={ewc_enabled: true, ewc_lambda: 100, fisher_samples: 4%s}"
    plain = ("training.total_steps=8",)
    said = train(recipe_of(*plain, held % "", text=KOSHEY), tmp_path / "end")
    assert "nothing is anchored until the end, where Fisher and anchor are taken" in said
    assert {step[-1] for step in steps(tmp_path / "end")} == {None}
    assert (tmp_path / "end" / "checkpoints" / "step_00000008" / "fisher.json").is_file()

    train(recipe_of(*plain, held % ", consolidate_every: 1000", text=KOSHEY), tmp_path / "online")
    pulled, free = steps(tmp_path / "online"), steps(tmp_path / "end")
    # The same run until the first end of 4 steps, one step more at the anchor, and then pulled.
    assert [step[:6] for step in pulled[:5]] == [step[:6] for step in free[:5]]
    assert pulled[4][-1] == 0.0 and pulled[5][-1] > 0.0 and pulled[6][2] != free[6][2]


def test_a_fault_that_does_not_come_again_leaves_the_pull_as_it_was(recipe_of, tmp_path):
    held = "koshey={ewc_enabled: true, ewc_lambda: 100, fisher_samples: 4, consolidate_every: 1000}"
    text = recipe_of("training.total_steps=8", held, text=KOSHEY)
    train(text, tmp_path / "clean", num_ranks=2)
    ranks.run(2, as_rank, train_hurt, text, str(tmp_path / "hurt"), Fault(1, 7, "final_layernorm", times=1))
    assert steps(tmp_path / "hurt") == steps(tmp_path / "clean") and steps(tmp_path / "hurt")[6][-1] > 0
    assert lines(tmp_path / "hurt", "bad_steps.jsonl")[0]["verdict"] == "transient"


def test_ring_attention_and_the_pull_go_together(base, recipe_of, tmp_path):
    koshey = "koshey={ring_attention: true, ewc_enabled: true, ewc_lambda: 100, fisher_samples: 4}"
    given = ("training.total_steps=5", "model=null", f"base_model={base}", koshey)
    said = train(recipe_of(*given, text=KOSHEY), tmp_path / "one")
    assert "by its Fisher on mix (4 sequences, 128 tokens)" in said
    expected = steps(tmp_path / "one")
    assert expected[1][-2] > 0
    layout = ("distributed.tensor_parallel=2", "distributed.context_parallel=2")
    train(recipe_of(*given, *layout, text=KOSHEY), tmp_path / "four", num_ranks=4)
    for found, one in zip(steps(tmp_path / "four"), expected, strict=True):
        assert found[2:4] + found[6:] == pytest.approx(one[2:4] + one[6:], rel=1e-3)
