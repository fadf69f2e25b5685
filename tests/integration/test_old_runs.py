"""A run folder, a checkpoint and prepared data of an earlier version still open, and the run continues unchanged.

`tests/old_runs/README.md` says how they were made.
"""

import json
import os
import tarfile
from pathlib import Path

import pytest
import small_run

from igla_mega.checkpoint import integrity
from igla_mega.checkpoint.folder import read_recipe, resolve_checkpoint
from igla_mega.checkpoint.pieces import Reader, read_whole
from igla_mega.prepare.manifest import damage

ARCHIVES = sorted((Path(__file__).parents[1] / "old_runs").glob("*.tar.xz"))


@pytest.fixture(params=ARCHIVES, ids=lambda path: path.name)
def old(request, tmp_path):
    """The folder in which an earlier version prepared data and trained the first half of a run."""
    with tarfile.open(request.param) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def test_the_run_continues_with_the_losses_of_the_unbroken_one(old):
    [said] = small_run.train(1, old / "recipe.yaml", old / "run", os.chdir, str(old))
    assert "resuming at step 2" in said
    unbroken = {int(step): pair for step, pair in json.loads((old / "losses.json").read_text()).items()}
    found = small_run.losses(old / "run")
    assert found.keys() == unbroken.keys() == {1, 2, 3, 4}
    for step in (1, 2, 3):
        # Equal bit for bit on the machine that recorded them; another CPU may order its sums differently. Step 4 comes
        # after an update at the rate of version 0.2, whose schedule ends one step later (CHANGELOG).
        assert found[step] == pytest.approx(unbroken[step], rel=1e-5), step
    assert small_run.events(old / "run")[-1] == "finished"
    # Its checkpoints have no id of a run: they are this run's.
    assert integrity.steps_in(old / "run/checkpoints")[-1] == 4 and integrity.passed_over(old / "run/checkpoints") == []


def test_the_checkpoint_is_whole_and_can_be_read(old):
    lines, damages = integrity.report(old / "run")
    assert damages == [] and len(lines) == 1
    checkpoint = resolve_checkpoint(old / "run")
    model = read_recipe(checkpoint).model
    reader = Reader(checkpoint)
    assert model is not None and len(reader.shapes()) > 10
    assert read_whole(reader, "embedding.word_embeddings.weight").shape == (model.vocab_size, model.hidden_size)


def test_the_prepared_data_is_whole(old):
    assert damage(str(old / "prepared/words"), whole=True) == []
