"""Whatever happens to one file of a run folder: the run continues as before, or a refusal names the file."""

import contextlib
import io
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import ranks
import small_run
import torch.distributed as dist
import yaml

from igla_mega import run as engine
from igla_mega.checkpoint import integrity
from igla_mega.config.errors import ConfigError
from igla_mega.config.load import load_recipe
from igla_mega.distributed.mesh import build_mesh, init_process_groups
from igla_mega.engine.build import num_steps
from igla_mega.engine.heartbeat import Heartbeat
from igla_mega.plan.resolve import resolve
from igla_mega.train import resume
from igla_mega.train.run_folder import lock_run_folder
from igla_mega.train.session import Session

SIZES = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 16}
STOPPED, STEPS = 6, 8
NEWEST = f"checkpoints/step_{STOPPED:08d}"
OF_RUN = ("recipe.yaml", "mix.json", "metrics.jsonl", "ledger.jsonl", "events.jsonl", ".lock", "heartbeat.json",
          "checkpoints/latest", "checkpoints/run_id")  # fmt: skip
OF_CHECKPOINT = ("manifest.json", "progress.json", "recipe.yaml", ".metadata", "__0_0.distcp", "data.json", "mix.json")


def missing(path: Path):
    path.unlink()


def empty(path: Path):
    path.write_bytes(b"")


def truncated(path: Path):
    path.write_bytes(path.read_bytes()[: max(1, path.stat().st_size * 2 // 3)])


def nul_bytes(path: Path):
    path.write_bytes(b"\0" * path.stat().st_size)


def a_block_of_nul_bytes(path: Path):
    content = path.read_bytes()
    third = len(content) // 3
    path.write_bytes(content[:third] + b"\0" * third + content[2 * third :])


def other_content(path: Path):
    path.write_bytes(b"hello: world\n")


def a_folder_in_its_place(path: Path):
    path.unlink()
    path.mkdir()


def a_link_to_another_file(path: Path):
    other = path.with_name(f".{path.name}.other")
    path.rename(other)
    path.symlink_to(other)


DAMAGES = (missing, empty, truncated, nul_bytes, a_block_of_nul_bytes, other_content, a_folder_in_its_place,
           a_link_to_another_file)  # fmt: skip


def stop_early(step: int):
    """A fault of `small_run.train`: the run ends after a step as with `--stop-after`."""
    whole = engine.train
    engine.train = lambda recipe, run_dir: whole(recipe, run_dir, stop_after=step)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A recipe, an unbroken run of it, and one that was stopped; its mix was changed before the last checkpoint."""
    folder = tmp_path_factory.mktemp("damage")
    sections = {"model": SIZES, "training": {"total_steps": STEPS}, "checkpoint": {"every_steps": 2, "keep_last": 9}}
    recipe = small_run.write_recipe(folder, **sections)
    sources = {"words": str(folder / "words"), "more": str(folder / "words")}
    small_run.train(1, changed(recipe, sources, {"words": 1.0, "more": 1.0}), folder / "stopped", stop_early, 2)
    recipe = changed(recipe, sources, {"words": 3.0, "more": 1.0})
    small_run.train(1, recipe, folder / "stopped", stop_early, STOPPED)
    shutil.copytree(folder / "stopped", folder / "unbroken")
    small_run.train(1, recipe, folder / "unbroken")
    assert len(json.loads((folder / "stopped/mix.json").read_text())) == 2
    return recipe, folder / "unbroken", folder / "stopped"


def changed(recipe: Path, sources: dict, mix: dict) -> Path:
    content = yaml.safe_load(recipe.read_text())
    content["data"] = {"mix": mix, "sources": sources}
    recipe.write_text(yaml.safe_dump(content))
    return recipe


def starts(recipe: str, stopped: str, scratch: str, cases: list[tuple[str, str]]) -> list[dict]:
    """Open a run folder after each damage as `train` does, up to the first tensor; what each found, said or refused."""
    dist.destroy_process_group()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name)
    small, device = load_recipe(recipe), engine.host.prepare()
    init_process_groups(device, 60)
    resolved = resolve(small, 1, "cpu", base=None, total_steps=num_steps)
    mesh = build_mesh(resolved.layouts[0], small.training.seed)
    outcomes = []
    for file, damage in cases:
        run_dir = Path(scratch) / "run"
        shutil.copytree(stopped, run_dir, symlinks=True)
        next(one for one in DAMAGES if one.__name__ == damage)(run_dir / file)
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            outcomes.append({"file": file, "damage": damage, **start(resolved, small, run_dir, mesh, device)})
        outcomes[-1]["said"] = said.getvalue()
        shutil.rmtree(run_dir)
    return outcomes


def start(resolved, small, run_dir: Path, mesh, device) -> dict:
    try:
        lock_run_folder(run_dir, small).close()
        session = Session(run_dir, mesh, device, None, Heartbeat())  # type: ignore[arg-type]
        data = engine._open_data(resolved, session)
        found = resume.find_start(resolved, session, data.corpora)
        session = engine._with_display(resolved, session, found, STEPS)
        engine._open_run_folder(resolved, session, found)
        session.close()
    except ConfigError as refused:
        return {"refused": str(refused)}
    return {
        "progress": asdict(found.progress),
        "mix": found.mix_text,
        "recipe": (run_dir / "recipe.yaml").read_text(),
        "losses": small_run.losses(run_dir),
        "mix_file": (run_dir / "mix.json").read_text(),
    }


def test_every_damage_of_every_file_ends_in_the_same_run_or_in_a_refusal_that_names_the_file(runs, tmp_path):
    recipe, unbroken, stopped = runs
    paths = [path.relative_to(stopped) for path in stopped.rglob("*") if path.is_file()]
    of_newest = [f"{NEWEST}/{name}" for name in OF_CHECKPOINT]
    # Older checkpoints are not read, and of `hang` nothing is.
    tried = {str(path) for path in paths if str(path.parent) in (NEWEST, "checkpoints", ".")}
    assert tried == {*OF_RUN, *of_newest}
    cases = [(file, damage.__name__) for file in (*OF_RUN, *of_newest) for damage in DAMAGES]
    [outcomes] = ranks.run(1, starts, str(recipe), str(stopped), str(tmp_path), cases)
    at = {step: json.loads((unbroken / f"checkpoints/step_{step:08d}/progress.json").read_text()) for step in (4, 6)}
    mixes = {step: (unbroken / f"checkpoints/step_{step:08d}/mix.json").read_text() for step in (4, 6)}
    wrong = []
    for one in outcomes:
        name, said = Path(one["file"]).name, one["said"]
        if "refused" in one:
            wrong += [one] if name not in one["refused"] or "\n  " not in one["refused"] else []
            continue
        step = one["progress"]["step"]
        same = one["progress"] == at[step] and one["mix"] == mixes[step] == one["mix_file"]
        same &= one["recipe"] == (unbroken / "recipe.yaml").read_text()
        losses = {number: pair for number, pair in small_run.losses(unbroken).items() if number <= step}
        lost = sorted(losses.keys() - one["losses"].keys())
        same &= one["losses"] == {number: pair for number, pair in losses.items() if number not in lost}
        # Nothing of it silently: an older checkpoint, lines that are gone, a file that is written again.
        told = (step == STOPPED or f"step_{STOPPED:08d}" in said) and (
            not lost or "metrics.jsonl has no line of" in said
        )
        if one["file"] in ("recipe.yaml", "mix.json") and one["damage"] not in ("a_link_to_another_file", "missing"):
            told &= name in said or "from here on" in said
        wrong += [] if same and told else [one]
    assert not wrong, json.dumps(wrong[:3], indent=1)


def foreign(run_dir: Path, unbroken: Path) -> Path:
    """A whole checkpoint of a later step that another run has written."""
    alien = run_dir / "checkpoints/step_99999999"
    shutil.copytree(unbroken / f"checkpoints/step_{STEPS:08d}", alien)
    manifest = json.loads((alien / "manifest.json").read_text())
    (alien / "manifest.json").write_text(json.dumps({**manifest, "run": "0123abcd"}))
    return alien


def renamed(run_dir: Path, unbroken: Path) -> Path:
    alien = run_dir / "checkpoints/step_99999999"
    shutil.copytree(run_dir / "checkpoints/step_00000002", alien)
    return alien


def without_files(run_dir: Path, unbroken: Path) -> Path:
    alien = run_dir / "checkpoints/step_99999999"
    alien.mkdir()
    (alien / "manifest.json").write_text('{"format": 1, "files": {}}')
    return alien


def without_anything(run_dir: Path, unbroken: Path) -> Path:
    alien = run_dir / "checkpoints/step_99999999"
    alien.mkdir()
    return alien


def unlisted(run_dir: Path, unbroken: Path) -> Path:
    """The newest checkpoint, whose manifest no longer lists the file of its tensors."""
    newest = run_dir / NEWEST
    manifest = json.loads((newest / "manifest.json").read_text())
    del manifest["files"]["__0_0.distcp"]
    (newest / "manifest.json").write_text(json.dumps(manifest))
    return newest


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (foreign, "run 0123abcd wrote it, not this one"),
        (renamed, "holds step 2, so that its name is not its own"),
        (without_files, "manifest.json lists 0 files, but not .metadata"),
        (without_anything, "manifest.json is missing"),
        (unlisted, "__0_0.distcp is not in manifest.json"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_checkpoint_that_is_not_one_of_the_run_is_passed_over_and_does_not_count(plant, words, runs, tmp_path):
    recipe, unbroken, stopped = runs
    run_dir = Path(shutil.copytree(stopped, tmp_path / "run"))
    planted = plant(run_dir, unbroken)
    [said] = small_run.train(1, recipe, run_dir, keep_what_is_printed)
    assert said.count("resuming at step") == 1
    assert small_run.losses(run_dir) == small_run.losses(unbroken)
    checkpoints = run_dir / "checkpoints"
    assert (checkpoints / "latest").read_text() == f"step_{STEPS:08d}\n"
    # It takes no place among those that are kept, and is not removed either.
    own = [step for step in integrity.steps_in(checkpoints) if step <= STEPS]
    assert own[-2:] == [STOPPED, STEPS] and planted.exists()
    assert words in (tmp_path / "printed").read_text()


def keep_what_is_printed():
    """A fault of `small_run.train`: what the run prints is written beside its folder."""
    whole = engine.train

    def train(recipe, run_dir):
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                return whole(recipe, run_dir)
        finally:
            (run_dir.parent / "printed").write_text(printed.getvalue())

    engine.train = train


def test_a_refusal_writes_nothing(runs, tmp_path):
    """Also one that comes late: the tensors of the checkpoint have other shapes than the accepted recipe's."""
    recipe, _, stopped = runs
    run_dir = Path(shutil.copytree(stopped, tmp_path / "run"))
    with open(run_dir / "metrics.jsonl", "a") as metrics:
        metrics.write('{"step": 7, "loss": 1.0}\n{"step": 8, "lo')
    content = yaml.safe_load(recipe.read_text())
    content["model"]["intermediate_size"] = 32
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump({**content, "name": "small", "logging": {"tensorboard": True}}))
    before = files(run_dir)
    for accepted in ([], ["model.intermediate_size"]):
        with pytest.raises(ranks.RankFailed, match=r"(?s)ConfigError: .*(intermediate_size: was 16, is 32|\[32, 16\])"):
            small_run.train(1, other, run_dir, accept, accepted)
        assert files(run_dir) == before
    [said] = small_run.train(1, recipe, run_dir)
    assert "resuming at step 6" in said


def accept(keys: list[str]):
    whole = engine.train
    engine.train = lambda recipe, run_dir: whole(recipe, run_dir, accepted=keys)


def files(run_dir: Path) -> dict[str, bytes]:
    """Everything but the lock and the watchdog's folder, which hold nothing of the run."""
    return {
        str(path.relative_to(run_dir)): path.read_bytes()
        for path in run_dir.rglob("*")
        if path.is_file() and path.name != ".lock" and path.parent.name != "hang"
    }
