"""The lines that a run prints before its first step."""

from collections.abc import Sequence
from pathlib import Path

from igla_mega.checkpoint.progress import Progress
from igla_mega.config.schema import Recipe
from igla_mega.data.batches import Corpus, Dataset
from igla_mega.layout import attention
from igla_mega.layout.stages import Stage
from igla_mega.model.spec import DTYPES
from igla_mega.ops.ring_schedule import choose_schedule, inner_group_size, ranks_of_a_node
from igla_mega.train.state import Run


def opening_lines(run: Run, progress: Progress, checkpoint: Path | None, verbose: bool) -> list[str]:
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


def phase_lines(stages: Sequence[Stage], corpora: Sequence[Dataset]) -> list[str]:
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


def _context_parallel(run: Run, verbose: bool) -> list[str]:
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
