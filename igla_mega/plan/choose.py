"""Layouts of a recipe and of each of its stages, with every `auto` chosen."""

from collections.abc import Callable
from dataclasses import replace

from igla_mega.config import rules
from igla_mega.config.errors import ConfigError
from igla_mega.config.schema import Recipe
from igla_mega.layout.layout import Layout, lay_out
from igla_mega.layout.stages import Stage, parts_of, phase_mix, phase_recipe, segments, weights_of


def choose_layout(recipe: Recipe, world_size: int, device: str = "cpu") -> Layout:
    """Return the layout of a recipe on `world_size` ranks of one device, `cpu` or `cuda`.

    Sizes given in the recipe are kept. For the others, a CPU gets tensor parallelism as far as the model divides
    (which two cores can demonstrate), and GPUs get the fastest layout that fits by the plan.

    Raises:
        ConfigError: the model, the batch and the world size do not fit; the message lists every breach.
    """
    if device == "cpu" or recipe.model is None or recipe.sequence_length is None or recipe.stages is not None:
        return lay_out(recipe, world_size, device)
    rules.check(recipe, world_size, device)
    from igla_mega.plan import search  # late: only GPU runs need the planner

    sizes, notes = search.sizes_for(recipe, world_size)
    fixed = recipe.with_keys({f"distributed.{key}": size for key, size in sizes.items()})
    layout = lay_out(fixed, world_size, device)
    return replace(layout, notes=(*layout.notes, *notes))


def stages_of(
    recipe: Recipe, world_size: int, device: str, total_steps: Callable[[Recipe, Layout], int]
) -> list[Stage]:
    """Return the stages of a recipe on `world_size` ranks.

    Args:
        total_steps: returns the number of steps of a recipe without phases, which may depend on the size of its data.

    Raises:
        ConfigError: a stage does not fit; the message lists every breach.
    """
    if recipe.stages is not None:
        parts = _on_one_layout(parts_of(recipe), world_size, device)
        found: list[Stage] = []
        for number, part in enumerate(parts):
            first = found[-1].last_step if found else 0
            for stage in stages_of(part, world_size, device, total_steps):
                begin, course = first + stage.first_step, first + stage.schedule_first
                found.append(replace(stage, part=number, first_step=begin, schedule_first=course))
        return found
    if recipe.curriculum is None:
        layout = choose_layout(recipe, world_size, device)
        return list(segments(recipe, layout, total_steps(recipe, layout)))
    return _phase_stages(recipe, world_size, device)


def _phase_stages(recipe: Recipe, world_size: int, device: str) -> list[Stage]:
    """Return a stage for each phase of a recipe's curriculum, all on the same mesh of ranks."""
    assert recipe.curriculum is not None, "the caller asks for phases"
    phases = recipe.curriculum.phases
    recipes = _on_one_layout([phase_recipe(recipe, phase) for phase in phases], world_size, device)
    stages: list[Stage] = []
    breaches = []
    for i, (phase, own) in enumerate(zip(phases, recipes, strict=True)):
        layout = choose_layout(own, world_size, device)
        tokens_per_step = layout.global_batch * layout.sequence_length
        num_steps = -(-phase.tokens // tokens_per_step)
        first, mix = stages[-1].last_step if stages else 0, phase_mix(recipe, i)
        # A phase with the same data and batches as an earlier one must continue after its samples, not repeat them.
        same = [s for s in stages if (s.mix, s.layout) == (mix, layout)]
        notes = []
        if num_steps * tokens_per_step != phase.tokens:
            notes.append(
                f"{phase.name}: {phase.tokens:,} tokens are rounded up to {num_steps} batches of {tokens_per_step:,}, "
                f"{num_steps * tokens_per_step:,} in all."
            )
        if (warmup := own.num_warmup_steps(num_steps)) > num_steps:
            breaches.append(
                f"training.warmup_steps: {warmup} is more than the {num_steps} steps of phase {phase.name}.\n"
                "  Use fewer, or training.warmup_ratio, which is relative to each phase."
            )
        stages.append(
            Stage(
                phase.name,
                own,
                layout,
                mix,
                first,
                num_steps,
                schedule_first=first,
                schedule_steps=num_steps,
                data_step=sum(stage.num_steps for stage in same),
                domain=weights_of(recipe, phase.source),
                notes=tuple(notes),
            )
        )
    if breaches:
        raise ConfigError(*breaches)
    return stages


def _on_one_layout(recipes: list[Recipe], world_size: int, device: str) -> list[Recipe]:
    """Return the recipes with the sizes chosen for the longest sequences: all stages share one mesh of ranks."""
    layout = choose_layout(max(recipes, key=lambda one: one.sequence_length or 0), world_size, device)
    sizes = {
        "tensor_parallel": layout.tensor,
        "pipeline_parallel": layout.pipeline,
        "context_parallel": layout.context,
        "sequence_parallel": layout.sequence_parallel,
        "gradient_checkpointing": layout.recompute,
    }
    return [one.with_keys({f"distributed.{key}": size for key, size in sizes.items()}) for one in recipes]
