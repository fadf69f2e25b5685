"""The pull is the same in every layout, and what is held survives checkpoints."""

import dataclasses
import json
from pathlib import Path

import pytest
import ranks
import tiny
import torch
from states import pieces, whole

from igla_mega.checkpoint import store
from igla_mega.checkpoint.load import find_checkpoint
from igla_mega.checkpoint.progress import Progress, Retention
from igla_mega.config.errors import ConfigError
from igla_mega.engine.build import load_into
from igla_mega.objective.ewc import PER_TOKEN, Ewc, FisherAnchor, FisherMetadata, weights_digest
from igla_mega.train import consolidation

TP, PP = {"tensor_parallel": 2}, {"pipeline_parallel": 2}
SP = {**TP, "sequence_parallel": True}
FSDP = {"strategy": "FSDP"}
STEADY = {"training": {"learning_rate": 1e-3}}
TIED = {"model": {"tie_embeddings": True}}
LAMBDA = 300.0


def label(case) -> str:
    return "-".join(str(part) for part in case) if isinstance(case, tuple) else str(case)


def held(built, coupling: str = "coupled", ewc_lambda: float = LAMBDA, shift: float = 0.01):
    """The engine with an EWC whose Fisher is a function of the weights, and whose anchor is near them."""
    states = list(built.optimizer.states())
    ewc = Ewc(built.mesh, ewc_lambda, coupling)
    anchors = [FisherAnchor(s.values["master"].square().mul(0.1), s.values["master"] + shift) for s in states]
    ewc.hold(
        states, anchors, FisherMetadata(PER_TOKEN, "model", 3, 96, 32, 1, ("a",), weights_digest(built.mesh, states))
    )
    return dataclasses.replace(built, ewc=ewc)


def pulled(recipe, coupling: str = "coupled", ewc_lambda: float = LAMBDA, shift: float = 0.01, num_steps: int = 5):
    built = held(tiny.engine(recipe)[0], coupling, ewc_lambda, shift)
    reports = []
    for step in range(num_steps):
        rows = tiny.batches(step, built.layout, built.mesh.data.rank)
        report = tiny.train_step(built, rows, step=step, seed=1, learning_rate=1e-3)
        assert report.pull is not None
        reports.append((report.loss, report.grad_norm, *dataclasses.astuple(report.pull)))
    return reports


@pytest.fixture(scope="module")
def one_process():
    return {c: ranks.run(1, pulled, tiny.recipe(**STEADY), c)[0] for c in ("coupled", "decoupled", "proximal")}


@pytest.fixture(scope="module")
def one_tied_process():
    return ranks.run(1, pulled, tiny.recipe(**STEADY, **TIED))[0]


CASES = [
    *[(n, layout, "coupled") for n, layout in [
        (1, {"micro_batch_size": 4}), (2, TP), (2, SP), (2, PP), (2, {**PP, "virtual_pipeline": 2}), (2, FSDP),
        (2, {"distributed_optimizer": False}), (2, {"distributed_optimizer": True}), (2, {"context_parallel": 2}),
        (4, {**FSDP, **SP}), (4, {**SP, **PP}),
    ]],
    *[(2, layout, coupling) for coupling in ("decoupled", "proximal") for layout in (TP, FSDP, {})],
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=label)
def test_the_pull_is_that_of_one_process(case, one_process):
    num_ranks, layout, coupling = case
    results = ranks.run(num_ranks, pulled, tiny.recipe(**STEADY, **layout), coupling)
    assert all(result == results[0] for result in results)
    for found, expected in zip(results[0], one_process[coupling], strict=True):
        assert found == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("case", [(2, PP), (2, TP), (2, FSDP)], ids=label)
def test_tied_embeddings_are_pulled_and_counted_once(case, one_tied_process):
    found = ranks.run(case[0], pulled, tiny.recipe(**STEADY, **TIED, **case[1]))[0]
    for one, other in zip(found, one_tied_process, strict=True):
        assert one == pytest.approx(other, rel=2e-5)


@pytest.mark.parametrize("case", [(1, {}), (2, TP), (2, FSDP), (2, {})], ids=label)
def test_bf16_is_pulled_as_fp32_is(case, one_process):
    found = ranks.run(case[0], pulled, tiny.recipe(**STEADY, precision="BF16", **case[1]))[0]
    for one, other in zip(found, one_process["coupled"], strict=True):
        assert one == pytest.approx(other, rel=3e-2)
    # The penalty itself is between fp32 masters and an fp32 anchor, which bf16 does not touch.
    assert found[0][2] == pytest.approx(one_process["coupled"][0][2], rel=1e-5)


def against_autograd(recipe):
    """The gradient of penalty and task by autograd, and what the optimizer has made of the task's alone."""
    built = held(tiny.engine(recipe)[0])
    optimizer = built.optimizer
    states, gradients = list(optimizer.states()), None
    torch.manual_seed(0)
    sizes = [state.values["master"].numel() for state in states]
    gradients = [torch.randn(size) for size in sizes]
    weights = [state.values["master"].double().requires_grad_() for state in states]
    penalty = sum(
        (LAMBDA / 2 * anchors.fisher.double() * (weight - anchors.anchor.double()).square()).sum()
        for weight, anchors in zip(weights, built.ewc.anchors, strict=True)
    )
    expected = [
        gradient.double() + pull
        for gradient, pull in zip(gradients, torch.autograd.grad(penalty, weights), strict=True)
    ]
    pull = built.ewc.pull(states, gradients)
    errors = [float((g - e).abs().max() / e.abs().max()) for g, e in zip(gradients, expected, strict=True)]
    return max(errors), pull.nats / float(penalty) - 1


def test_the_pull_is_the_gradient_of_the_penalty():
    error, value_error = ranks.run(1, against_autograd, tiny.recipe())[0]
    assert error < 1e-6 and abs(value_error) < 1e-6


def free(recipe):
    return [(*report, 0.0, 0.0, report[1]) for report in tiny.steps(tiny.engine(recipe)[0], 0, 1, 1e-3)]


def test_at_the_anchor_nothing_pulls():
    at_anchor = ranks.run(1, pulled, tiny.recipe(**STEADY), "coupled", LAMBDA, 0.0, 1)[0]
    assert at_anchor[0] == pytest.approx(ranks.run(1, free, tiny.recipe(**STEADY))[0][0], rel=1e-6)
    assert at_anchor[0][2:4] == (0.0, 0.0)


def test_decoupled_clips_the_task_alone_and_coupled_both():
    strong = {"training": {"learning_rate": 1e-3, "gradient_clip": 1.0}}
    coupled = ranks.run(1, pulled, tiny.recipe(**strong), "coupled", 3e4, 0.01, 1)[0][0]
    decoupled = ranks.run(1, pulled, tiny.recipe(**strong), "decoupled", 3e4, 0.01, 1)[0][0]
    assert coupled[1] > 2 * decoupled[1]  # the norm before clipping, with the pull and without
    assert decoupled[1] == pytest.approx(coupled[4], rel=1e-5)  # of the task alone
    assert decoupled[4] == pytest.approx(min(1.0, decoupled[1]), rel=1e-3)  # what it was added to: the clipped one


def test_proximal_stays_near_the_anchor_at_a_lambda_that_makes_coupled_swing():
    away = {c: ranks.run(1, pulled, tiny.recipe(training={"gradient_clip": 0.0}), c, 1e9, 0.01, 6)[0] for c in
            ("coupled", "proximal")}  # fmt: skip
    assert away["proximal"][-1][2] < 0.01 * away["proximal"][0][2]
    assert away["coupled"][-1][2] > 10 * away["proximal"][-1][2]


def save(recipe, folder: str):
    built = held(tiny.engine(recipe)[0])
    writer = store.CheckpointWriter(Path(folder), built.mesh, Retention(3), asynchronous=False)
    writer.save(built.states(), Progress(step=2), "name: tiny\n", consolidation.notes(built.ewc))
    return pieces(built, [s.fisher for s in built.ewc.anchors]), pieces(built, [s.anchor for s in built.ewc.anchors])


def load(recipe, folder: str, with_ewc: bool = True):
    built, shards = tiny.engine(recipe)
    if with_ewc:
        built = dataclasses.replace(built, ewc=Ewc(built.mesh, LAMBDA))
    path, progress = find_checkpoint(Path(folder), built.mesh, print)
    with consolidation.restoring(built, path):
        load_into(built, shards, path, progress.step)
    if not with_ewc:
        return tiny.steps(built, 2, 3)
    assert built.ewc.metadata.sources == ("a",)
    return pieces(built, [s.fisher for s in built.ewc.anchors]), pieces(built, [s.anchor for s in built.ewc.anchors])


@pytest.mark.parametrize("pair", [((4, {}), (2, {})), ((4, {**FSDP, **SP}), (2, PP)), ((1, {}), (2, FSDP))], ids=label)
def test_what_is_held_is_saved_in_one_layout_and_loaded_in_another(pair, tmp_path):
    (writers, written), (readers, read) = pair
    saved = ranks.run(writers, save, tiny.recipe(**written), str(tmp_path))
    loaded = ranks.run(readers, load, tiny.recipe(**read), str(tmp_path))
    for kind in (0, 1):
        ours, theirs = whole([part[kind] for part in loaded]), whole([part[kind] for part in saved])
        assert ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in ours)


def test_a_checkpoint_with_something_held_loads_where_nothing_is_asked_for(tmp_path):
    ranks.run(1, save, tiny.recipe(), str(tmp_path))
    assert ranks.run(1, load, tiny.recipe(), str(tmp_path), False)[0]


def write_alone(recipe, folder: str):
    built = held(tiny.engine(recipe)[0], shift=0.0)
    consolidation.save_file(built, Path(folder), "name: tiny\n")


def hold_alone(recipe, folder: str):
    built = dataclasses.replace(tiny.engine(recipe)[0], ewc=None)
    built = dataclasses.replace(built, ewc=Ewc(built.mesh, LAMBDA))
    try:
        consolidation.hold_file(built, Path(folder))
    except ConfigError as error:
        return str(error)
    return built.ewc.pull(list(built.optimizer.states()), [torch.zeros_like(s.fisher) for s in built.ewc.anchors]).nats


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fisher") / "of_tiny"
    ranks.run(2, write_alone, tiny.recipe(**FSDP), str(folder))
    return folder


def test_a_fisher_of_its_own_holds_the_model_it_was_taken_of_in_any_layout(alone):
    assert ranks.run(1, hold_alone, tiny.recipe(), str(alone)) == [0.0]
    assert ranks.run(4, hold_alone, tiny.recipe(**SP, **PP), str(alone)) == [0.0] * 4


def test_a_fisher_of_another_model_or_normalisation_or_cut_short_is_refused(alone, tmp_path):
    other = tiny.recipe(training={"seed": 7})
    assert "of another model" in ranks.run(2, hold_alone, other, str(alone))[1]
    assert "250, 64], this recipe's model has [249, 64" in ranks.run(
        1, hold_alone, tiny.recipe(model={"vocab_size": 249}), str(alone)
    )[0]  # fmt: skip

    for name, spoil in {
        "normalised": lambda folder: retold(folder, {"normalization": "per sequence"}),
        "short": lambda folder: next(folder.glob("*.distcp")).write_bytes(b"short"),
        "absent": lambda folder: retold(folder, None),
    }.items():
        copy = tmp_path / name
        copy.mkdir()
        for file in alone.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        spoil(copy)
        said = ranks.run(1, hold_alone, tiny.recipe(), str(copy))[0]
        expected = {
            "normalised": "a Fisher `per sequence`, but",
            "short": "has 5 bytes",
            "absent": "fisher.json is missing",
        }
        assert expected[name] in said


def retold(folder: Path, change: dict | None) -> None:
    """Another fisher.json, or none, sealed as if it had been written so."""
    path = folder / consolidation.ORIGIN
    content = json.loads(path.read_text())
    path.unlink()
    if change is not None:
        path.write_text(json.dumps({**content, **change}))
    (folder / store.MANIFEST).unlink()
    store.write_manifest(folder, {})
