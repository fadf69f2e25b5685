"""Composition root: from a recipe to a run, part by part and stage by stage."""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import IO

import torch
import torch.distributed as dist

from igla_mega import host, ops, parallel
from igla_mega.assemble import build_engine, frozen_chunks, load_into, num_steps, open_corpus, open_dataset
from igla_mega.checkpoint import adapters, hugging_face, single, store, tuned
from igla_mega.checkpoint.local import Local, folder_of
from igla_mega.checkpoint.remote import Remote
from igla_mega.checkpoint.single import DTYPES
from igla_mega.config import json_text, load, yaml_text
from igla_mega.config.errors import ConfigError
from igla_mega.config.features import Memory, Moe
from igla_mega.config.schema import Recipe
from igla_mega.data.batches import Corpus, Dataset, Share
from igla_mega.data.blend import recorded_mixes
from igla_mega.data.conversations import Pairs
from igla_mega.data.journal import replace_file
from igla_mega.objective.ewc import Ewc
from igla_mega.ops.ring_attention import choose_schedule, inner_group_size, ranks_of_a_node
from igla_mega.parallel import Mesh
from igla_mega.plan import attention
from igla_mega.plan.layout import Layout, choose_layout
from igla_mega.plan.stages import Stage, parts_of, stages_of, weights_of
from igla_mega.train import evaluation, loop, memory, preference
from igla_mega.train.metrics import Trackers
from igla_mega.train.phases import Learning, finishes, next_stage
from igla_mega.train.progress import Display, Silent
from igla_mega.train.pulse import Pulse, follow_layers
from igla_mega.train.step import Engine
from igla_mega.train.watchdog import HANG, guarded

LOCK_SECONDS = 30.0
"""How long ranks that are started again wait for the run folder of those before them."""


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
    parallel.start(device, distributed.timeout_seconds, run_dir / HANG)
    stop = loop.StopRequest(dist.get_world_size() == 1, device)
    # First of all: what the watchdog writes there may be another run's.
    lock = _lock(run_dir, recipe) if dist.get_rank() == 0 else None
    dist.barrier()
    with guarded(run_dir, distributed.hang_seconds, distributed.timeout_seconds) as pulse:
        finished = _train(recipe, run_dir, device, stop, pulse, stop_after, models, verbose)
    parallel.stop()
    if lock:
        lock.close()
    return 0 if finished else stop.exit_code


def _train(
    recipe: Recipe,
    run_dir: Path,
    device: torch.device,
    stop: loop.StopRequest,
    pulse: Pulse,
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
    mesh = parallel.build(stages[0].layout, recipe.training.seed)
    finished = _train_stages(recipe, run_dir, stages, mesh, device, stop, pulse, stop_after, base, verbose)
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
    parallel.start(device, recipe.distributed.timeout_seconds)
    checkpoint = single.resolve_checkpoint(checkpoint)
    asked = recipe.memory or Memory()
    training = recipe.training
    if asked.fisher_seq_length:
        training = training.model_copy(update={"sequence_length": asked.fisher_seq_length})
    theirs = single.read_recipe(checkpoint)
    recipe = recipe.model_copy(update={"model": theirs.model, "moe": theirs.moe, "training": training})
    layout = choose_layout(recipe, dist.get_world_size(), device.type)
    mesh = parallel.build(layout, recipe.training.seed)
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
        origin = memory.consolidate(engine, corpus, (source,), asked, recipe.training.seed, display)
        memory.save_file(engine, out, load.dump(recipe))
        display.say(
            f"{out}: Fisher and anchor of {checkpoint} on {source}, {origin.samples:,} sequences of "
            f"{origin.sequence_length}, labels of the {origin.labels}"
        )
    finally:
        display.close()
    parallel.stop()


def _lock(run_dir: Path, recipe: Recipe) -> IO[str]:
    """Keep a second run, and another recipe's, out of the folder; the lock goes with the process, however it ends.

    Raises:
        ConfigError: another process trains in it, or another recipe has; or nothing can be written there.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = open(run_dir / ".lock", "a+")  # noqa: SIM115 (held while the run lasts)
    except OSError as error:
        raise ConfigError(
            f"{run_dir}: no run can be written there ({error.strerror}).\n  Give another --run, or mend its rights."
        ) from None
    # A launcher that starts the ranks again may do so before the last ones are gone.
    patience = LOCK_SECONDS if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) else 0
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                break  # a file system without locks
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"{run_dir}: another run is training in this folder{_holder(lock)}.\n"
                    "  Wait for it, end it, or give another --run."
                ) from None
            time.sleep(0.2)
    _refuse_other_recipe(run_dir, recipe)
    lock.truncate(0)
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    lock.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}) + "\n")
    lock.flush()
    return lock


def _holder(lock: IO[str]) -> str:
    """Who wrote into a lock file, in words."""
    try:
        lock.seek(0)
        other = json_text.loads(lock.read())
        return f": process {other['pid']} on {other['host']}, since {other['since']}"
    except (ValueError, KeyError, TypeError, OSError):
        return ""


def _refuse_other_recipe(run_dir: Path, recipe: Recipe) -> None:
    """What a folder has trained goes on as what it is: a name, what is learned, and which weights train."""
    if not store.steps_in(run_dir / "checkpoints"):
        return
    if not (old := _last_recipe(run_dir)):
        return  # what matters is checked against the checkpoint
    new = _flat(yaml_text.parse(load.dump(recipe), "recipe.yaml"))
    kinds = ("lora", "dpo", "sft", "stages", "curriculum")
    breaches = []
    if old.get("name") != new.get("name"):
        breaches.append(f"recipe `{old.get('name')}` and not `{new.get('name')}`")
    for kind in kinds:
        had, has = (any(key.split(".")[0] == kind and tree[key] is not None for key in tree) for tree in (old, new))
        if had != has:
            breaches.append(f"{'with' if had else 'without'} `{kind}`")
    if breaches:
        raise ConfigError(
            f"{run_dir}: holds a run of another recipe: {', '.join(breaches)}.\n"
            f"  Give another --run; or go on with its own, {run_dir / 'recipe.yaml'}."
        )


def _with_base(recipe: Recipe, run_dir: Path, models: Path | None) -> tuple[Path, Recipe]:
    """The base model as a checkpoint (one of Hugging Face's is imported here), and the recipe with its shape."""
    folder = load.base_folder(recipe.base_model or "", models)
    checkpoint = folder if (folder / store.MANIFEST).is_file() else run_dir / "base"
    if dist.get_rank() == 0 and not (checkpoint / store.MANIFEST).is_file():
        hugging_face.import_folder(folder, checkpoint, say=print)
    dist.barrier()
    store.verify_together(checkpoint, dist.group.WORLD)
    theirs = single.read_recipe(checkpoint)
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
    stop: loop.StopRequest,
    pulse: Pulse,
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
    find = partial(store.find, checkpoints, mesh, say, local=local, remote=remote)
    found = find()
    progress = found[1] if found else store.Progress()
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
        store.Retention(recipe.checkpoint.keep_last, recipe.checkpoint.keep_every, frozenset(ends[:-1])),
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
        for line in _changes(run_dir, recipe_yaml):
            say(line)
        replace_file(run_dir / "recipe.yaml", recipe_yaml.encode())
        trackers = Trackers(run_dir, recipe.logging, resume_step=progress.step, recipe=recipe.model_dump(mode="json"))
        display = Display(last_step, progress.step)
    settled = progress.stage == len(stages) or progress.step < stages[progress.stage].last_step
    nothing_left = progress.step >= last_step and settled
    try:
        for part, own in enumerate(parts):
            if part:
                loop.report_saves(writer.wait(), display, trackers)
                writer.refuse_loss()
                base = _weights_after(parts[part - 1], base, checkpoints, ends[part - 1], run_dir, mesh)
            if part < number:
                continue
            first = next(index for index, stage in enumerate(stages) if stage.part == part)
            start, corpus = stages[first], corpora[first]
            engine, texts, restore = _build_part(
                own, start, corpus, mesh, device, pulse, found, base, progress, run_dir, display
            )
            run = loop.Run(
                recipe=own,
                recipe_yaml=load.dump(own),
                engine=engine,
                corpus=corpus,
                share=_share(start.layout, mesh),
                writer=writer,
                device=device,
                stage=start,
                last_step=last_step,
                peak_flops=loop.peak_flops(device, DTYPES[recipe.distributed.precision]),
                stop=stop,
                rewind=partial(_rewind, find, start, restore),
                texts=texts,
            )
            if mesh.is_main:
                opening = _opening(run, progress, found[0] if found else None, verbose)
                for line in [*opening, *(_phases(stages, corpora) if part == number else [])]:
                    display.say(line)
            if nothing_left:
                display.say(f"nothing to do: {run_dir} is at step {progress.step} of {total_steps}")
                _finish_saves(writer, pulse, display, trackers)
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
        _finish_saves(writer, pulse, display, trackers)
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
    writer: store.CheckpointWriter, pulse: Pulse, display: Display | Silent, trackers: Trackers | None
) -> None:
    with pulse.doing("saving", patient=True):
        loop.report_saves(writer.finish(alive=partial(pulse.at, "")), display, trackers)


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
    run: loop.Run,
    learning: Learning,
    prepared: Sequence[evaluation.Prepared],
    progress: store.Progress,
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
            loop.tell_stopping(run, progress, display, trackers)
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
    pulse: Pulse,
    found: tuple[Path, store.Progress] | None,
    base: Path | None,
    progress: store.Progress,
    run_dir: Path,
    display: Display | Silent,
) -> tuple[Engine, Mapping[str, str], Callable[[Path, store.Progress], None]]:
    """Build the engine of a part with its weights: a checkpoint's, or the base's it starts from.

    Returns:
        The engine; what its checkpoints say beside the tensors: file name -> text; and what makes the engine what it
        was at a checkpoint of the part.
    """
    engine, shards = build_engine(recipe, stage.layout, mesh, device, initialize=not (found or base), base=base)
    engine = replace(engine, pulse=pulse)
    follow_layers(pulse, engine.chunks)
    asked = recipe.memory
    if asked is not None and asked.ewc_lambda > 0:
        engine = replace(engine, ewc=Ewc(mesh, asked.ewc_lambda, asked.coupling))
    mode = preference.mode_of(recipe.dpo, adapters=recipe.lora is not None) if recipe.dpo is not None else None
    texts, digest = {}, ""
    if base is not None and (engine.adapters or mode == "cached"):
        digest = adapters.digest_of_checkpoint(base, mesh.rank, mesh.world_size, mesh.host_group)
    if base is not None and engine.adapters:
        texts[adapters.BASE] = tuned.base_note(base, digest, recipe.base_model)
        if found:
            tuned.refuse_other_base(found[0], base, digest)
    elif base is not None and (not found or mode == "cached"):
        load_into(engine, shards, base, 0, with_moments=False)
    if recipe.dpo is not None and mode is not None:
        frozen = frozen_chunks(recipe, stage.layout, mesh, device, base) if mode == "model" else []
        if mode == "cached":
            assert isinstance(corpus, Pairs), "a recipe with `dpo` reads pairs"
            # Without a base the untrained model is the reference: its weights follow from the seed.
            preference.cache(engine, corpus, _share(stage.layout, mesh), digest, run_dir, display)
        engine = replace(engine, objective=preference.objective(recipe.dpo, mode, engine, frozen))

    def restore(checkpoint: Path, at: store.Progress) -> None:
        with memory.restoring(engine, checkpoint):
            load_into(engine, shards, checkpoint, _num_updates(at, stage))

    if found:
        restore(found[0], progress)
    return engine, texts, restore


def _num_updates(progress: store.Progress, start: Stage) -> int:
    """Updates that the optimizer of a part has made: a step whose samples were left out was none."""
    left_out = sum(start.first_step < step <= progress.step for step in progress.skipped)
    return progress.step - start.first_step - left_out


def _rewind(
    find: Callable[[], tuple[Path, store.Progress] | None],
    start: Stage,
    restore: Callable[[Path, store.Progress], None],
    progress: store.Progress,
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
        tuned.merge_adapters(checkpoint, merged, base)
    dist.barrier(group=mesh.host_group)
    return merged


def _share(layout: Layout, mesh: Mesh) -> Share:
    return Share(layout.global_batch, layout.micro_batch_size, layout.data, mesh.data.rank)


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
    recipe: Recipe, run_dir: Path, progress: store.Progress, mesh: Mesh, say: Callable[[str], None]
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


def _same_batches(progress: store.Progress, stages: Sequence[Stage]) -> None:
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


def _changes(run_dir: Path, recipe_yaml: str) -> list[str]:
    """What the recipe says otherwise than the one this run folder was trained with."""
    if not (old := _last_recipe(run_dir)):
        return []
    new = _flat(yaml_text.parse(recipe_yaml, "recipe.yaml"))
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return [f"{key}: was {old.get(key)}, is {new.get(key)} from here on" for key in keys]


def _last_recipe(run_dir: Path) -> dict:
    """What a folder was last trained with; empty where that cannot be read."""
    try:
        return _flat(yaml_text.parse((run_dir / "recipe.yaml").read_text(), "recipe.yaml"))
    except (OSError, ValueError, AttributeError):
        return {}


def _flat(tree: dict, prefix: str = "") -> dict:
    flat: dict = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _opening(run: loop.Run, progress: store.Progress, checkpoint: Path | None, verbose: bool) -> list[str]:
    layout, model = run.engine.layout, run.recipe.model
    assert model is not None
    sizes = {
        "tensor": layout.tensor,
        "pipeline": layout.pipeline,
        "context": layout.context,
        "data": layout.data,
    }
    split = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "one process"
    split += f" (experts over {layout.expert})" if layout.expert > 1 else ""
    lines = [
        f"{run.recipe.name}: {_parameters(run.recipe)} parameters, {layout.strategy}, {split}, "
        f"{layout.global_batch} x {layout.sequence_length} tokens a step, {run.recipe.distributed.precision}",
        *(_context_parallel(run, verbose) if layout.context > 1 else []),
        *layout.notes,
        *run.corpus.notes,
    ]
    if checkpoint:
        lines.append(f"resuming at step {progress.step} ({progress.tokens:,} tokens) from {checkpoint}")
    return lines


def _parameters(recipe: Recipe) -> str:
    model, moe = recipe.model, recipe.moe
    assert model is not None, "a run has a model by now"
    active = f" ({model.active_parameters(moe) / 1e6:,.1f}M to a token)" if moe is not None else ""
    return f"{model.num_parameters(moe) / 1e6:,.1f}M{active}"


def _phases(stages: Sequence[Stage], corpora: Sequence[Dataset]) -> list[str]:
    """What each phase takes, how often it goes over its data, and what was rounded."""
    lines = []
    for stage, corpus in zip(stages, corpora, strict=True):
        if not stage.domain or not isinstance(corpus, Corpus):
            continue
        layout, windows = stage.layout, corpus.windows_per_epoch()
        drawn = corpus.blend.consumed((stage.data_step + stage.num_steps) * layout.global_batch)
        epochs = ", ".join(f"{name} {count / windows[name]:.2g} epochs" for name, count in drawn.items() if count)
        lines.append(
            f"steps {stage.first_step + 1} to {stage.last_step}: {stage.name}, {layout.global_batch} x "
            f"{layout.sequence_length} tokens at {stage.recipe.training.learning_rate:g} ({epochs})"
        )
        lines += stage.notes
    return lines


def _context_parallel(run: loop.Run, verbose: bool) -> list[str]:
    """The schedule of ring attention and why; when asked, also what it costs."""
    layout, model, group = run.engine.layout, run.recipe.model, run.engine.mesh.context.group
    assert model is not None
    kv_heads, node = model.num_kv_heads // layout.tensor, ranks_of_a_node(group)
    schedule, reason = choose_schedule(kv_heads, layout.context, node)
    if layout.context_schedule != "auto":
        schedule, reason = layout.context_schedule, "distributed.context_schedule"
    if not verbose:
        return [f"context parallel: {schedule} over {layout.context} ranks ({reason})"]
    cost = attention.ring_cost(
        model,
        layout,
        schedule,
        bytes_per_value=DTYPES[run.recipe.distributed.precision].itemsize,
        inner_size=inner_group_size(kv_heads, layout.context, node),
    )
    return attention.describe(cost, layout, reason, run.peak_flops)
