"""Lines that a run prints before its first step."""

from collections.abc import Sequence
from pathlib import Path

from igla_mega.checkpoint.progress import Progress
from igla_mega.config.schema import Recipe
from igla_mega.data.batches import Corpus, Dataset
from igla_mega.layout import attention
from igla_mega.layout.layout import describe
from igla_mega.layout.stages import Stage
from igla_mega.model.spec import DTYPES
from igla_mega.ops.ring_schedule import choose_schedule, inner_group_size, ranks_of_a_node
from igla_mega.train.state import Run


def opening_lines(run: Run, progress: Progress, checkpoint: Path | None, verbose: bool) -> list[str]:
    """Return what is about to train: model size, layout, batch, precision, notes, and where it resumes.

    Args:
        checkpoint: the one that the run resumes from, or None.
        verbose: report the cost of context parallelism.
    """
    layout = run.engine.layout
    lines = [
        f"{run.recipe.name}: {_parameters(run.recipe)} parameters, {describe(layout)}, "
        f"{layout.global_batch} x {layout.sequence_length} tokens per step, {run.recipe.distributed.precision}",
        *(_context_parallel(run, verbose) if layout.context > 1 else []),
        *layout.notes,
        *run.corpus.notes,
    ]
    if checkpoint:
        lines.append(f"resuming at step {progress.step} ({progress.tokens:,} tokens) from {checkpoint}")
    return lines


def _parameters(recipe: Recipe) -> str:
    """Return the number of parameters, and with experts of those used per token, as text."""
    model, moe = recipe.model, recipe.moe
    assert model is not None, "a run has a model by now"
    active = f" ({model.active_parameters(moe) / 1e6:,.1f}M per token)" if moe is not None else ""
    return f"{model.num_parameters(moe) / 1e6:,.1f}M{active}"


def phase_lines(stages: Sequence[Stage], corpora: Sequence[Dataset]) -> list[str]:
    """Return a line for each phase with its steps, batch, learning rate and epochs, and its notes on rounding."""
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
    """Return the schedule of ring attention and the reason for it; if `verbose`, also its cost."""
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
