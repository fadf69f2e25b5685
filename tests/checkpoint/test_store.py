"""Checkpoints: the same in every layout, bit-exact on resume, whole or not there at all."""

import json
import os
import pickle
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import ranks
import tiny
import torch.distributed as dist

from igla_mega.assemble import load_into
from igla_mega.checkpoint import store
from igla_mega.checkpoint.pieces import Reader
from igla_mega.config.errors import ConfigError

SAVED, LAST = 2, 8

PLAIN, TP, PP = {}, {"tensor_parallel": 2}, {"pipeline_parallel": 2}
SP = {**TP, "sequence_parallel": True}
VPP = {**PP, "virtual_pipeline": 2}
FSDP = {"strategy": "FSDP"}
TIED = {"model": {"tie_embeddings": True}, "training": {"learning_rate": 1e-3}}
BF16 = {"precision": "BF16"}
CP, STEADY = {"context_parallel": 2}, {"training": {"learning_rate": 1e-3}}


def save_and_go_on(recipe, folder: str, last: int, asynchronous: bool = True):
    """Train, save after `SAVED` steps, train on; the reports of the steps behind the save."""
    engine, _ = tiny.engine(recipe)
    rate = recipe.training.learning_rate
    tiny.steps(engine, 0, SAVED, rate)
    writer = store.CheckpointWriter(Path(folder), engine.mesh, store.Retention(3), asynchronous=asynchronous)
    writer.save(engine.optimizer.slots(), store.Progress(step=SAVED), "name: tiny\n")
    reports = tiny.steps(engine, SAVED, last, rate)
    writer.wait()
    return reports


def load_and_go_on(recipe, folder: str, last: int, save_again: str = ""):
    """Load over weights that are all wrong, then train on."""
    engine, shards = tiny.engine(recipe)
    for slot in engine.optimizer.slots():
        for values in slot.values.values():
            values.fill_(0.123)
    path, progress = store.find(Path(folder), engine.mesh, print)
    load_into(engine, shards, path, progress.step)
    if save_again:
        writer = store.CheckpointWriter(Path(save_again), engine.mesh, store.Retention(3), asynchronous=False)
        writer.save(engine.optimizer.slots(), progress, "name: tiny\n")
    return tiny.steps(engine, progress.step, last, recipe.training.learning_rate)


SAME = [
    (1, PLAIN), (2, TP), (2, SP), (2, PP), (2, VPP), (2, {"distributed_optimizer": False}),
    (2, {"distributed_optimizer": True}), (2, FSDP), (4, {**FSDP, **SP}), (4, {**SP, **PP}), (8, {**SP, **VPP}),
    (1, TIED), (2, {**PP, **TIED}), (2, {**FSDP, **TIED}), (2, {**CP, **STEADY}),
    (1, BF16), (2, {**TP, **BF16}), (2, {"distributed_optimizer": True, **BF16}), (2, {**FSDP, **BF16}),
]  # fmt: skip


def label(case) -> str:
    num_ranks, layout = case
    return f"{num_ranks}-" + "-".join(f"{key}={value}" for key, value in layout.items() if key != "training")


@pytest.mark.parametrize("case", SAME, ids=label)
def test_a_resumed_run_repeats_an_unbroken_one_bit_for_bit(case, tmp_path):
    num_ranks, layout = case
    recipe = tiny.recipe(**layout)
    unbroken = ranks.run(num_ranks, save_and_go_on, recipe, str(tmp_path), LAST)[0]
    assert ranks.run(num_ranks, load_and_go_on, recipe, str(tmp_path), LAST)[0] == unbroken


@pytest.mark.parametrize("case", [(1, PLAIN), (2, TP), (2, FSDP)], ids=label)
def test_a_second_resume_repeats_twenty_steps_bit_for_bit(case, tmp_path):
    num_ranks, recipe = case[0], tiny.recipe(**case[1])
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    unbroken = ranks.run(num_ranks, save_and_go_on, recipe, first, SAVED + 20)[0]
    assert ranks.run(num_ranks, load_and_go_on, recipe, first, SAVED + 20, second)[0] == unbroken
    assert ranks.run(num_ranks, load_and_go_on, recipe, second, SAVED + 20)[0] == unbroken


OTHERS = [
    ((2, TP), (1, PLAIN)), ((1, PLAIN), (2, SP)), ((1, PLAIN), (2, PP)), ((2, VPP), (2, TP)),
    ((2, {"distributed_optimizer": True}), (1, PLAIN)), ((1, PLAIN), (2, {"distributed_optimizer": True})),
    ((2, FSDP), (1, PLAIN)), ((1, PLAIN), (2, FSDP)), ((4, {**FSDP, **SP}), (2, TP)), ((2, TP), (4, {**FSDP, **TP})),
    ((4, {**FSDP, **TP}), (2, {"distributed_optimizer": True})), ((4, FSDP), (2, FSDP)),
    ((8, {**SP, **VPP}), (1, PLAIN)),
    ((2, {**PP, **TIED}), (1, TIED)), ((1, TIED), (2, {**PP, **TIED})),
    ((2, {**CP, **STEADY}), (1, STEADY)), ((1, STEADY), (4, {"context_parallel": 4, **STEADY})),
    ((4, {**CP, **TP, **STEADY}), (4, {**CP, **FSDP, **STEADY})),
]  # fmt: skip


@pytest.mark.parametrize("pair", OTHERS, ids=lambda pair: f"{label(pair[0])}-to-{label(pair[1])}")
def test_a_checkpoint_loads_under_another_layout(pair, tmp_path):
    (writers, written), (readers, read) = pair
    unbroken = ranks.run(writers, save_and_go_on, tiny.recipe(**written), str(tmp_path), LAST)[0]
    resumed = ranks.run(readers, load_and_go_on, tiny.recipe(**read), str(tmp_path), LAST)[0]
    for (loss, grad_norm), (expected_loss, expected_norm) in zip(resumed, unbroken, strict=True):
        assert abs(loss - expected_loss) < 1e-5 and abs(grad_norm - expected_norm) < 2e-5


def test_keys_are_global_names_and_shapes_whatever_the_layout(tmp_path):
    shapes = []
    for num_ranks, layout in [(1, PLAIN), (8, {**SP, **PP}), (2, FSDP)]:
        folder = tmp_path / str(num_ranks)
        ranks.run(num_ranks, save_and_go_on, tiny.recipe(**layout), str(folder), SAVED)
        shapes.append({name: tuple(size) for name, size in Reader(store.step_dir(folder, SAVED)).shapes().items()})
    assert shapes[0] == shapes[1] == shapes[2]
    assert shapes[0]["decoder.layers.3.mlp.linear_fc1.weight"] == (192, 64)
    assert shapes[0]["optimizer.exp_avg.output_layer.weight"] == (tiny.VOCAB, 64)
    assert len(shapes[0]) == 3 * (4 * 6 + 3)


def test_another_model_is_refused_with_both_shapes(tmp_path):
    ranks.run(1, save_and_go_on, tiny.recipe(), str(tmp_path), SAVED)
    shapes = r"linear_fc1.weight is \[192, 64\], this recipe's model has \[160, 64\]"
    with pytest.raises(ranks.RankFailed, match=shapes):
        ranks.run(1, load_and_go_on, tiny.recipe(model={"intermediate_size": 80}), str(tmp_path), LAST)
    with pytest.raises(ranks.RankFailed, match=r"holds decoder\.layers\.2"):
        ranks.run(2, load_and_go_on, tiny.recipe(model={"num_layers": 2}, **PP), str(tmp_path), LAST)


def two_checkpoints(recipe, folder: str):
    engine, _ = tiny.engine(recipe)
    writer = store.CheckpointWriter(Path(folder), engine.mesh, store.Retention(3), asynchronous=True)
    for step in (1, 2):
        tiny.steps(engine, step - 1, step)
        writer.save(engine.optimizer.slots(), store.Progress(step=step), "name: tiny\n")
    writer.wait()


def found(recipe, folder: str):
    engine, _ = tiny.engine(recipe)
    said = []
    result = store.find(Path(folder), engine.mesh, said.append)
    return (result and result[1].step), said


def truncate(path: Path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "file, hurt, word",
    [
        ("__0_0.distcp", truncate, "bytes"),
        ("__1_0.distcp", flip, "digest"),
        ("__0_0.distcp", os.remove, "missing"),
        ("manifest.json", truncate, "manifest"),
    ],
)
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(file, hurt, word, tmp_path):
    recipe = tiny.recipe(**TP)
    ranks.run(2, two_checkpoints, recipe, str(tmp_path))
    hurt(store.step_dir(tmp_path, 2) / file)
    step, said = ranks.run(2, found, recipe, str(tmp_path))[0]
    assert step == 1 and word in said[0] and "step_00000002" in said[0]
    hurt(store.step_dir(tmp_path, 1) / file)
    with pytest.raises(ranks.RankFailed, match="every checkpoint is damaged"):
        ranks.run(2, found, recipe, str(tmp_path))


def save_slowly(recipe, folder: str, kill_after_files: int):
    """Save step 2 and die by SIGKILL when so many files of it have appeared."""
    engine, _ = tiny.engine(recipe)
    writer = store.CheckpointWriter(Path(folder), engine.mesh, store.Retention(3), asynchronous=False)
    writer.save(engine.optimizer.slots(), store.Progress(step=1), "name: tiny\n")
    writer.asynchronous = True
    writer.save(engine.optimizer.slots(), store.Progress(step=2), "name: tiny\n")
    temporary = Path(folder) / ".writing_step_00000002"
    while not temporary.exists() or len(list(temporary.iterdir())) < kill_after_files:
        if store.step_dir(Path(folder), 2).exists():
            break
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("kill_after_files", [0, 2, 3, 4, 5])
def test_a_save_survives_kill_9_at_any_instant(kill_after_files, tmp_path):
    with pytest.raises(ranks.RankFailed, match="-9"):
        ranks.run(1, save_slowly, tiny.recipe(), str(tmp_path), kill_after_files)
    step, _ = ranks.run(1, found, tiny.recipe(), str(tmp_path))[0]
    newest = store.steps_in(tmp_path)[-1]
    assert step == newest and store.damage(store.step_dir(tmp_path, newest)) is None
    assert (tmp_path / "latest").read_text().strip() in ("step_00000001", "step_00000002")


@pytest.mark.parametrize("new_is_there", [False, True])
def test_a_kill_while_a_step_is_saved_again_leaves_one_of_both(new_is_there, tmp_path):
    ranks.run(1, two_checkpoints, tiny.recipe(), str(tmp_path))
    newest, aside = store.step_dir(tmp_path, 2), tmp_path / ".replaced_step_00000002"
    shutil.copytree(newest, aside)
    if not new_is_there:
        shutil.rmtree(newest)
    step, said = ranks.run(1, found, tiny.recipe(), str(tmp_path))[0]
    assert (step, said) == (2, []) and not aside.exists() and store.damage(newest) is None


def test_a_step_saved_again_replaces_the_first(tmp_path):
    for _ in range(2):
        ranks.run(1, two_checkpoints, tiny.recipe(), str(tmp_path))
    assert ranks.run(1, found, tiny.recipe(), str(tmp_path))[0][0] == 2
    assert not list(tmp_path.glob(".[rw]*"))


def save_on_a_full_disk(recipe, folder: str):
    engine, _ = tiny.engine(recipe)
    writer = store.CheckpointWriter(Path(folder), engine.mesh, store.Retention(3), asynchronous=True)
    writer.save(engine.optimizer.slots(), store.Progress(step=1), "name: tiny\n")
    writer.wait()
    if dist.get_rank() == dist.get_world_size() - 1:  # of one rank's node alone
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    writer.save(engine.optimizer.slots(), store.Progress(step=2), "name: tiny\n")
    try:
        writer.wait()
    except RuntimeError as error:
        return str(error)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_full_disk_leaves_the_checkpoint_before_whole_and_every_rank_says_so(num_ranks, tmp_path):
    started = time.monotonic()
    messages = ranks.run(num_ranks, save_on_a_full_disk, tiny.recipe(tensor_parallel=num_ranks), str(tmp_path))
    assert time.monotonic() - started < 30
    for message in messages:
        assert "step 2 could not be written" in message and "The checkpoint of step 1 is whole" in message
    assert store.steps_in(tmp_path) == [1] and store.damage(store.step_dir(tmp_path, 1)) is None
    assert not list(tmp_path.glob(".writing_*"))


def test_retention_keeps_the_last_and_every_nth():
    assert store.Retention(2).obsolete([10, 20, 30, 40]) == [10, 20]
    assert store.Retention(1, keep_every=20).obsolete([10, 20, 30, 40, 50]) == [10, 30]
    assert store.Retention(3).obsolete([10]) == []


class Evil:
    def __reduce__(self):
        return os.system, ("true",)


def test_an_index_that_would_run_code_is_refused(tmp_path):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ConfigError, match="which no checkpoint index needs"):
        Reader(tmp_path).read_metadata()


def test_the_manifest_covers_every_file(tmp_path):
    ranks.run(1, save_and_go_on, tiny.recipe(), str(tmp_path), SAVED)
    checkpoint = store.step_dir(tmp_path, SAVED)
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    assert files.keys() | {"manifest.json"} == {path.name for path in checkpoint.iterdir()}
