"""A part of a run: one model with its optimizer and objective, built and trained stage by stage."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch.distributed as dist

from igla_mega.checkpoint import store
from igla_mega.checkpoint.adapters import merge_adapters
from igla_mega.checkpoint.base import BASE, base_note, digest_of_checkpoint, refuse_other_base
from igla_mega.checkpoint.progress import Progress
from igla_mega.config import load
from igla_mega.config.schema import Recipe
from igla_mega.data.batches import BatchShard, Corpus, Dataset
from igla_mega.data.blend import MIXES
from igla_mega.data.tuning.conversations import Pairs
from igla_mega.distributed.mesh import Mesh
from igla_mega.engine.build import build_engine, frozen_chunks, load_into, open_corpus
from igla_mega.engine.heartbeat import follow_layers
from igla_mega.engine.step import Engine
from igla_mega.layout.layout import Layout
from igla_mega.layout.stages import Stage
from igla_mega.model.spec import DTYPES
from igla_mega.objective.ewc import Ewc
from igla_mega.plan.resolve import Resolved
from igla_mega.train import consolidation, dpo_reference, evaluation, loop
from igla_mega.train.metrics import peak_flops
from igla_mega.train.phases import Learning, finishes
from igla_mega.train.resume import Found, Start, data_files
from igla_mega.train.session import Session
from igla_mega.train.state import Prepared, Run


@dataclass(frozen=True)
class Data:
    """What each stage reads, and what its evaluations need; one entry per stage."""

    corpora: Sequence[Dataset]
    prepared: Sequence[Prepared]


@dataclass(frozen=True)
class Part:
    """One part, built: its first stage as a run, and what frames its stages."""

    run: Run
    learning: Learning


def build_part(number: int, resolved: Resolved, data: Data, start: Start, session: Session, base: Path | None) -> Part:
    """Build part `number` of a run with its weights: a checkpoint's, or those of the base it starts from.

    Args:
        base: checkpoint of the base; None for initial weights.
    """
    own, first = resolved.parts[number], resolved.first_stage(number)
    stage, corpus = resolved.stages[first], data.corpora[first]
    found = start.found if number == start.part else None
    engine, texts, restore = _build_engine(own, stage, corpus, session, found, base)
    if start.mix_text:
        texts = {**texts, MIXES: start.mix_text}
    run = Run(
        session=session,
        recipe=own,
        recipe_yaml=load.dump(own),
        engine=engine,
        corpus=corpus,
        share=batch_shard(stage.layout, session.mesh),
        writer=start.writer,
        stage=stage,
        last_step=stage.last_step,
        peak_flops=peak_flops(session.device, DTYPES[resolved.recipe.distributed.precision]),
        rewind=partial(_rewind, start.find, stage, restore),
        texts=texts,
    )
    corpus_of = partial(_corpus_of, own)
    return Part(run, Learning(own, resolved.stages, data.corpora, engine, corpus_of, base is not None, session))


def train_part(part: Part, data: Data, progress: Progress, last_step: int) -> bool:
    """Train the stages of a part from `progress` on.

    Args:
        last_step: step at which this call stops, in this part or a later one.

    Returns:
        True if the part is complete and steps of another one may follow.
    """
    session, learning = part.run.session, part.learning
    for index, stage in enumerate(learning.stages):
        if stage.part != part.run.stage.part or index < progress.stage:
            continue
        run = replace(
            part.run,
            recipe=stage.recipe,
            engine=replace(part.run.engine, layout=stage.layout),
            corpus=data.corpora[index],
            share=batch_shard(stage.layout, session.mesh),
            stage=stage,
            last_step=min(stage.last_step, last_step),
            prepared=data.prepared[index],
        )
        if progress.step == stage.first_step:
            _begin_stage(run, progress)
        if not loop.train(run, progress):
            return False
        if session.stop.agreed and (finishes(stage) or progress.step < learning.stages[-1].last_step):
            session.log_stopping(progress.step)
            return False
        if learning.finish(index, progress):
            run.save(progress)
        if progress.step >= last_step:
            return False
    return True


def _begin_stage(run: Run, progress: Progress) -> None:
    """Measure a model that is about to be tuned, for the comparison at the end, and forget the last stage's losses."""
    progress.before, progress.losses = {}, []
    tunes = run.recipe.form != "text" or run.recipe.lora is not None
    if tunes and not run.stage.domain:
        progress.before = evaluation.validate(run)
        evaluation.log_validation(progress.before, run, progress)


def _build_engine(
    recipe: Recipe, stage: Stage, corpus: Dataset, session: Session, found: Found | None, base: Path | None
) -> tuple[Engine, Mapping[str, str], Callable[[Path, Progress], None]]:
    """Build a part's engine and give it its weights.

    Returns:
        The engine; additional files of its checkpoints, name -> text; and a function that restores it from a
        checkpoint of the part.
    """
    mesh, device = session.mesh, session.device
    engine, shards = build_engine(recipe, stage.layout, mesh, device, initialize=not (found or base), base=base)
    engine = replace(engine, heartbeat=session.heartbeat)
    follow_layers(session.heartbeat, engine.chunks)
    if recipe.uses_ewc:
        assert recipe.memory is not None, "a recipe with EWC has its section"
        engine = replace(engine, ewc=Ewc(mesh, recipe.memory.ewc_lambda, recipe.memory.coupling))
    mode = dpo_reference.mode_of(recipe.dpo, adapters=recipe.lora is not None) if recipe.dpo is not None else None
    texts: dict[str, str] = {}
    digest = ""
    if base is not None and (engine.adapters or mode in ("cached", "model")):
        digest = digest_of_checkpoint(base, mesh.rank, mesh.world_size, mesh.host_group)
    # Before anything is read or computed for the reference.
    texts |= data_files(recipe, corpus, found, digest if mode in ("cached", "model") else "")
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
            share = batch_shard(stage.layout, mesh)
            dpo_reference.cache(engine, corpus, share, digest, session)
        engine = replace(engine, objective=dpo_reference.objective(recipe.dpo, mode, engine, frozen))

    def restore(checkpoint: Path, at: Progress) -> None:
        with consolidation.restoring(engine, checkpoint):
            load_into(engine, shards, checkpoint, _num_updates(at, stage))

    if found:
        restore(*found)
    return engine, texts, restore


def _num_updates(progress: Progress, first: Stage) -> int:
    """Return the updates that a part's optimizer has made: a step whose samples were left out made none."""
    left_out = sum(first.first_step < step <= progress.step for step in progress.skipped)
    return progress.step - first.first_step - left_out


def _rewind(
    find: Callable[[], Found | None], first: Stage, restore: Callable[[Path, Progress], None], progress: Progress
) -> bool:
    """Restore engine and `progress` from the last checkpoint, if it belongs to the current stage."""
    found = find()
    if found is None or found[1].step <= first.first_step or found[1].stage != progress.stage:
        return False
    restore(*found)
    for name, value in vars(found[1]).items():
        setattr(progress, name, value)
    return True


def weights_after(part: int, resolved: Resolved, session: Session, base: Path | None) -> Path:
    """Return a checkpoint of the whole model as a part has left it; adapters are merged into their base."""
    checkpoint = store.step_dir(session.run_dir / "checkpoints", resolved.part_ends[part])
    if resolved.parts[part].lora is None:
        return checkpoint
    merged = session.run_dir / "merged" / checkpoint.name
    if session.mesh.is_main and not (merged / store.MANIFEST).is_file():
        merge_adapters(checkpoint, merged, base)
    dist.barrier(group=session.mesh.host_group)
    return merged


def batch_shard(layout: Layout, mesh: Mesh) -> BatchShard:
    """Return the part of each global batch that this rank computes."""
    return BatchShard(layout.global_batch, layout.micro_batch_size, layout.data, mesh.data.rank)


def _corpus_of(recipe: Recipe, mix: Mapping[str, float], sequence_length: int) -> Corpus:
    return open_corpus(recipe, sequence_length, mix)
