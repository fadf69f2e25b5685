"""Where a run starts: its newest complete checkpoint, or the beginning."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from igla_mega.checkpoint import store
from igla_mega.checkpoint.folder import BOS, DATA, REFERENCE, TOKENIZER_DIGEST, data_of
from igla_mega.checkpoint.load import find_checkpoint
from igla_mega.checkpoint.local import Local, folder_of
from igla_mega.checkpoint.progress import Progress, Retention
from igla_mega.checkpoint.remote import Remote
from igla_mega.config.errors import ConfigError
from igla_mega.config.load import load_recipe
from igla_mega.config.schema import Recipe
from igla_mega.data.batches import Corpus, Dataset, source_fingerprints
from igla_mega.data.blend import MIXES, Blend, Mixes, followed_mixes, mixes_text, read_mixes
from igla_mega.data.prepared import bos_rule
from igla_mega.data.tokenizer import content_digest
from igla_mega.distributed.mesh import Mesh
from igla_mega.layout.stages import MIX, Stage
from igla_mega.plan.resolve import Resolved
from igla_mega.train.continuity import refuse_another_run, refuse_unknown_keys
from igla_mega.train.phases import next_stage
from igla_mega.train.session import Session

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
    mix_text: str = ""
    """Content of `MIX` in the run folder and its checkpoints; empty for a run whose mix cannot change."""
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
    damage = [line for line in said if "going back to" in line or "is missing, without which" in line]
    progress = found[1] if found else Progress()
    if found is None:
        refuse_unknown_keys(accepted, {f"data.sources.{name}" for own in resolved.parts for name in own.data.sources})
    changes = _refuse_another_run(resolved, found, corpora, accepted, say) if found else []
    _refuse_other_batches(found, stages)
    mix_text = ""
    if isinstance(corpora[0], Corpus) and _follows_mixes(recipe) and recipe.data.mix:
        mixes = _mixes(recipe, session.run_dir, found, say)
        corpora[0].follow(mixes)
        mix_text = mixes_text(mixes)
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
    return Start(found, progress, part, find, writer, mix_text, changes, damage)


def _refuse_another_run(
    resolved: Resolved,
    found: Found,
    corpora: Sequence[Dataset],
    accepted: Collection[str],
    say: Callable[[str], None],
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
    own = resolved.parts[part]
    before, now = data_of(checkpoint), data_record(own, corpora[stage])
    has_record = bool(before)
    if not has_record:  # written before version 0.2, when no prepared data had begin-of-text tokens
        before = {BOS: "never"}
    data: dict = {name: (before[name], now[name]) for name in before.keys() & now.keys()}
    # `folder.read_recipe` would compare it with the tensors next to it: a node's own folder holds those of one rank.
    written = load_recipe(checkpoint / "recipe.yaml")
    if own.form != "text" and has_record:
        # Every sample of every source is drawn once an epoch: another source changes which sample comes when.
        lone = (name for name in before.keys() ^ now.keys() if not name.startswith("."))
        data |= {name: (before.get(name), now.get(name)) for name in lone}
    elif own.form == "text":
        for name in sorted(written.data.sources.keys() ^ own.data.sources.keys()):
            what = "a new source" if name in own.data.sources else "no longer a source"
            say(f"data.sources.{name}: {what}; text is drawn by data.mix and its ledger ({MIXES})")
    if not _follows_mixes(resolved.recipe) and own.form == "text" and _shares(written) != _shares(own):
        data[".mix"] = (json.dumps(written.data.mix), json.dumps(own.data.mix))
    return refuse_another_run(written, own, data, str(checkpoint), accepted)


def data_record(recipe: Recipe, corpus: Dataset) -> dict[str, str]:
    """Return what the checkpoints of a part record of its data."""
    record = source_fingerprints(corpus)
    if (digest := content_digest(recipe.data.tokenizer)) is not None:
        record[TOKENIZER_DIGEST] = digest
    if (rule := bos_rule(recipe)) != "auto":
        record[BOS] = rule
    return record


def data_files(recipe: Recipe, corpus: Dataset, found: Found | None, reference: str = "") -> dict[str, str]:
    """Return the files of a part's checkpoints, name -> text, that record its data.

    Args:
        found: checkpoint of the part that the run resumes from. Sources of text that are no longer read are kept, so
            that they are compared if they come back.
        reference: digest of the base that is the reference of preference optimization; empty without one.

    Raises:
        ConfigError: the checkpoint was trained against another reference.
    """
    known = data_of(found[0]).get(REFERENCE, reference) if found and reference else reference
    if found and known != reference:
        raise ConfigError(
            f"{found[0]}: trained against another reference: its base has digest {known}, that of base_model "
            f"{recipe.base_model} is {reference}.\n  Use the base that it began with, or start in a new run folder."
        )
    earlier = data_of(found[0]) if found and recipe.form == "text" else {}
    record = {**earlier, **data_record(recipe, corpus), **({REFERENCE: reference} if reference else {})}
    return {DATA: json.dumps(record, indent=1) + "\n"}


def _follows_mixes(recipe: Recipe) -> bool:
    """Return True if a changed mix takes effect at the next step, False if it would reorder the data of a phase."""
    return recipe.stages is None and recipe.curriculum is None


def _shares(recipe: Recipe) -> Mapping[str, object] | None:
    """Return the shares of a recipe's mix; None if its batches do not come from it."""
    if recipe.curriculum is not None and not any(phase.source == MIX for phase in recipe.curriculum.phases):
        return None
    return Blend(recipe.data.mix).shares if any(recipe.data.mix.values()) else None


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


def _mixes(recipe: Recipe, run_dir: Path, found: Found | None, say: Callable[[str], None]) -> Mixes:
    """Return the mixes that the run has followed; a changed mix takes effect at the next step.

    Raises:
        ConfigError: the run has followed several mixes, of which no undamaged record exists.
    """
    if found is None:
        return followed_mixes([], recipe.data.mix, 0)
    file, samples = run_dir / MIXES, found[1].samples
    try:
        recorded = read_mixes(file)
    except ConfigError as error:
        # Checkpoints written before version 0.2 have no copy.
        if not (found[0] / MIXES).is_file():
            raise
        say(f"{str(error).splitlines()[0]} It is written again from {found[0] / MIXES}.")
        recorded = []
    if (found[0] / MIXES).is_file():
        recorded = read_mixes(found[0] / MIXES)
    # A folder that was restored without its record has followed at least the mix of the checkpoint.
    recorded = recorded or [(0, dict(load_recipe(found[0] / "recipe.yaml").data.mix))]
    mixes = followed_mixes(recorded, recipe.data.mix, samples)
    if len(mixes) > 1 and mixes[-1][0] == samples:
        say(f"data.mix: changed from sample {samples:,} on; every source continues where it was ({MIXES})")
    return mixes


def _refuse_other_batches(found: Found | None, stages: Sequence[Stage]) -> None:
    """Refuse a batch size or phases under which the steps taken would have consumed other samples.

    Raises:
        ConfigError: they would have; the message has both numbers.
    """
    if found is None:
        return
    checkpoint, progress = found
    beyond = max(0, progress.step - stages[-1].last_step) * stages[-1].layout.global_batch
    expected = beyond + sum(
        min(max(progress.step - stage.first_step, 0), stage.num_steps) * stage.layout.global_batch for stage in stages
    )
    if progress.samples != expected:
        raise ConfigError(
            f"training.batch_size: the run consumed {progress.samples:,} sequences in {progress.step} steps; with this "
            f"recipe it would have been {expected:,}, so samples would be skipped or repeated.\n"
            f"  Keep the batch size and the phases, or start in a new run folder. If another run wrote {checkpoint}, "
            "move that away."
        )
