"""Composition root: from a recipe to a run, part by part and stage by stage."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
import torch.distributed as dist

from igla_mega import ops
from igla_mega.checkpoint import hugging_face, store
from igla_mega.checkpoint.adapters import merge_adapters
from igla_mega.checkpoint.base import BASE, base_note, digest_of_checkpoint, refuse_other_base
from igla_mega.checkpoint.folder import read_recipe, resolve_checkpoint
from igla_mega.checkpoint.load import find_checkpoint, verify_together
from igla_mega.checkpoint.local import Local, folder_of
from igla_mega.checkpoint.progress import Progress, Retention
from igla_mega.checkpoint.remote import Remote
from igla_mega.config import load
from igla_mega.config.errors import ConfigError
from igla_mega.config.features import Memory, Moe
from igla_mega.config.schema import Recipe
from igla_mega.data.batches import BatchShard, Corpus, Dataset
from igla_mega.data.blend import recorded_mixes
from igla_mega.data.conversations import Pairs
from igla_mega.data.journal import replace_file
from igla_mega.distributed import host
from igla_mega.distributed.mesh import Mesh, build_mesh, destroy_process_groups, init_process_groups
from igla_mega.engine.build import build_engine, frozen_chunks, load_into, num_steps, open_corpus, open_dataset
from igla_mega.engine.heartbeat import Heartbeat, follow_layers
from igla_mega.engine.step import Engine
from igla_mega.layout.layout import Layout
from igla_mega.layout.stages import Stage, parts_of, weights_of
from igla_mega.model.spec import DTYPES
from igla_mega.objective.ewc import Ewc
from igla_mega.plan.choose import choose_layout, stages_of
from igla_mega.train import consolidation, dpo_reference, evaluation, loop
from igla_mega.train.console import Display, Silent
from igla_mega.train.metrics import Trackers, log_saves, log_stopping, peak_flops
from igla_mega.train.opening import opening_lines, phase_lines
from igla_mega.train.phases import Learning, finishes, next_stage
from igla_mega.train.run_folder import lock_run_folder, recipe_changes
from igla_mega.train.state import Prepared, Run
from igla_mega.train.stop_signal import StopRequest
from igla_mega.train.watchdog import HANG, guarded


def train(
    recipe: Recipe,
    run_dir: Path,
    *,
    stop_after: int | None = None,
    models: Path | None = None,
    verbose: bool = False,
) -> int:
    """Run a recipe on this rank, from where its run folder left off.

    Args:
        recipe: resolved; its data is prepared.
        stop_after: the step at which this call saves and stops, when that is before the last.
        models: folder below which `base_model` is looked up.
        verbose: say at the start what context parallelism costs.

    Returns:
        The exit code: 0, or what tells a scheduler that the run was asked to stop and goes on (`loop.StopRequest`).

    Raises:
        ConfigError: something the user gave does not fit; said before any weight is allocated.
    """
    device = host.prepare()
    if recipe.distributed.keep_freed_memory and device.type == "cpu":
        host.keep_freed_memory()
    distributed = recipe.distributed
    init_process_groups(device, distributed.timeout_seconds, run_dir / HANG)
    stop = StopRequest(dist.get_world_size() == 1, device)
    # First of all: what the watchdog writes there may be another run's.
    lock = lock_run_folder(run_dir, recipe) if dist.get_rank() == 0 else None
    dist.barrier()
    with guarded(run_dir, distributed.hang_seconds, distributed.timeout_seconds) as heartbeat:
        finished = _train(recipe, run_dir, device, stop, heartbeat, stop_after, models, verbose)
    destroy_process_groups()
    if lock:
        lock.close()
    return 0 if finished else stop.exit_code


def _train(
    recipe: Recipe,
    run_dir: Path,
    device: torch.device,
    stop: StopRequest,
    heartbeat: Heartbeat,
    stop_after: int | None,
    models: Path | None,
    verbose: bool,
) -> bool:
    """Returns whether all is done, also what follows the last step."""
    parts, base = parts_of(recipe), None
    if parts[0].base_model:
        base, parts[0] = _with_base(parts[0], run_dir, models)
    if recipe.stages is None:
        recipe = parts[0]
    else:
        parts = [part.model_copy(update={"model": parts[0].model, "moe": parts[0].moe}) for part in parts]
        recipe = recipe.model_copy(update={"stages": tuple(parts)})
    stages = stages_of(recipe, dist.get_world_size(), device.type, num_steps)
    if recipe.distributed.kernels == "require":
        ops.require_kernels(device.type)
    mesh = build_mesh(stages[0].layout, recipe.training.seed)
    finished = _train_stages(recipe, run_dir, stages, mesh, device, stop, heartbeat, stop_after, base, verbose)
    dist.barrier(group=mesh.host_group)  # a launcher ends the others when the first one has ended
    return finished


def take_fisher(checkpoint: Path, recipe: Recipe, out: Path) -> None:
    """Write Fisher and anchor of a checkpoint's model, on the data of a recipe, as a folder that a recipe can name.

    Raises:
        ConfigError: as for `train`; also when the recipe does not say which data, or `out` holds something.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"{out}: is there already, and would be lost.\n  Give another --out, or move it away.")
    device = host.prepare()
    init_process_groups(device, recipe.distributed.timeout_seconds)
    checkpoint = resolve_checkpoint(checkpoint)
    asked = recipe.memory or Memory()
    training = recipe.training
    if asked.fisher_seq_length:
        training = training.model_copy(update={"sequence_length": asked.fisher_seq_length})
    theirs = read_recipe(checkpoint)
    recipe = recipe.model_copy(update={"model": theirs.model, "moe": theirs.moe, "training": training})
    layout = choose_layout(recipe, dist.get_world_size(), device.type)
    mesh = build_mesh(layout, recipe.training.seed)
    source = asked.base_data or ("mix" if recipe.data.mix else None)
    if source is None:
        raise ConfigError(
            f"continual.base_data: does not say what {checkpoint} was trained on.\n"
            "  Set it to a key of data.sources, or give data.mix."
        )
    corpus = open_corpus(recipe, layout.sequence_length, weights_of(recipe, source))
    _all_read_the_same(corpus, mesh)
    engine, shards = build_engine(recipe, layout, mesh, device, initialize=False)
    load_into(engine, shards, checkpoint, 0, with_moments=False)
    engine = replace(engine, ewc=Ewc(mesh, asked.ewc_lambda))
    display: Display | Silent = Display(0, 0) if mesh.is_main else Silent()
    try:
        metadata = consolidation.consolidate(engine, corpus, (source,), asked, recipe.training.seed, display)
        consolidation.save_file(engine, out, load.dump(recipe))
        display.say(
            f"{out}: Fisher and anchor of {checkpoint} on {source}, {metadata.samples:,} sequences of "
            f"{metadata.sequence_length}, labels of the {metadata.labels}"
        )
    finally:
        display.close()
    destroy_process_groups()


def _with_base(recipe: Recipe, run_dir: Path, models: Path | None) -> tuple[Path, Recipe]:
    """The base model as a checkpoint (one of Hugging Face's is imported here), and the recipe with its shape."""
    folder = load.base_folder(recipe.base_model or "", models)
    checkpoint = folder if (folder / store.MANIFEST).is_file() else run_dir / "base"
    if dist.get_rank() == 0 and not (checkpoint / store.MANIFEST).is_file():
        hugging_face.import_folder(folder, checkpoint, say=print)
    dist.barrier()
    verify_together(checkpoint, dist.group.WORLD)
    theirs = read_recipe(checkpoint)
    return checkpoint, recipe.model_copy(update={"model": theirs.model, "moe": experts_of(theirs, recipe, folder)})


def experts_of(base: Recipe, recipe: Recipe, folder: Path) -> Moe | None:
    """The experts that a run trains: as its recipe says, which must be as many as the base model has, or the base's.

    Raises:
        ConfigError: the base has none, others, or parts of a layer that the recipe lacks.
    """
    if recipe.moe is None or base.moe is None:
        if recipe.moe is not None:
            raise ConfigError(
                f"base_model: {folder} is a dense model, and the recipe has {recipe.moe.num_experts} experts a layer.\n"
                f"  Make it a mixture: igla-mega import HF_FOLDER CKPT --upcycle {recipe.moe.num_experts}, and name "
                "CKPT; or set moe=null."
            )
        return base.moe
    breaches = []
    for key in ("num_experts", "shared_intermediate_size", "pre_softmax", "scaling_factor"):
        wanted, has = getattr(recipe.moe, key), getattr(base.moe, key)
        if wanted != has:
            breaches.append(f"moe.{key}: {wanted}, and {folder} has {has}. Set it to what the base model has.")
    if (recipe.moe.bias_update_rate > 0) != (base.moe.bias_update_rate > 0):
        rate, has = recipe.moe.bias_update_rate, "no biases" if base.moe.bias_update_rate == 0 else "biases"
        breaches.append(f"moe.bias_update_rate: {rate:g}, and {folder} has {has}. Set it to what the base model has.")
    if breaches:
        raise ConfigError(*breaches)
    return recipe.moe


def _train_stages(
    recipe: Recipe,
    run_dir: Path,
    stages: list[Stage],
    mesh: Mesh,
    device: torch.device,
    stop: StopRequest,
    heartbeat: Heartbeat,
    stop_after: int | None,
    base: Path | None,
    verbose: bool,
) -> bool:
    corpora = _open_corpora(stages)
    for corpus in dict.fromkeys(corpora):
        _all_read_the_same(corpus, mesh)
    prepared = evaluation.prepare(stages, corpora, base, mesh)
    recipe_yaml = load.dump(recipe)
    parts = parts_of(recipe)
    ends = [list(group)[-1].last_step for _, group in groupby(stages, key=lambda stage: stage.part)]

    say: Callable[[str], None] = print if mesh.is_main else lambda text: None
    checkpoints = run_dir / "checkpoints"
    local, remote = _other_folders(recipe, checkpoints, mesh)
    find = partial(find_checkpoint, checkpoints, mesh, say, local=local, remote=remote)
    found = find()
    progress = found[1] if found else Progress()
    _same_batches(progress, stages)
    if isinstance(corpora[0], Corpus) and recipe.stages is None and recipe.curriculum is None and recipe.data.mix:
        corpora[0].follow(_mixes(recipe, run_dir, progress, mesh, say))
    # Where the checkpoint ends a part, the next one begins with its weights.
    progress.stage = next_stage(stages, progress)
    number = stages[min(progress.stage, len(stages) - 1)].part
    if number and progress.step == ends[number - 1]:
        found = None

    total_steps = stages[-1].last_step
    last_step = min(total_steps, stop_after or total_steps)
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
    display: Display | Silent = Silent()
    trackers = None
    if mesh.is_main:
        run_dir.mkdir(parents=True, exist_ok=True)
        for line in recipe_changes(run_dir, recipe_yaml):
            say(line)
        replace_file(run_dir / "recipe.yaml", recipe_yaml.encode())
        trackers = Trackers(run_dir, recipe.logging, resume_step=progress.step, recipe=recipe.model_dump(mode="json"))
        display = Display(last_step, progress.step)
    settled = progress.stage == len(stages) or progress.step < stages[progress.stage].last_step
    nothing_left = progress.step >= last_step and settled
    try:
        for part, own in enumerate(parts):
            if part:
                log_saves(writer.wait(), display, trackers)
                writer.refuse_loss()
                base = _weights_after(parts[part - 1], base, checkpoints, ends[part - 1], run_dir, mesh)
            if part < number:
                continue
            first = next(index for index, stage in enumerate(stages) if stage.part == part)
            start, corpus = stages[first], corpora[first]
            engine, texts, restore = _build_part(
                own, start, corpus, mesh, device, heartbeat, found, base, progress, run_dir, display
            )
            run = Run(
                recipe=own,
                recipe_yaml=load.dump(own),
                engine=engine,
                corpus=corpus,
                share=_share(start.layout, mesh),
                writer=writer,
                device=device,
                stage=start,
                last_step=last_step,
                peak_flops=peak_flops(device, DTYPES[recipe.distributed.precision]),
                stop=stop,
                rewind=partial(_rewind, find, start, restore),
                texts=texts,
            )
            if mesh.is_main:
                opening = opening_lines(run, progress, found[0] if found else None, verbose)
                for line in [*opening, *(phase_lines(stages, corpora) if part == number else [])]:
                    display.say(line)
            if nothing_left:
                display.say(f"nothing to do: {run_dir} is at step {progress.step} of {total_steps}")
                _finish_saves(writer, heartbeat, display, trackers)
                return progress.stage == len(stages)
            if trackers and part == number:
                words = opening[-1] if found else opening[0]
                trackers.event("resumed" if progress.step else "started", progress.step, words, ranks=mesh.world_size)
            learning = Learning(
                own, stages, corpora, engine, partial(_corpus_of, own), base is not None, display, trackers
            )
            if not found:
                learning.begin(progress)
            if not _train_part(run, learning, prepared, progress, last_step):
                break
            found = None
            del run, engine, learning, restore  # before the next part's are made
        _finish_saves(writer, heartbeat, display, trackers)
        writer.refuse_loss()
        if trackers and progress.stage == len(stages):
            trackers.event("finished", progress.step, f"all {total_steps} steps are taken")
        elif trackers and progress.step == stop_after:
            trackers.event("stopping", progress.step, f"stopping after step {progress.step}, as --stop-after asked")
    finally:
        display.close()
        if trackers:
            trackers.close()
    return progress.stage == len(stages)


def _finish_saves(
    writer: store.CheckpointWriter, heartbeat: Heartbeat, display: Display | Silent, trackers: Trackers | None
) -> None:
    with heartbeat.doing("saving", may_be_slow=True):
        log_saves(writer.finish(alive=partial(heartbeat.at, "")), display, trackers)


def _other_folders(recipe: Recipe, checkpoints: Path, mesh: Mesh) -> tuple[Local | None, Remote | None]:
    """Where checkpoints lie besides: on this node's own disk, and in an object store."""
    asked, where = recipe.checkpoint, None
    if asked.local_folder is not None:
        run = f"{checkpoints.parent.name}-{store.run_id(checkpoints, mesh)}"
        # How state is cut among the ranks follows from these and the sizes of the mesh.
        layout = json.dumps([recipe.distributed.model_dump(mode="json"), recipe.model and recipe.model.model_dump()])
        folder = folder_of(asked.local_folder, run)
        where = Local(folder, mesh, mesh.host_group, layout, asked.local_keep_last)
    return where, Remote(asked.remote) if asked.remote is not None else None


def _corpus_of(recipe: Recipe, mix: Mapping[str, float], sequence_length: int) -> Corpus:
    return open_corpus(recipe, sequence_length, mix)


def _train_part(
    run: Run,
    learning: Learning,
    prepared: Sequence[Prepared],
    progress: Progress,
    last_step: int,
) -> bool:
    """Train the stages of the part that `run` was built for, from `progress` on.

    Returns:
        Whether it is complete, and steps of another part may follow.
    """
    display, trackers, part = learning.display, learning.trackers, run.stage.part
    for index, stage in enumerate(learning.stages):
        if stage.part != part or index < progress.stage:
            continue
        run = replace(
            run,
            recipe=stage.recipe,
            engine=replace(run.engine, layout=stage.layout),
            corpus=learning.corpora[index],
            share=_share(stage.layout, run.engine.mesh),
            stage=stage,
            last_step=min(stage.last_step, last_step),
            prepared=prepared[index],
        )
        if progress.step == stage.first_step and _is_tuning(stage):
            progress.before = evaluation.validate(run)
            evaluation.log_validation(progress.before, run, progress, display, trackers)
        elif progress.step == stage.first_step:
            progress.before = {}
        if progress.step == stage.first_step:
            progress.losses = []
        if not loop.train(run, progress, display, trackers):
            return False
        if run.stop.agreed and (finishes(stage) or progress.step < learning.stages[-1].last_step):
            log_stopping(run, progress, display, trackers)
            return False
        if learning.finish(index, progress):
            run.save(progress)
        if progress.step >= last_step:
            return False
    return True


def _is_tuning(stage: Stage) -> bool:
    """Whether a stage changes a model that was trained before to something it is then measured by."""
    return not stage.domain and (stage.recipe.form != "text" or stage.recipe.lora is not None)


def _build_part(
    recipe: Recipe,
    stage: Stage,
    corpus: Dataset,
    mesh: Mesh,
    device: torch.device,
    heartbeat: Heartbeat,
    found: tuple[Path, Progress] | None,
    base: Path | None,
    progress: Progress,
    run_dir: Path,
    display: Display | Silent,
) -> tuple[Engine, Mapping[str, str], Callable[[Path, Progress], None]]:
    """Build the engine of a part with its weights: a checkpoint's, or the base's it starts from.

    Returns:
        The engine; what its checkpoints say beside the tensors: file name -> text; and what makes the engine what it
        was at a checkpoint of the part.
    """
    engine, shards = build_engine(recipe, stage.layout, mesh, device, initialize=not (found or base), base=base)
    engine = replace(engine, heartbeat=heartbeat)
    follow_layers(heartbeat, engine.chunks)
    asked = recipe.memory
    if asked is not None and asked.ewc_lambda > 0:
        engine = replace(engine, ewc=Ewc(mesh, asked.ewc_lambda, asked.coupling))
    mode = dpo_reference.mode_of(recipe.dpo, adapters=recipe.lora is not None) if recipe.dpo is not None else None
    texts, digest = {}, ""
    if base is not None and (engine.adapters or mode == "cached"):
        digest = digest_of_checkpoint(base, mesh.rank, mesh.world_size, mesh.host_group)
    if base is not None and engine.adapters:
        texts[BASE] = base_note(base, digest, recipe.base_model)
        if found:
            refuse_other_base(found[0], base, digest)
    elif base is not None and (not found or mode == "cached"):
        load_into(engine, shards, base, 0, with_moments=False)
    if recipe.dpo is not None and mode is not None:
        frozen = frozen_chunks(recipe, stage.layout, mesh, device, base) if mode == "model" else []
        if mode == "cached":
            assert isinstance(corpus, Pairs), "a recipe with `dpo` reads pairs"
            # Without a base the untrained model is the reference: its weights follow from the seed.
            dpo_reference.cache(engine, corpus, _share(stage.layout, mesh), digest, run_dir, display)
        engine = replace(engine, objective=dpo_reference.objective(recipe.dpo, mode, engine, frozen))

    def restore(checkpoint: Path, at: Progress) -> None:
        with consolidation.restoring(engine, checkpoint):
            load_into(engine, shards, checkpoint, _num_updates(at, stage))

    if found:
        restore(found[0], progress)
    return engine, texts, restore


def _num_updates(progress: Progress, start: Stage) -> int:
    """Updates that the optimizer of a part has made: a step whose samples were left out was none."""
    left_out = sum(start.first_step < step <= progress.step for step in progress.skipped)
    return progress.step - start.first_step - left_out


def _rewind(
    find: Callable[[], tuple[Path, Progress] | None],
    start: Stage,
    restore: Callable[[Path, Progress], None],
    progress: Progress,
) -> bool:
    """Make engine and `progress` what they were at the last checkpoint, where that is of the stage at hand."""
    found = find()
    if found is None or found[1].step <= start.first_step or found[1].stage != progress.stage:
        return False
    restore(*found)
    for name, value in vars(found[1]).items():
        setattr(progress, name, value)
    return True


def _weights_after(recipe: Recipe, base: Path | None, checkpoints: Path, step: int, run_dir: Path, mesh: Mesh) -> Path:
    """A checkpoint of the whole model as a part has left it; adapters are merged into their base."""
    checkpoint = store.step_dir(checkpoints, step)
    if recipe.lora is None:
        return checkpoint
    merged = run_dir / "merged" / checkpoint.name
    if mesh.is_main and not (merged / store.MANIFEST).is_file():
        merge_adapters(checkpoint, merged, base)
    dist.barrier(group=mesh.host_group)
    return merged


def _share(layout: Layout, mesh: Mesh) -> BatchShard:
    return BatchShard(layout.global_batch, layout.micro_batch_size, layout.data, mesh.data.rank)


def _open_corpora(stages: Sequence[Stage]) -> list[Dataset]:
    """The data of each stage; stages of one part that read the same share it."""
    opened: dict[tuple, Dataset] = {}
    corpora = []
    for stage in stages:
        length = stage.layout.sequence_length
        key = (stage.part, length, *stage.mix.items())
        if key not in opened:
            opened[key] = open_dataset(stage.recipe, length, stage.mix)
        corpora.append(opened[key])
    return corpora


def _mixes(
    recipe: Recipe, run_dir: Path, progress: Progress, mesh: Mesh, say: Callable[[str], None]
) -> list[tuple[int, dict[str, float]]]:
    """The mixes that the run has followed; a mix that the recipe has changed takes effect at the next step."""
    mixes = recorded_mixes(run_dir / "mix.json", recipe.data.mix, progress.samples, write=mesh.is_main)
    if len(mixes) > 1 and mixes[-1][0] == progress.samples:
        say(f"data.mix: another one from sample {progress.samples:,} on; every source goes on where it was (mix.json)")
    return mixes


def _all_read_the_same(corpus: Dataset, mesh: Mesh) -> None:
    fingerprints: list = [None] * mesh.world_size
    dist.all_gather_object(fingerprints, corpus.fingerprint(), group=mesh.host_group)
    other = next((rank for rank, fingerprint in enumerate(fingerprints) if fingerprint != fingerprints[0]), None)
    if other is not None:
        raise ConfigError(
            f"data.prepared: rank {other} reads other data than rank 0 ({fingerprints[other]}, {fingerprints[0]}).\n"
            "  Put the prepared data sets on storage that all nodes share, or copy the same files to each."
        )


def _same_batches(progress: Progress, stages: Sequence[Stage]) -> None:
    beyond = max(0, progress.step - stages[-1].last_step) * stages[-1].layout.global_batch
    expected = beyond + sum(
        min(max(progress.step - stage.first_step, 0), stage.num_steps) * stage.layout.global_batch for stage in stages
    )
    if progress.samples != expected:
        raise ConfigError(
            f"training.batch_size: the run took {progress.samples:,} sequences until step {progress.step}, in this "
            f"recipe these are {expected:,}: samples would be skipped or repeated.\n"
            "  Keep the batch size and the phases, or start in a new run folder."
        )
