"""Composition root: from a recipe to a run, part by part and stage by stage."""

import os
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from igla_mega import ops
from igla_mega.checkpoint import hugging_face
from igla_mega.checkpoint.adapters import merge_adapters
from igla_mega.checkpoint.base import BASE
from igla_mega.checkpoint.folder import read_recipe, resolve_checkpoint
from igla_mega.checkpoint.integrity import MANIFEST
from igla_mega.checkpoint.load import verify_together
from igla_mega.checkpoint.store import CheckpointWriter, steps_in
from igla_mega.config import load
from igla_mega.config.errors import ConfigError
from igla_mega.config.features import Memory
from igla_mega.config.schema import Recipe
from igla_mega.data.batches import Dataset
from igla_mega.data.blend import MIXES
from igla_mega.data.journal import replace_file
from igla_mega.distributed import host
from igla_mega.distributed.environment import LAUNCHER
from igla_mega.distributed.mesh import Mesh, build_mesh, destroy_process_groups, init_process_groups
from igla_mega.engine.build import build_engine, load_into, num_steps, open_corpus, open_dataset
from igla_mega.layout.layout import describe
from igla_mega.layout.stages import Stage, parts_of, weights_of
from igla_mega.model.spec import use_transformer_engine
from igla_mega.monitor.on_event import notify
from igla_mega.objective.ewc import Ewc
from igla_mega.ops.linear_cross_entropy import CHUNK_TOKENS
from igla_mega.plan.annotate import annotated
from igla_mega.plan.base_model import experts_of
from igla_mega.plan.choose import choose_layout
from igla_mega.plan.resolve import Base, Resolved, resolve
from igla_mega.train import consolidation, ends, evaluation
from igla_mega.train.console import Display, Silent
from igla_mega.train.opening import opening_lines, phase_lines
from igla_mega.train.parts import Data, Part, build_part, train_part, weights_after
from igla_mega.train.resume import Start, find_start
from igla_mega.train.run_folder import lock_run_folder, recipe_changes
from igla_mega.train.session import Session
from igla_mega.train.stop_signal import StopRequest
from igla_mega.train.trackers import Trackers
from igla_mega.train.watchdog import HANG, guarded


def train(
    recipe: Recipe,
    run_dir: Path,
    *,
    stop_after: int | None = None,
    models: Path | None = None,
    verbose: bool = False,
    accepted: Collection[str] = (),
) -> int:
    """Run a recipe on this rank, from where its run folder left off.

    Args:
        recipe: validated; its data is prepared.
        stop_after: step at which this call saves and stops, if that is before the last.
        models: folder below which `base_model` is looked up.
        verbose: print the cost of context parallelism at the start.
        accepted: keys whose change does not make it another run because the user insists.

    Returns:
        The exit code: 0, or the one that tells a scheduler to requeue (`StopRequest.exit_code`).

    Raises:
        ConfigError: an input does not fit; raised before any weight is allocated.
    """
    device = host.prepare()
    if recipe.distributed.keep_freed_memory and device.type == "cpu":
        host.keep_freed_memory()
    distributed = recipe.distributed
    init_process_groups(device, distributed.timeout_seconds, run_dir / HANG)
    rank, stop = dist.get_rank(), StopRequest(dist.get_world_size() == 1, device)
    # Before anything else: the watchdog below writes to the folder, which may be another run's.
    lock = lock_run_folder(run_dir, recipe) if rank == 0 else None
    dist.barrier()
    try:
        told = None if LAUNCHER in os.environ else partial(notify, recipe.logging, run_dir)
        with guarded(run_dir, distributed.hang_seconds, distributed.timeout_seconds, told) as heartbeat:
            base = _open_base(parts_of(recipe)[0], run_dir, models)
            resolved = resolve(recipe, dist.get_world_size(), device.type, base=base, total_steps=num_steps)
            if distributed.kernels == "require":
                ops.require_kernels(device.type)
            mesh = build_mesh(resolved.layouts[0], resolved.recipe.training.seed)
            session = Session(run_dir, mesh, device, stop, heartbeat)
            finished = _train_stages(resolved, session, stop_after, verbose=verbose, accepted=accepted)
            dist.barrier(group=mesh.host_group)  # a launcher ends the other ranks when the first one has ended
    except Exception as error:
        ends.failed(run_dir, error, rank, recipe.logging)
        raise
    ends.ended(run_dir, 0 if finished else stop.exit_code, finished, stop.name if stop.agreed else "")
    destroy_process_groups()
    if lock:
        lock.close()
    return 0 if finished else stop.exit_code


def _train_stages(
    resolved: Resolved, session: Session, stop_after: int | None, *, verbose: bool, accepted: Collection[str]
) -> bool:
    """Open the data, find the start, and train part after part; return True if nothing is left to do."""
    data = _open_data(resolved, session)
    start = find_start(resolved, session, data.corpora, accepted)
    last_step = min(resolved.total_steps, stop_after or resolved.total_steps)
    session, progress = _with_display(resolved, session, start, last_step), start.progress
    base = resolved.base.checkpoint if resolved.base else None
    try:
        for number in range(len(resolved.parts)):
            if number:
                session.log_saves(start.writer.wait())
                start.writer.refuse_loss()
                base = weights_after(number - 1, resolved, session, base)
            if number < start.part:
                continue
            part = build_part(number, resolved, data, start, session, base)
            if number == start.part:
                _open_run_folder(resolved, session, start)
            if not _announce(part, resolved, data, start, last_step, verbose=verbose):
                _finish_saves(start.writer, session)
                return progress.stage == len(resolved.stages)
            if not (start.found and number == start.part):
                part.learning.begin(progress)
            if not train_part(part, data, progress, last_step):
                break
            del part  # the next one needs its memory
        _finish_saves(start.writer, session)
        start.writer.refuse_loss()
        if progress.stage == len(resolved.stages):
            session.trackers.event("finished", progress.step, f"all {resolved.total_steps} steps are taken")
        elif progress.step == stop_after:
            message = f"stopping after step {progress.step}, as --stop-after asked"
            session.trackers.event("stopping", progress.step, message)
    finally:
        session.close()
    return progress.stage == len(resolved.stages)


def _open_data(resolved: Resolved, session: Session) -> Data:
    """Open what each stage reads, make sure that all ranks read the same, and what its evaluations need."""
    corpora = _open_corpora(resolved.stages)
    for corpus in dict.fromkeys(corpora):
        _refuse_different_data(corpus, session.mesh)
    base = resolved.base.checkpoint if resolved.base else None
    return Data(corpora, evaluation.prepare(resolved.stages, corpora, base, session.mesh))


def _with_display(resolved: Resolved, session: Session, start: Start, last_step: int) -> Session:
    """Return the session with display and trackers on the main rank."""
    if not session.mesh.is_main:
        return session
    recipe = resolved.recipe
    trackers = Trackers(session.run_dir, recipe.logging, recipe.model_dump(mode="json"))
    return replace(session, display=Display(last_step, start.progress.step), trackers=trackers)


def _open_run_folder(resolved: Resolved, session: Session, start: Start) -> None:
    """Write recipe and mixes to the run folder, and open its logs: nothing can refuse the run any more.

    What an earlier call of `train` has written is unchanged until here.
    """
    start.writer.sync_logs = session.trackers.sync
    if not session.mesh.is_main:
        return
    run_dir, recipe_yaml, step = session.run_dir, load.dump(resolved.recipe), start.progress.step
    own = start.found[0] if start.found and len(resolved.parts) == 1 else None
    changed = recipe_changes(run_dir, recipe_yaml, own)
    for line in changed:
        print(line)
    for line in session.trackers.open(step, start.progress.skipped):
        session.say(line)
    parts = [[one.layout for one in resolved.stages if one.part == number] for number in range(len(resolved.parts))]
    chosen = _chosen(resolved.recipe, session.device)
    replace_file(run_dir / "recipe.yaml", annotated(recipe_yaml, parts, chosen).encode())
    if start.mix_text:
        replace_file(run_dir / MIXES, start.mix_text.encode())
    for line in changed:
        session.trackers.event("recipe_changed", step, line)
    for line in start.changes:
        print(f"--accept-changes: {line}")
        session.trackers.event("change_accepted", step, line)
    newest = max(steps_in(run_dir / "checkpoints"), default=step)
    for line in start.damage:
        # Of one that was passed over for its missing manifest it is unknown whether it was of this run.
        lost = {"lost_steps": max(0, newest - step)} if "going back to" in line else {}
        session.trackers.event("damaged", step, line, **lost)


def _chosen(recipe: Recipe, device: torch.device) -> dict[str, object]:
    """Return what keys of `distributed` that are no part of the layout are where they are `auto`."""
    native = recipe.lora is not None or not use_transformer_engine(recipe.distributed.kernels, device)
    kernels, chunk = "local" if native else "te", CHUNK_TOKENS[device.type]
    return {"kernels": kernels, "loss_chunk": chunk, "attention": "the choice of torch"}


def _announce(part: Part, resolved: Resolved, data: Data, start: Start, last_step: int, *, verbose: bool) -> bool:
    """Print what is about to train, and record the start; return False if nothing is left before `last_step`."""
    session, progress, stages = part.run.session, start.progress, resolved.stages
    is_first = part.run.stage.part == start.part
    found = start.found if is_first else None
    lines = opening_lines(part.run, progress, found[0] if found else None, verbose) if session.mesh.is_main else []
    for line in [*lines, *(phase_lines(stages, data.corpora) if is_first and lines else [])]:
        session.say(line)
    # A stage whose last step is taken may still have to be consolidated.
    settled = progress.stage == len(stages) or progress.step < stages[progress.stage].last_step
    if progress.step >= last_step and settled:
        session.say(f"nothing to do: {session.run_dir} is at step {progress.step} of {resolved.total_steps}")
        return False
    if is_first and lines:
        kind, message = ("resumed" if progress.step else "started"), lines[-1] if found else lines[0]
        layout = describe(part.run.engine.layout)
        session.trackers.event(kind, progress.step, message, ranks=session.mesh.world_size, layout=layout)
    return True


def _finish_saves(writer: CheckpointWriter, session: Session) -> None:
    with session.heartbeat.doing("saving", may_be_slow=True):
        session.log_saves(writer.finish(alive=partial(session.heartbeat.at, "")))


def take_fisher(checkpoint: Path, recipe: Recipe, out: Path) -> None:
    """Estimate Fisher and anchor of a checkpoint's model on the data of a recipe, and write them to a folder.

    Raises:
        ConfigError: as for `train`; also if the recipe names no data, or if `out` is not empty.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"{out}: already exists and would be overwritten.\n  Give another --out, or move it away.")
    device = host.prepare()
    init_process_groups(device, recipe.distributed.timeout_seconds)
    checkpoint = resolve_checkpoint(checkpoint)
    section, theirs = recipe.memory or Memory(), read_recipe(checkpoint)
    recipe = recipe.with_keys({"model": theirs.model, "moe": theirs.moe})
    if section.fisher_seq_length:
        recipe = recipe.with_keys({"training.sequence_length": section.fisher_seq_length})
    layout = choose_layout(recipe, dist.get_world_size(), device.type)
    mesh = build_mesh(layout, recipe.training.seed)
    source = section.base_data or ("mix" if recipe.data.mix else None)
    if source is None:
        raise ConfigError(
            f"continual.base_data: not given, so it is unknown what {checkpoint} was trained on.\n"
            "  Set it to a key of data.sources, or give data.mix."
        )
    corpus = open_corpus(recipe, layout.sequence_length, weights_of(recipe, source))
    _refuse_different_data(corpus, mesh)
    engine, shards = build_engine(recipe, layout, mesh, device, initialize=False)
    load_into(engine, shards, checkpoint, 0, with_moments=False)
    engine = replace(engine, ewc=Ewc(mesh, section.ewc_lambda))
    display: Display | Silent = Display(0, 0) if mesh.is_main else Silent()
    try:
        metadata = consolidation.consolidate(engine, corpus, (source,), section, recipe.training.seed, display)
        consolidation.save_file(engine, out, load.dump(recipe))
        display.say(
            f"{out}: Fisher and anchor of {checkpoint} on {source}, {metadata.samples:,} sequences of "
            f"{metadata.sequence_length}, labels of the {metadata.labels}"
        )
    finally:
        display.close()
    destroy_process_groups()


def _open_base(recipe: Recipe, run_dir: Path, models: Path | None) -> Base | None:
    """Open the base model as a checkpoint.

    A Hugging Face folder is imported into the run folder first, and adapters are merged into their base there.
    """
    if not recipe.base_model:
        return None
    # The main rank's answer counts: a base that is a run may save its next checkpoint while the ranks look.
    found = [load.base_folder(recipe.base_model, models)]
    dist.broadcast_object_list(found)
    folder = found[0]
    is_whole = (folder / MANIFEST).is_file() and not (folder / BASE).is_file()
    checkpoint = folder if is_whole else run_dir / "base"
    if dist.get_rank() == 0 and not (checkpoint / MANIFEST).is_file():
        if (folder / BASE).is_file():
            merge_adapters(resolve_checkpoint(folder), checkpoint)
        else:
            hugging_face.import_folder(folder, checkpoint, say=print)
    dist.barrier()
    verify_together(checkpoint, dist.group.WORLD)
    theirs = read_recipe(checkpoint)
    assert theirs.model is not None, "read_recipe refuses that"
    for key in sorted(recipe.model.model_fields_set) if recipe.model is not None and dist.get_rank() == 0 else ():
        if (ours := getattr(recipe.model, key)) != (has := getattr(theirs.model, key)) and key != "init_std":
            print(f"model.{key}: {ours} is not used: the shape is that of base_model {folder}, which has {has}")
    return Base(checkpoint, theirs.model, experts_of(theirs.moe, recipe.moe, folder))


def _open_corpora(stages: Sequence[Stage]) -> list[Dataset]:
    """Open the data of each stage; stages of one part that read the same data share it."""
    opened: dict[tuple, Dataset] = {}
    corpora = []
    for stage in stages:
        length = stage.layout.sequence_length
        key = (stage.part, length, *stage.mix.items())
        if key not in opened:
            opened[key] = open_dataset(stage.recipe, length, stage.mix)
        corpora.append(opened[key])
    return corpora


def _refuse_different_data(corpus: Dataset, mesh: Mesh) -> None:
    """Compare the fingerprints of the data over all ranks: a node may hold older copies of the files."""
    fingerprints: list = [None] * mesh.world_size
    dist.all_gather_object(fingerprints, corpus.fingerprint(), group=mesh.host_group)
    other = next((rank for rank, fingerprint in enumerate(fingerprints) if fingerprint != fingerprints[0]), None)
    if other is not None:
        raise ConfigError(
            f"data.prepared: rank {other} reads other data ({fingerprints[other]}) than rank 0 ({fingerprints[0]}).\n"
            "  Put the prepared data sets on storage that all nodes share, or copy the same files to each."
        )
