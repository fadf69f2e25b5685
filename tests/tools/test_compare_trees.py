import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import compare_trees  # noqa: E402

NAME = "lora_7b"


def write_recorded(folder: Path, *, loss: float = 2.5, days: float = 3.0, tensor: bytes = b"weights") -> Path:
    """What `record` leaves of one recipe: a run with a checkpoint, its prepared data, and its plan."""
    checkpoint = folder / NAME / "checkpoints" / "step_2"
    checkpoint.mkdir(parents=True)
    steps = [{"step": 1, "loss": 3.0, "grad_norm": 1.0}, {"step": 2, "loss": loss, "grad_norm": 0.5}]
    (folder / NAME / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (checkpoint / "a.distcp").write_bytes(tensor)
    (checkpoint / "manifest.json").write_text(json.dumps({"folder": str(folder)}))
    data = folder / "cache" / "prepared"
    data.mkdir(parents=True)
    for suffix in ("bin", "idx"):
        (data / f"code.{suffix}").write_bytes(b"tokens")
    (folder / f"{NAME}.plan.json").write_text(json.dumps({"days": days}))
    return folder


@pytest.fixture
def before(tmp_path) -> Path:
    return write_recorded(tmp_path / "before")


def test_folders_with_the_same_numbers_are_equal(before, tmp_path, capsys):
    assert compare_trees.compare(before, write_recorded(tmp_path / "after"), [NAME])
    out = capsys.readouterr().out
    assert (
        f"{NAME}: the numbers of the plans are equal" in out
        and "3 checkpoint and data files compared: all equal" in out
    )


@pytest.mark.parametrize(
    ("changed", "reported"),
    [
        ({"loss": 2.5000000000000004}, f"{NAME}: 2 common steps, 1 to 2; loss: differs at 1 steps, first at 2"),
        ({"days": 3.5}, f"{NAME}: the numbers of the plans are DIFFERENT"),
        ({"tensor": b"Weights"}, f"{NAME}/checkpoints/step_2/a.distcp: differs"),
    ],
)
def test_a_loss_a_plan_or_a_tensor_file_that_differs_is_reported(before, tmp_path, capsys, changed, reported):
    after = write_recorded(tmp_path / "after", **changed)
    assert not compare_trees.compare(before, after, [NAME])
    assert reported in capsys.readouterr().out


def test_a_file_that_only_one_tree_wrote_is_reported(before, tmp_path, capsys):
    after = write_recorded(tmp_path / "after")
    (before / "cache" / "prepared" / "code.idx").unlink()
    assert not compare_trees.compare(before, after, [NAME])
    assert "cache/prepared/code.idx: is in one tree only" in capsys.readouterr().out


def test_trees_that_wrote_no_file_are_not_equal(tmp_path, capsys):
    folders = [write_recorded(tmp_path / name) for name in ("before", "after")]
    for file in [
        file for folder in folders for file in folder.rglob("*") if file.suffix in (".distcp", ".bin", ".idx")
    ]:
        file.unlink()
    assert not compare_trees.compare(*folders, [NAME])
    assert "nothing was compared" in capsys.readouterr().out


def test_digests_are_of_tensors_and_datasets_and_not_of_files_with_paths(before):
    digests = compare_trees._digests(before)
    assert sorted(digests) == [
        "cache/prepared/code.bin",
        "cache/prepared/code.idx",
        f"{NAME}/checkpoints/step_2/a.distcp",
    ]
    assert digests["cache/prepared/code.bin"] == digests["cache/prepared/code.idx"] != digests[sorted(digests)[2]]


@pytest.mark.parametrize(("loss", "code"), [(2.5, 0), (2.25, 1)])
def test_the_exit_code_says_whether_two_trees_are_equal(tmp_path, loss, code):
    trees, out = [], tmp_path / "out"
    for name, value in (("first", 2.5), ("second", loss)):
        tree = tmp_path / name
        tree.mkdir()
        git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
        for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", name]):
            subprocess.run([*git, *words], cwd=tree, check=True)
        revision = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=tree, text=True)
        # Recorded before, so that nothing is trained here.
        folder = write_recorded(out / f"{name}-{revision[:12]}", loss=value)
        (folder / f"{NAME}.done").touch()
        trees.append(str(tree))
    assert compare_trees.main([*trees, "--out", str(out), "--recipes", NAME]) == code


def test_one_tree_is_recorded_without_a_comparison(before, tmp_path, monkeypatch):
    monkeypatch.setattr(compare_trees, "record", lambda *_: before)
    assert compare_trees.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 0
