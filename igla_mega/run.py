"""Composition root: from a recipe to a run. The only file that knows all parts."""

import errno
import fcntl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO

import torch
import torch.distributed as dist

from igla_mega import host, ops, parallel
from igla_mega.checkpoint import hugging_face, single, store
from igla_mega.config import load
from igla_mega.config.errors import ConfigError
from igla_mega.config.features import Memory
from igla_mega.config.schema import Recipe
from igla_mega.data.batches import Corpus, Share
from igla_mega.data.preprocess import source_prefixes
from igla_mega.model import build
from igla_mega.model.shards import Shards, local_runs, named_shards, shards_of
from igla_mega.model.spec import use_transformer_engine
from igla_mega.objective.ewc import Ewc
from igla_mega.ops.ring_attention import choose_schedule, inner_group_size, ranks_of_a_node
from igla_mega.parallel import Mesh
from igla_mega.plan import attention
from igla_mega.plan.layout import Layout, choose_layout
from igla_mega.plan.stages import Stage, stages_of, weights_of
from igla_mega.train import ddp, fsdp, loop, memory
from igla_mega.train.metrics import Trackers
from igla_mega.train.phases import Learning
from igla_mega.train.progress import Display, Silent
from igla_mega.train.step import Engine

DTYPES = {"BF16": torch.bfloat16, "FP32": torch.float32}


def train(
    recipe: Recipe,
    run_dir: Path,
    *,
    stop_after: int | None = None,
    models: Path | None = None,
    verbose: bool = False,
) -> None:
    """Run a recipe on this rank, from where its run folder left off.

    Args:
        recipe: resolved; its data is prepared.
        stop_after: the step at which this call saves and stops, when that is before the last.
        models: folder below which `base_model` is looked up.
        verbose: say at the start what context parallelism costs.

    Raises:
        ConfigError: something the user gave does not fit; said before any weight is allocated.
    """
    device = host.prepare()
    if recipe.distributed.keep_freed_memory and device.type == "cpu":
        host.keep_freed_memory()
    parallel.start(device, recipe.distributed.timeout_seconds)
    lock = _lock(run_dir) if dist.get_rank() == 0 else None
    dist.barrier()
    base = None
    if recipe.base_model:
        base, recipe = _with_base(recipe, run_dir, models)
    stages = stages_of(recipe, dist.get_world_size(), device.type, num_steps)
    if recipe.distributed.kernels == "require":
        ops.require_kernels(device.type)
    mesh = parallel.build(stages[0].layout, recipe.training.seed)
    _train_stages(recipe, run_dir, stages, mesh, device, stop_after, base, verbose)
    parallel.stop()
    if lock:
        lock.close()


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
    recipe = recipe.model_copy(update={"model": single.read_recipe(checkpoint).model, "training": training})
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


def _lock(run_dir: Path) -> IO[str]:
    """Keep a second run out of the folder; the lock goes with the process, however it ends."""
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = open(run_dir / ".lock", "w")  # noqa: SIM115 (held while the run lasts)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            return lock  # a file system without locks
        raise ConfigError(
            f"{run_dir}: another run is training in this folder.\n  Wait for it, end it, or give another --run."
        ) from None
    return lock


def _with_base(recipe: Recipe, run_dir: Path, models: Path | None) -> tuple[Path, Recipe]:
    """The base model as a checkpoint (one of Hugging Face's is imported here), and the recipe with its shape."""
    folder = load.base_folder(recipe.base_model or "", models)
    checkpoint = folder if (folder / store.MANIFEST).is_file() else run_dir / "base"
    if dist.get_rank() == 0 and not (checkpoint / store.MANIFEST).is_file():
        hugging_face.import_folder(folder, checkpoint, say=print)
    dist.barrier()
    return checkpoint, recipe.model_copy(update={"model": single.read_recipe(checkpoint).model})


def _train_stages(
    recipe: Recipe,
    run_dir: Path,
    stages: list[Stage],
    mesh: Mesh,
    device: torch.device,
    stop_after: int | None,
    base: Path | None,
    verbose: bool,
) -> None:
    corpora = _open_corpora(recipe, stages)
    for corpus in dict.fromkeys(corpora):
        _all_read_the_same(corpus, mesh)
    recipe_yaml = load.dump(recipe)

    say: Callable[[str], None] = print if mesh.is_main else lambda text: None
    checkpoints = run_dir / "checkpoints"
    found = store.find(checkpoints, mesh, say)
    progress = found[1] if found else store.Progress()
    _same_batches(progress, stages)

    engine, shards = build_engine(recipe, stages[0].layout, mesh, device, initialize=not (found or base))
    asked = recipe.memory
    if asked is not None and asked.ewc_lambda > 0:
        engine = replace(engine, ewc=Ewc(mesh, asked.ewc_lambda, asked.coupling))
    if found:
        with memory.restoring(engine, found[0]):
            load_into(engine, shards, found[0], progress.step)
    elif base:
        load_into(engine, shards, base, 0, with_moments=False)

    total_steps = stages[-1].last_step
    last_step = min(total_steps, stop_after or total_steps)
    run = loop.Run(
        recipe=recipe,
        recipe_yaml=recipe_yaml,
        engine=engine,
        corpus=corpora[0],
        share=_share(stages[0].layout, mesh),
        writer=store.CheckpointWriter(
            checkpoints,
            mesh,
            store.Retention(recipe.checkpoint.keep_last, recipe.checkpoint.keep_every),
            asynchronous=recipe.checkpoint.asynchronous,
        ),
        device=device,
        stage=stages[0],
        last_step=last_step,
        peak_flops=loop.peak_flops(device, DTYPES[recipe.distributed.precision]),
        stop=loop.StopRequest(engine),
    )
    display: Display | Silent = Silent()
    trackers = None
    if mesh.is_main:
        run_dir.mkdir(parents=True, exist_ok=True)
        for line in _changes(run_dir / "recipe.yaml", recipe_yaml):
            say(line)
        (run_dir / "recipe.yaml").write_text(recipe_yaml)
        trackers = Trackers(run_dir, recipe.logging, resume_step=progress.step, recipe=recipe.model_dump(mode="json"))
        display = Display(last_step, progress.step)
        for line in [*_opening(run, progress, found[0] if found else None, verbose), *_phases(stages, corpora)]:
            display.say(line)

    def corpus_of(mix: Mapping[str, float], sequence_length: int) -> Corpus:
        return open_corpus(recipe, sequence_length, mix)

    learning = Learning(recipe, stages, corpora, engine, corpus_of, base is not None, display, trackers)
    try:
        first = learning.next_stage(progress)
        settled = first == len(stages) or progress.step < stages[first].last_step
        if progress.step >= last_step and settled:
            display.say(f"nothing to do: {run_dir} is at step {progress.step} of {total_steps}")
            return
        if not found:
            learning.begin(progress)
        for index, (stage, corpus) in list(enumerate(zip(stages, corpora, strict=True)))[first:]:
            run = replace(
                run,
                recipe=stage.recipe,
                engine=replace(engine, layout=stage.layout),
                corpus=corpus,
                share=_share(stage.layout, mesh),
                stage=stage,
                last_step=min(stage.last_step, last_step),
            )
            if not loop.train(run, progress, display, trackers):
                break
            if learning.finish(index, progress):
                run.save(progress)
            if progress.step >= last_step:
                break
        run.writer.wait()
    finally:
        display.close()
        if trackers:
            trackers.close()


def _share(layout: Layout, mesh: Mesh) -> Share:
    return Share(layout.global_batch, layout.micro_batch_size, layout.data, mesh.data.rank)


def _open_corpora(recipe: Recipe, stages: Sequence[Stage]) -> list[Corpus]:
    """The corpus of each stage; stages that read the same share one."""
    opened: dict[tuple, Corpus] = {}
    corpora = []
    for stage in stages:
        length = stage.layout.sequence_length
        key = (length, *stage.mix.items())
        if key not in opened:
            opened[key] = open_corpus(recipe, length, stage.mix)
        corpora.append(opened[key])
    return corpora


def build_engine(
    recipe: Recipe, layout: Layout, mesh: Mesh, device: torch.device, *, initialize: bool = True
) -> tuple[Engine, Shards]:
    """Build this rank's model and optimizer.

    Args:
        initialize: give the weights their initial values; False when a checkpoint's will follow.
    """
    model, dtype = recipe.model, DTYPES[recipe.distributed.precision]
    assert model is not None, "resolved before"
    sharded = layout.strategy == "FSDP"
    transformer_engine = use_transformer_engine(recipe.distributed.kernels, device)
    config = build.transformer_config(
        model,
        layout,
        dtype=torch.float32 if sharded else dtype,
        device=device,
        recompute=recipe.distributed.gradient_checkpointing,
        transformer_engine=transformer_engine,
        documents=recipe.data.document_mask,
    )
    chunks = build.build_chunks(config, model, transformer_engine=transformer_engine)
    shards = shards_of(chunks, mesh, model.vocab_size)

    if sharded:
        fsdp.wrap(chunks[0], mesh, dtype).to_empty(device=device)
        if initialize:
            build.initialize(local_runs(chunks, shards), model, recipe.training.seed)
        optimizer = fsdp.ShardedAdamW(chunks[0], shards, mesh, config, recipe.training, recipe.optimizer)
        return Engine(mesh, layout, chunks, optimizer), shards

    build.materialize(chunks, device)
    if initialize:
        build.initialize(local_runs(chunks, shards), model, recipe.training.seed)
    wrapped = ddp.wrap(
        chunks,
        config,
        distributed_optimizer=layout.distributed_optimizer and mesh.data_context.size > 1,
        overlap=recipe.distributed.overlap_communication and device.type == "cuda",
    )
    adam = ddp.MegatronAdamW(wrapped, shards, mesh, config, recipe.training, recipe.optimizer)
    if initialize and dtype != torch.float32:
        # mcore copies its fp32 masters from the bf16 weights: give them back what rounding took.
        masters = ((slot.shard, slot.values["master"], slot.start) for slot in adam.slots())
        build.initialize(masters, model, recipe.training.seed)
    return Engine(mesh, layout, wrapped, adam), shards


def load_into(engine: Engine, shards: Shards, checkpoint: Path, num_updates: int, *, with_moments: bool = True) -> None:
    """Make an engine what it was when the checkpoint was saved, in whatever layout either has.

    Without moments only the weights are taken, as for a base model.

    The weights the modules compute with are read by themselves: with a distributed optimizer this rank's masters
    are only part of them.
    """
    group = engine.mesh.host_group
    store.load_weights(checkpoint, named_shards(engine.chunks, shards), group)
    store.load_slots(checkpoint, engine.slots(), group, kinds=None if with_moments else ("master",))
    engine.optimizer.loaded(num_updates)


def open_corpus(recipe: Recipe, sequence_length: int, mix: Mapping[str, float] | None = None) -> Corpus:
    """Open the recipe's prepared data sets, to draw from them as `mix` says, or as the recipe's does."""
    assert recipe.model is not None, "resolved before"
    return Corpus(
        source_prefixes(recipe.data),
        recipe.data.mix if mix is None else mix,
        sequence_length=sequence_length,
        seed=recipe.training.seed,
        vocab_size=recipe.model.vocab_size,
        validation_fraction=recipe.data.validation_fraction,
        document_mask=recipe.data.document_mask,
    )


def num_steps(recipe: Recipe, layout: Layout) -> int:
    """Optimizer steps of a run without phases: as given, or so many that `epochs` passes over all windows are made."""
    if recipe.training.total_steps is not None:
        return recipe.training.total_steps
    if recipe.training.epochs is None:
        raise ConfigError("training.total_steps: neither it nor training.epochs is given. Set one.")
    windows = sum(open_corpus(recipe, layout.sequence_length).windows_per_epoch().values())
    return max(1, recipe.training.epochs * windows // layout.global_batch)


def _all_read_the_same(corpus: Corpus, mesh: Mesh) -> None:
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


def _changes(path: Path, recipe_yaml: str) -> list[str]:
    """What the recipe says otherwise than the one this run folder was trained with."""
    if not path.exists():
        return []
    import yaml

    old, new = (_flat(yaml.safe_load(text)) for text in (path.read_text(), recipe_yaml))
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return [f"{key}: was {old.get(key)}, is {new.get(key)} from here on" for key in keys]


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
    lines = [
        f"{run.recipe.name}: {model.num_parameters() / 1e6:,.1f}M parameters, {layout.strategy}, {split}, "
        f"{layout.global_batch} x {layout.sequence_length} tokens a step, {run.recipe.distributed.precision}",
        *(_context_parallel(run, verbose) if layout.context > 1 else []),
        *layout.notes,
        *([run.corpus.blend.note] if run.corpus.blend.note else []),
    ]
    if checkpoint:
        lines.append(f"resuming at step {progress.step} ({progress.tokens:,} tokens) from {checkpoint}")
    return lines


def _phases(stages: Sequence[Stage], corpora: Sequence[Corpus]) -> list[str]:
    """What each phase takes, how often it goes over its data, and what was rounded."""
    lines = []
    for stage, corpus in zip(stages, corpora, strict=True):
        if not stage.domain:
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
