"""A power cut keeps what was flushed and nothing else: no line of a checkpointed step is lost, or it is named."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import ranks
import small_run

from igla_mega.checkpoint import integrity
from igla_mega.data.json_lines import missing_steps, rewind

STEPS, EVERY = 6, 2


class Disk:
    """Records what a process flushes below a folder, in the terms of POSIX: contents of files, entries of folders.

    `os.fsync` of a file makes its content durable, of a folder the names in it. A new name, a rename or a removal is
    durable after the next flush of its folder.
    """

    def __init__(self, root: Path):
        self.root = root
        self.log: list[tuple] = []
        self._kept: list[int] = []
        self._fsync, self._replace = os.fsync, os.replace
        os.fsync, os.replace = self.fsync, self.replace

    def fsync(self, descriptor: int) -> None:
        self._fsync(descriptor)
        here = Path(f"/proc/self/fd/{descriptor}")
        # An open descriptor keeps the number of the inode from being used again for another file.
        self._kept.append(os.dup(descriptor))
        number = os.fstat(descriptor).st_ino
        if os.path.isdir(here):
            self.log.append(("entries", number, listed(os.readlink(here))))
        else:
            self.log.append(("content", number, here.read_bytes()))

    def replace(self, source, target) -> None:
        self._replace(source, target)
        self.log.append(("tree", snapshot(self.root)))


def listed(folder) -> dict[str, tuple[int, bool]]:
    return {entry.name: (entry.inode(), entry.is_dir()) for entry in os.scandir(folder)}


def snapshot(folder) -> dict[str, tuple[int, int | dict]]:
    """Names, inodes and sizes as the system has them, flushed or not."""
    found = {}
    for entry in os.scandir(folder):
        try:
            found[entry.name] = (entry.inode(), snapshot(entry.path) if entry.is_dir() else entry.stat().st_size)
        except FileNotFoundError:  # another thread has removed it in the meantime
            continue
    return found


def recorded_run(recipe: str, run_dir: str) -> tuple[int, list[tuple]]:
    Path(run_dir).mkdir()
    disk = Disk(Path(run_dir))
    small_run.run_said(recipe, run_dir, None, ())
    return os.stat(run_dir).st_ino, disk.log


def after_power_cuts(root: int, log: list[tuple], target: Path) -> Iterator[Path]:
    """Yield the folder as it may be after a power cut at every point of a log, two ways.

    Only what was flushed is there; or the file system had written all names and sizes, but only the flushed contents,
    with NUL bytes for the rest.
    """
    entries: dict[int, dict] = {}
    contents: dict[int, bytes] = {}

    def flushed(number: int, folder: Path) -> None:
        folder.mkdir()
        for name, (inode, is_folder) in entries.get(number, {}).items():
            if is_folder:
                flushed(inode, folder / name)
            else:
                (folder / name).write_bytes(contents.get(inode, b""))

    def named(tree: dict, folder: Path) -> None:
        folder.mkdir()
        for name, (inode, inner) in tree.items():
            if isinstance(inner, dict):
                named(inner, folder / name)
            else:
                (folder / name).write_bytes(contents.get(inode, b"")[:inner].ljust(inner, b"\0"))

    for kind, *what in log:
        if kind == "tree":
            named(what[0], target)
        else:
            (entries if kind == "entries" else contents)[what[0]] = what[1]
            flushed(root, target)
        yield target
        shutil.rmtree(target)


def resumed(run_dir: Path) -> tuple[int | None, list[str]]:
    """The step that a resume would start from, and what it would say is missing."""
    checkpoints = run_dir / "checkpoints"
    whole = [s for s in integrity.steps_in(checkpoints) if integrity.damage(integrity.step_dir(checkpoints, s)) is None]
    if not whole:
        return None, []
    for name in ("metrics", "ledger"):
        rewind(run_dir / f"{name}.jsonl", whole[-1])
    return whole[-1], list(missing_steps(run_dir, whole[-1], ()))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An unbroken run, its recipe, and what it flushed."""
    folder = tmp_path_factory.mktemp("power")
    recipe = small_run.write_recipe(
        folder,
        model={"hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 16},
        training={"total_steps": STEPS},
        checkpoint={"every_steps": EVERY, "keep_last": 2},
    )
    [(root, log)] = ranks.run(1, recorded_run, str(recipe), str(folder / "run"))
    return recipe, folder / "run", root, log


def test_after_a_power_cut_at_any_point_every_checkpointed_step_has_its_lines(run, tmp_path):
    _, _, root, log = run
    found = [resumed(folder) for folder in after_power_cuts(root, log, tmp_path / "cut")]
    steps = [step for step, _ in found if step is not None]
    assert sorted(set(steps)) == [2, 4, 6], "the cuts meet every checkpoint"
    # Once a checkpoint has its name for good, no later cut takes it away.
    last, fallen = 0, []
    for (step, _), (kind, *_) in zip(found, log, strict=True):
        if kind != "tree":
            fallen += [(step, last)] if (step or 0) < last else []
            last = max(last, step or 0)
    assert not fallen and last == STEPS
    assert [said for _, said in found if said] == []


def test_the_model_finds_lines_that_are_not_flushed(run, tmp_path):
    """A control: without the flushes of the logs the same cuts lose lines of checkpointed steps."""
    _, run_dir, root, log = run
    logs = {os.stat(run_dir / f"{name}.jsonl").st_ino for name in ("metrics", "ledger")}
    unflushed = [one for one in log if not (one[0] == "content" and one[1] in logs)]
    assert len(unflushed) < len(log)
    assert any(said for _, said in map(resumed, after_power_cuts(root, unflushed, tmp_path / "cut")))


def test_a_run_goes_on_after_a_power_cut_and_names_the_lines_that_are_gone(run, tmp_path):
    recipe, run_dir, root, log = run
    # The moment when step 4 is the newest checkpoint; then the disk loses a line in the middle and the last one's end.
    ends = [n for n, (kind, *what) in enumerate(log) if kind == "entries" and "step_00000004" in what[1]]
    end = max(n for n in ends if "step_00000006" not in log[n][2])
    folder = tmp_path / "resumed"
    for number, cut in enumerate(after_power_cuts(root, log[: end + 1], tmp_path / "cut")):
        if number == end:
            shutil.copytree(cut, folder)
    lines = (folder / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "ledger.jsonl").write_bytes(lines[0] + lines[1] + b"\0" * len(lines[2]) + lines[3][:-9])
    with open(folder / "events.jsonl", "ab") as events:
        events.write(b"\0" * 512)
    [said] = small_run.train(1, recipe, folder)
    assert "resuming at step 4" in said
    assert "ledger.jsonl: removed 1 line that was incomplete or not JSON" in said
    assert "ledger.jsonl has no line of step 3, 4: lost, most likely in a power cut" in said
    assert small_run.losses(folder) == small_run.losses(run_dir)
    assert [entry["step"] for entry in small_run.lines(folder, "ledger.jsonl")] == [1, 2, 5, 6]
    kinds = small_run.events(folder)
    assert {"repaired", "lines_missing", "resumed", "finished"} <= set(kinds)
    # What was said once is not said again.
    [said] = small_run.train(1, recipe, folder)
    assert "removed" not in said
