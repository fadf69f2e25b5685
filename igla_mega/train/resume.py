"""Where a run starts: its newest complete checkpoint, or the beginning."""

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from igla_mega.checkpoint import store
from igla_mega.checkpoint.load import find_checkpoint
from igla_mega.checkpoint.local import Local, folder_of
from igla_mega.checkpoint.progress import Progress, Retention
from igla_mega.checkpoint.remote import Remote
from igla_mega.config import json_text
from igla_mega.config.errors import ConfigError
from igla_mega.config.load import load_recipe
from igla_mega.config.schema import Recipe
from igla_mega.data.batches import Corpus, Dataset, source_fingerprints
from igla_mega.data.blend import recorded_mixes
from igla_mega.distributed.mesh import Mesh
from igla_mega.layout.stages import Stage
from igla_mega.plan.resolve import Resolved
from igla_mega.train.continuity import refuse_another_run
from igla_mega.train.phases import next_stage
from igla_mega.train.session import Session

DATA = "data.json"
"""File of a checkpoint: source -> fingerprint of the prepared data that it was trained on."""
Found = tuple[Path, Progress]
"""A checkpoint, and how far the run was that wrote it."""


@dataclass(frozen=True)
class Start:
    """Where the run stands before its first step, and what writes its checkpoints."""

    found: Found | None
    """Checkpoint to restore; None at the beginning of a part."""
    progress: Progress
    part: int
    """First part that still has something to do."""
    find: Callable[[], Found | None]
    """Finds the newest complete checkpoint; every rank calls it."""
    writer: store.CheckpointWriter
    changes: Sequence[str] = ()
    """Changes of the recipe or its data that `--accept-changes` allowed, as lines."""
    damage: Sequence[str] = ()
    """What was found damaged while the start was looked for, as lines; filled on the main rank."""


def find_start(
    resolved: Resolved, session: Session, corpora: Sequence[Dataset], accepted: Collection[str] = ()
) -> Start:
    """Find where the run starts, and open the writer of its checkpoints. Every rank calls it.

    Args:
        accepted: keys whose change does not make it another run because the user insists.

    Raises:
        ConfigError: every checkpoint is damaged, or the recipe or its data are those of another run.
    """
    recipe, stages, ends = resolved.recipe, resolved.stages, resolved.part_ends
    checkpoints, mesh = session.run_dir / "checkpoints", session.mesh
    # The display does not exist yet: it starts at the step that is found here.
    said: list[str] = []

    def say(line: str) -> None:
        if mesh.is_main:
            print(line)
            said.append(line)

    local, remote = _other_folders(recipe, checkpoints, mesh)
    find = partial(find_checkpoint, checkpoints, mesh, say, local=local, remote=remote)
    found = find()
    damage = [line for line in said if "going back to" in line]
    progress = found[1] if found else Progress()
    changes = _refuse_another_run(resolved, found, corpora, accepted) if found else []
    _refuse_other_batches(progress, stages)
    if isinstance(corpora[0], Corpus) and recipe.stages is None and recipe.curriculum is None and recipe.data.mix:
        corpora[0].follow(_mixes(recipe, session.run_dir, progress, mesh, say))
    progress.stage = next_stage(stages, progress)
    part = stages[min(progress.stage, len(stages) - 1)].part
    # Where the checkpoint ends a part, the next one starts from its weights alone: optimizer and adapters are new.
    if part and progress.step == ends[part - 1]:
        found = None
    writer = store.CheckpointWriter(
        checkpoints,
        mesh,
        Retention(recipe.checkpoint.keep_last, recipe.checkpoint.keep_every, frozenset(ends[:-1])),
        asynchronous=recipe.checkpoint.asynchronous,
        staging_bytes=recipe.checkpoint.staging_memory,
        local=local,
        remote=remote,
    )
    if found and found[0].parent == checkpoints:
        writer.copy_found(progress.step)
    return Start(found, progress, part, find, writer, changes, damage)


def _refuse_another_run(
    resolved: Resolved, found: Found, corpora: Sequence[Dataset], accepted: Collection[str]
) -> list[str]:
    """Compare the recipe and the data with those that the checkpoint was written with; return accepted changes.

    Raises:
        ConfigError: a change would make it another run.
    """
    checkpoint, progress = found
    # A checkpoint has the recipe of the part that wrote it: the one whose steps it is within, or has just completed.
    part = next((i for i, end in enumerate(resolved.part_ends) if progress.step <= end), len(resolved.parts) - 1)
    stage = min(progress.stage, len(resolved.stages) - 1)
    if resolved.stages[stage].part != part:
        stage = resolved.first_stage(part)
    file = checkpoint / DATA
    before = json_text.loads(file.read_bytes()) if file.is_file() else {}  # absent before version 0.2
    now = source_fingerprints(corpora[stage])
    data = {name: (before[name], now[name]) for name in before.keys() & now.keys()}
    # `folder.read_recipe` would compare it with the tensors next to it: a node's own folder holds those of one rank.
    written = load_recipe(checkpoint / "recipe.yaml")
    return refuse_another_run(written, resolved.parts[part], data, str(checkpoint), accepted)


def _other_folders(recipe: Recipe, checkpoints: Path, mesh: Mesh) -> tuple[Local | None, Remote | None]:
    """Return the checkpoint folders besides the run's: on this node's own disk, and in an object store."""
    section, local = recipe.checkpoint, None
    if section.local_folder is not None:
        run = f"{checkpoints.parent.name}-{store.run_id(checkpoints, mesh)}"
        # State is cut among the ranks by these and by the sizes of the mesh: another cut must not read it.
        layout = json.dumps([recipe.distributed.model_dump(mode="json"), recipe.model and recipe.model.model_dump()])
        folder = folder_of(section.local_folder, run)
        local = Local(folder, mesh, mesh.host_group, layout, section.local_keep_last)
    return local, Remote(section.remote) if section.remote is not None else None


def _mixes(
    recipe: Recipe, run_dir: Path, progress: Progress, mesh: Mesh, say: Callable[[str], None]
) -> list[tuple[int, dict[str, float]]]:
    """Return the mixes that the run has followed; a changed mix takes effect at the next step."""
    mixes = recorded_mixes(run_dir / "mix.json", recipe.data.mix, progress.samples, write=mesh.is_main)
    if len(mixes) > 1 and mixes[-1][0] == progress.samples:
        say(f"data.mix: changed from sample {progress.samples:,} on; every source continues where it was (mix.json)")
    return mixes


def _refuse_other_batches(progress: Progress, stages: Sequence[Stage]) -> None:
    """Refuse a batch size or phases under which the steps taken would have consumed other samples."""
    beyond = max(0, progress.step - stages[-1].last_step) * stages[-1].layout.global_batch
    expected = beyond + sum(
        min(max(progress.step - stage.first_step, 0), stage.num_steps) * stage.layout.global_batch for stage in stages
    )
    if progress.samples != expected:
        raise ConfigError(
            f"training.batch_size: the run consumed {progress.samples:,} sequences in {progress.step} steps; with this "
            f"recipe it would have been {expected:,}, so samples would be skipped or repeated.\n"
            "  Keep the batch size and the phases, or start in a new run folder."
        )
