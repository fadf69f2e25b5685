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

from igla_mega.checkpoint import integrity, remote, store
from igla_mega.checkpoint.load import find_checkpoint
from igla_mega.checkpoint.local import Local, folder_of
from igla_mega.checkpoint.pieces import Reader, read_whole
from igla_mega.checkpoint.progress import Progress, Retention
from igla_mega.config.errors import ConfigError
from igla_mega.engine.build import load_into

SAVED, LAST = 2, 6

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
    writer = store.CheckpointWriter(Path(folder), engine.mesh, Retention(3), asynchronous=asynchronous)
    writer.save(engine.optimizer.states(), Progress(step=SAVED), "name: tiny\n")
    reports = tiny.steps(engine, SAVED, last, rate)
    writer.wait()
    return reports


def load_and_go_on(recipe, folder: str, last: int, save_again: str = ""):
    """Load over weights that are all wrong, then train on."""
    engine, shards = tiny.engine(recipe)
    for state in engine.optimizer.states():
        for values in state.values.values():
            values.fill_(0.123)
    path, progress = find_checkpoint(Path(folder), engine.mesh, print)
    load_into(engine, shards, path, progress.step)
    if save_again:
        writer = store.CheckpointWriter(Path(save_again), engine.mesh, Retention(3), asynchronous=False)
        writer.save(engine.optimizer.states(), progress, "name: tiny\n")
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


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoint folder of a layout and the reports of the steps after it, by one run for all tests."""
    runs: dict[str, tuple[str, list]] = {}

    def of(num_ranks: int, layout: dict) -> tuple[str, list]:
        if (key := str((num_ranks, layout))) not in runs:
            folder = str(tmp_path_factory.mktemp("saved"))
            reports = ranks.run(num_ranks, save_and_go_on, tiny.recipe(**layout), folder, LAST)[0]
            runs[key] = folder, reports
        return runs[key]

    return of


@pytest.mark.parametrize("case", SAME, ids=label)
def test_a_resumed_run_repeats_an_unbroken_one_bit_for_bit(case, saved):
    folder, unbroken = saved(*case)
    assert ranks.run(case[0], load_and_go_on, tiny.recipe(**case[1]), folder, LAST)[0] == unbroken


@pytest.mark.parametrize("case", [(1, PLAIN), (2, FSDP)], ids=label)
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
def test_a_checkpoint_loads_under_another_layout(pair, saved):
    writer, (readers, read) = pair
    folder, unbroken = saved(*writer)
    resumed = ranks.run(readers, load_and_go_on, tiny.recipe(**read), folder, LAST)[0]
    for (loss, grad_norm), (expected_loss, expected_norm) in zip(resumed, unbroken, strict=True):
        assert abs(loss - expected_loss) < 1e-5 and abs(grad_norm - expected_norm) < 2e-5


def test_keys_are_global_names_and_shapes_whatever_the_layout(saved):
    shapes = []
    for case in [(1, PLAIN), (8, {**SP, **VPP}), (2, FSDP)]:
        folder = Path(saved(*case)[0])
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
    writer = store.CheckpointWriter(Path(folder), engine.mesh, Retention(3), asynchronous=True)
    for step in (1, 2):
        tiny.steps(engine, step - 1, step)
        writer.save(engine.optimizer.states(), Progress(step=step), "name: tiny\n")
    writer.wait()


def found(recipe, folder: str):
    engine, _ = tiny.engine(recipe)
    said = []
    result = find_checkpoint(Path(folder), engine.mesh, said.append)
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
    writer = store.CheckpointWriter(Path(folder), engine.mesh, Retention(3), asynchronous=False)
    writer.save(engine.optimizer.states(), Progress(step=1), "name: tiny\n")
    writer.asynchronous = True
    writer.save(engine.optimizer.states(), Progress(step=2), "name: tiny\n")
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
    writer = store.CheckpointWriter(Path(folder), engine.mesh, Retention(3), asynchronous=True)
    writer.save(engine.optimizer.states(), Progress(step=1), "name: tiny\n")
    writer.wait()
    if dist.get_rank() == dist.get_world_size() - 1:  # of one rank's node alone
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
    writer.save(engine.optimizer.states(), Progress(step=2), "name: tiny\n")
    (outcome,) = writer.wait()
    with pytest.raises(RuntimeError, match="Training after step 1 is lost"):
        writer.refuse_loss()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    tiny.steps(engine, 0, 1)  # the run continues
    writer.save(engine.optimizer.states(), Progress(step=3), "name: tiny\n")
    (after,) = writer.finish()
    writer.refuse_loss()
    return outcome, after


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_full_disk_leaves_the_checkpoint_before_whole_and_every_rank_says_so(num_ranks, tmp_path):
    started = time.monotonic()
    messages = ranks.run(num_ranks, save_on_a_full_disk, tiny.recipe(tensor_parallel=num_ranks), str(tmp_path))
    assert time.monotonic() - started < 60
    for failed, after in messages:
        assert "step 2 could not be written" in failed.error and "The checkpoint of step 1 is complete" in failed.error
        assert "File too large" in failed.error
        assert (failed.step, failed.bytes, failed.where) == (2, 0, "shared")
        assert after.error is None and after.bytes > 100_000 and "saves succeed again" in after.note
    assert store.steps_in(tmp_path) == [1, 3] and store.damage(store.step_dir(tmp_path, 1)) is None
    assert not list(tmp_path.glob(".writing_*"))


def save_without_its_mount(recipe, folder: str):
    engine, _ = tiny.engine(recipe)
    root = Path(folder, "checkpoints")
    writer = store.CheckpointWriter(root, engine.mesh, Retention(3), asynchronous=True)
    outcomes = []
    for step in (1, 2, 3):
        dist.barrier()
        if dist.get_rank() == 0 and step == 2:
            os.rename(root, Path(folder, "away"))
        if dist.get_rank() == 0 and step == 3:
            os.rename(Path(folder, "away"), root)
        dist.barrier()
        writer.save(engine.optimizer.states(), Progress(step=step), "name: tiny\n")
        outcomes += writer.wait()
    return outcomes


def test_a_mount_that_is_lost_fails_saves_until_it_is_back_and_nothing_is_written_beside_it(tmp_path):
    for outcomes in ranks.run(2, save_without_its_mount, tiny.recipe(**TP), str(tmp_path)):
        assert [outcome.error is None for outcome in outcomes] == [True, False, True]
        assert "the folder no longer exists" in outcomes[1].error
    assert store.steps_in(tmp_path / "checkpoints") == [1, 3] and not (tmp_path / "away").exists()


def save_within(recipe, folder: str, most: int | None):
    engine, _ = tiny.engine(recipe)
    tiny.steps(engine, 0, SAVED)
    writer = store.CheckpointWriter(Path(folder), engine.mesh, Retention(3), asynchronous=True, staging_bytes=most)
    states = list(engine.optimizer.states())
    own = store._Staging(most)
    state = store._to_write(states, engine.mesh, own)
    late = sum(pieces.made_late(at) for pieces in state.values() for at in pieces.pieces)
    writer.save(states, Progress(step=SAVED), "name: tiny\n")
    for state in states:  # as further training does
        for values in state.values.values():
            values.fill_(-7.0)
    (outcome,) = writer.finish()
    return own.bytes, own.late_bytes, late, outcome.note


@pytest.mark.parametrize("layout", [TP, {"distributed_optimizer": True}, FSDP], ids=str)
def test_a_save_that_stages_less_than_it_writes_is_the_same_save(layout, tmp_path):
    digests = []
    for most in (None, 200_000, 0):
        folder = tmp_path / str(most)
        for staged, late, pieces, note in ranks.run(2, save_within, tiny.recipe(**layout), str(folder), most):
            assert most is None or staged <= most
            assert (late > 0) == (pieces > 0) == (most is not None) and (note is not None) == (late > 0)
            assert note is None or "staging_memory" in note
        checkpoint = store.step_dir(folder, SAVED)
        assert store.damage(checkpoint) is None
        digests.append(ranks.run(1, tensors_of, str(checkpoint))[0])
    assert digests[0] == digests[1] == digests[2]


def tensors_of(folder: str) -> dict[str, list]:
    reader = Reader(Path(folder))
    return {name: read_whole(reader, name).flatten()[:50].tolist() for name in sorted(reader.shapes())}


def test_retention_keeps_the_last_and_every_nth():
    assert Retention(2).obsolete([10, 20, 30, 40]) == [10, 20]
    assert Retention(1, keep_every=20).obsolete([10, 20, 30, 40, 50]) == [10, 30]
    assert Retention(3).obsolete([10]) == []


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


@pytest.mark.parametrize("hurt, word", [(flip, "digest"), (truncate, "bytes"), (os.remove, "missing")])
def test_no_tensor_is_read_from_a_checkpoint_before_its_digests_are_checked(hurt, word, tmp_path):
    ranks.run(1, save_and_go_on, tiny.recipe(), str(tmp_path), SAVED)
    checkpoint = store.step_dir(tmp_path, SAVED)
    name = next(iter(Reader(checkpoint).shapes()))
    read_whole(Reader(checkpoint), name)
    # What was checked is not checked again, until the checkpoint is another.
    assert integrity.is_verified(checkpoint)
    os.utime(checkpoint / "manifest.json", ns=(1, 1))
    hurt(checkpoint / "__0_0.distcp")
    with pytest.raises(ConfigError, match=rf"__0_0.distcp .*{word}"):
        read_whole(Reader(checkpoint), name)


def test_a_manifest_that_points_outside_its_folder_is_refused(tmp_path):
    folder = store.step_dir(tmp_path, 1)
    folder.mkdir()
    (tmp_path / "secret").write_text("x")
    for name in ("../secret", "/etc/passwd"):
        (folder / "manifest.json").write_text(json.dumps({"files": {name: {"bytes": 1, "blake2b": ""}}}))
        assert "outside the checkpoint" in store.damage(folder)
    for content in ('{"format": 1, "files": {}}', json.dumps({"files": {"a": {"bytes": 1, "blake2b": ""}}})):
        (folder / "manifest.json").write_text(content)
        assert "but not .metadata, which every checkpoint has" in store.damage(folder)
    for content in ("", "[]", '{"files": {"a": 3}}', '{"files": {"a": {"bytes": "1", "blake2b": 2}}}'):
        (folder / "manifest.json").write_text(content)
        assert "manifest.json cannot be read" in store.damage(folder)


def test_check_lists_every_checkpoint_of_a_run_and_names_what_is_damaged_extra_or_unfinished(tmp_path):
    root = tmp_path / "run" / "checkpoints"
    for step in (1, 2, 3):
        folder = store.step_dir(root, step)
        folder.mkdir(parents=True)
        (folder / ".metadata").write_bytes(b"abc")
        entry = {"bytes": 3, "blake2b": integrity.digest(folder / ".metadata")}
        (folder / "manifest.json").write_text(json.dumps({"format": 1, "files": {".metadata": entry}}))
    (root / ".writing_step_00000004").mkdir()
    (store.step_dir(root, 1) / "extra.txt").write_text("x")
    (store.step_dir(root, 2) / ".metadata").write_bytes(b"abd")
    (store.step_dir(root, 3) / "manifest.json").unlink()
    for folder in (tmp_path / "run", root):
        lines, damages = integrity.report(folder)
        assert "step_00000001: every file" in lines[0] and "extra.txt" in lines[1] and "is incomplete" in lines[-1]
        assert "step_00000002: .metadata" in damages[0] and "step_00000003: manifest.json is missing" in damages[1]
    assert integrity.report(store.step_dir(root, 1))[1] == []
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        integrity.report(tmp_path / "run" / "nothing")


def test_check_takes_the_folder_of_a_node_rank_by_rank(tmp_path):
    run = tmp_path / "node0" / "run-a13c84d7"
    begun, whole = (store.step_dir(run, step) for step in (2, 4))
    (begun / ".writing_rank_00000").mkdir(parents=True)
    (whole / "rank_00000").mkdir(parents=True)
    (whole / "rank_00000" / ".metadata").write_bytes(b"abc")
    entry = {"bytes": 3, "blake2b": integrity.digest(whole / "rank_00000" / ".metadata")}
    (whole / "rank_00000" / "manifest.json").write_text(json.dumps({"format": 1, "files": {".metadata": entry}}))
    for folder in (run, run.parent):
        lines, damages = integrity.report(folder)
        assert damages == [] and "step_00000004/rank_00000: every file" in lines[0]
    assert "step_00000002/.writing_rank_00000: is incomplete" in integrity.report(run)[0][1]
    assert len(integrity.report(whole)[0]) == 1 and "is incomplete" in integrity.report(begun)[0][0]
    (whole / "rank_00001").mkdir()
    assert "rank_00001: manifest.json is missing" in integrity.report(run)[1][0]


def two_level(recipe, folder: str, nodes: list[int], lost: int | None = None):
    """Save step 2 on shared storage and step 4 on each node, train on to `LAST`."""
    os.environ["GROUP_RANK"] = str(nodes[dist.get_rank()])
    engine, _ = tiny.engine(recipe)
    tiny.steps(engine, 0, SAVED)
    local = Local(folder_of(f"{folder}/node{{node}}", "run"), engine.mesh, engine.mesh.host_group, "same")
    writer = store.CheckpointWriter(Path(folder, "shared"), engine.mesh, Retention(3), asynchronous=True, local=local)
    writer.save(engine.states(), Progress(step=SAVED), "name: tiny\n")
    reports = tiny.steps(engine, SAVED, 2 * SAVED)
    writer.save(engine.states(), Progress(step=2 * SAVED), "name: tiny\n", local=True)
    reports += tiny.steps(engine, 2 * SAVED, LAST)
    assert [(outcome.where, outcome.error) for outcome in writer.finish()] == [("shared", None), ("local", None)]
    return reports


def resume_two_level(recipe, folder: str, nodes: list[int], layout: str = "same"):
    os.environ["GROUP_RANK"] = str(nodes[dist.get_rank()])
    engine, shards = tiny.engine(recipe)
    for state in engine.states():
        for values in state.values.values():
            values.fill_(0.123)
    said = []
    local = Local(folder_of(f"{folder}/node{{node}}", "run"), engine.mesh, engine.mesh.host_group, layout)
    path, progress = find_checkpoint(Path(folder, "shared"), engine.mesh, said.append, local=local)
    load_into(engine, shards, path, progress.step)
    return progress.step, tiny.steps(engine, progress.step, LAST), said


LEVELS = [(2, {"distributed_optimizer": True, **BF16}), (2, {"distributed_optimizer": False, **BF16}),
          (2, {**PP, **TIED}), (4, {**FSDP, **TP})]  # fmt: skip


@pytest.mark.parametrize("case", LEVELS, ids=label)
def test_a_resume_from_the_nodes_own_disks_repeats_an_unbroken_run_bit_for_bit(case, tmp_path):
    num_ranks, recipe = case[0], tiny.recipe(**case[1])
    nodes = [rank * 2 // num_ranks for rank in range(num_ranks)]
    unbroken = ranks.run(num_ranks, two_level, recipe, str(tmp_path), nodes)[0]
    files = [path.parent.name for path in tmp_path.glob("node0/run/step_00000004/rank_*/manifest.json")]
    assert sorted(files) == [f"rank_{rank:05d}" for rank in range(num_ranks // 2)], "each node its ranks' own"
    step, reports, _ = ranks.run(num_ranks, resume_two_level, recipe, str(tmp_path), nodes)[0]
    assert step == 4 and reports == unbroken[2:]


def test_a_resume_without_one_nodes_disk_takes_the_shared_checkpoint_and_says_so(tmp_path):
    recipe = tiny.recipe(**FSDP)
    unbroken = ranks.run(2, two_level, recipe, str(tmp_path), [0, 1])[0]
    flip(tmp_path / "node1/run/step_00000004/rank_00001/__0_0.distcp")
    shutil.copytree(tmp_path, tmp_path.with_name("lost"))
    shutil.rmtree(tmp_path.with_name("lost") / "node1")
    for folder, layout, words in [
        (tmp_path, "same", "digest"),
        (tmp_path.with_name("lost"), "same", "not complete on all nodes"),
        (tmp_path, "another", ""),
    ]:
        step, reports, said = ranks.run(2, resume_two_level, recipe, str(folder), [0, 1], layout)[0]
        assert step == SAVED and reports == unbroken and words in "".join(said)


def test_what_a_node_keeps_beyond_the_step_that_was_resumed_is_removed(tmp_path):
    recipe = tiny.recipe(**FSDP)
    ranks.run(2, two_level, recipe, str(tmp_path), [0, 1])
    flip(tmp_path / "node1/run/step_00000004/rank_00001/__0_0.distcp")
    ranks.run(2, resume_two_level, recipe, str(tmp_path), [0, 1])
    assert not list(tmp_path.glob("node*/run/step_*"))


def test_the_folder_of_a_node_is_named_by_number_host_and_environment(monkeypatch):
    for name in ("GROUP_RANK", "SLURM_NODEID", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NODEID", "3")
    monkeypatch.setenv("SCRATCH", "/nvme")
    assert folder_of("$SCRATCH/node{node}", "run-1") == Path("/nvme/node3/run-1")
    with pytest.raises(ConfigError, match=r"NOWHERE\} is not set"):
        folder_of("${NOWHERE}/x", "run-1")


def save_remotely(recipe, folder: str, address: str, last_step: int = 3, break_at: int | None = None):
    engine, _ = tiny.engine(recipe)
    writer = store.CheckpointWriter(
        Path(folder), engine.mesh, Retention(2), asynchronous=True, remote=remote.Remote(address)
    )
    outcomes = []
    for step in range(1, last_step + 1):
        if step == break_at:
            writer._uploads.remote.put = no_space
        tiny.steps(engine, step - 1, step)
        writer.save(engine.states(), Progress(step=step), "name: tiny\n")
        outcomes += writer.finish()
        vars(writer._uploads.remote).pop("put", None)
    writer.refuse_loss()
    return outcomes


def no_space(*_):
    raise OSError("the bucket is full")


def found_remotely(recipe, folder: str, address: str):
    engine, shards = tiny.engine(recipe)
    said = []
    found = find_checkpoint(Path(folder), engine.mesh, said.append, remote=remote.Remote(address))
    if found:
        load_into(engine, shards, found[0], found[1].step)
    return found and found[1].step, said


def test_whole_checkpoints_are_copied_to_a_remote_folder_which_an_empty_run_resumes_from(tmp_path):
    recipe, address = tiny.recipe(**TP), f"file://{tmp_path}/bucket/run"
    outcomes = ranks.run(2, save_remotely, recipe, str(tmp_path / "run"), address, 4, 3)[0]
    where = [(outcome.step, outcome.where, outcome.error is None) for outcome in outcomes]
    assert where == [
        (1, "shared", True), (1, "remote", True), (2, "shared", True), (2, "remote", True),
        (3, "shared", True), (3, "remote", False), (4, "shared", True), (4, "remote", True),
    ]  # fmt: skip
    assert "the bucket is full" in outcomes[5].error
    bucket = tmp_path / "bucket" / "run"
    assert store.steps_in(bucket) == [2, 4], "two are kept, and the half of step 3 is none"
    assert remote.report(address)[1] == []
    step, said = ranks.run(2, found_remotely, recipe, str(tmp_path / "new"), address)[0]
    assert step == 4 and "copying step 4" in said[0]
    assert store.damage(store.step_dir(tmp_path / "new", 4)) is None
    flip(bucket / "step_00000004" / "__1_0.distcp")
    assert "__1_0.distcp" in remote.report(address)[1][0]
    step, said = ranks.run(2, found_remotely, recipe, str(tmp_path / "newer"), address)[0]
    assert step == 2 and "digest" in said[1]
    (bucket / "step_00000002" / "manifest.json").unlink()
    (bucket / "step_00000004" / "manifest.json").unlink()
    assert ranks.run(2, found_remotely, recipe, str(tmp_path / "newest"), address)[0][0] is None


def test_of_two_runs_with_one_remote_folder_the_earlier_keeps_away_and_says_so(tmp_path):
    recipe, address = tiny.recipe(), f"file://{tmp_path}/bucket"
    assert all(one.error is None for one in ranks.run(1, save_remotely, recipe, str(tmp_path / "a"), address, 3)[0])
    later = ranks.run(1, save_remotely, recipe, str(tmp_path / "b"), address, 2)[0]
    assert all(one.error is None for one in later), "a run that begins there takes it over"
    bucket = {path: path.read_bytes() for path in (tmp_path / "bucket").rglob("*") if path.is_file()}
    earlier = ranks.run(1, save_remotely, recipe, str(tmp_path / "a"), address, 5)[0]
    owner = (tmp_path / "b" / "run_id").read_text().strip()
    assert earlier[-1].where == "remote" and f"another run ({owner}) keeps" in earlier[-1].error
    assert not any(one.error is None for one in earlier if one.where == "remote"), [one.error for one in earlier]
    assert {path: path.read_bytes() for path in (tmp_path / "bucket").rglob("*") if path.is_file()} == bucket


def test_a_checkpoint_at_an_address_is_copied_once_for_eval_and_its_like(tmp_path, monkeypatch):
    monkeypatch.setenv("IGLA_CACHE", str(tmp_path / "cache"))
    address = f"file://{tmp_path}/bucket"
    ranks.run(1, save_remotely, tiny.recipe(), str(tmp_path / "run"), address, 2)
    from igla_mega.checkpoint.folder import resolve_checkpoint

    newest = resolve_checkpoint(Path(address))
    assert newest.name == "step_00000002" and store.damage(newest) is None
    assert resolve_checkpoint(Path(f"{address}/step_00000001")).name == "step_00000001"
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        resolve_checkpoint(Path(f"{address}/step_00000009"))


def save_to_s3(recipe, folder: str, address: str, environment: dict[str, str]):
    os.environ.update(environment)
    return save_remotely(recipe, folder, address, 3)


def find_in_s3(recipe, folder: str, address: str, environment: dict[str, str]):
    os.environ.update(environment)
    return found_remotely(recipe, folder, address)


def test_an_s3_server_holds_the_checkpoints_that_are_kept_and_an_empty_run_resumes_from_it(tmp_path):
    moto = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
        environment = {**keys, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}
        import boto3

        client = boto3.client("s3", "us-east-1", aws_access_key_id="key", aws_secret_access_key="secret",
                              endpoint_url=environment["AWS_ENDPOINT_URL"])  # fmt: skip
        client.create_bucket(Bucket="runs")
        recipe, address = tiny.recipe(**TP), "s3://runs/team/run"
        outcomes = ranks.run(2, save_to_s3, recipe, str(tmp_path / "run"), address, environment)[0]
        assert [outcome.error for outcome in outcomes] == [None] * 6
        listed = client.list_objects_v2(Bucket="runs")["Contents"]
        assert {entry["Key"].split("/")[2] for entry in listed} == {"run_id", "step_00000002", "step_00000003"}
        step, said = ranks.run(2, find_in_s3, recipe, str(tmp_path / "new"), address, environment)[0]
        assert step == 3 and "copying step 3" in said[0]
        client.delete_object(Bucket="runs", Key="team/run/step_00000003/manifest.json")
        assert ranks.run(2, find_in_s3, recipe, str(tmp_path / "newer"), address, environment)[0][0] == 2
    finally:
        server.stop()
