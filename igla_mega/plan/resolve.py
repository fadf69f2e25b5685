"""Resolve a recipe once: its stages, each with a layout, on a number of ranks, and the base model it starts from."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from igla_mega.config.features import Moe
from igla_mega.config.schema import Model, Recipe
from igla_mega.layout.layout import Layout
from igla_mega.layout.stages import Stage, parts_of
from igla_mega.plan.base_model import with_base
from igla_mega.plan.choose import stages_of


@dataclass(frozen=True)
class Base:
    """A base model as a checkpoint."""

    checkpoint: Path
    model: Model
    moe: Moe | None
    """Its experts, as the recipe trains them."""


@dataclass(frozen=True)
class Resolved:
    """A recipe with nothing left open on these ranks. Frozen: `check` and `train` hand it down."""

    recipe: Recipe
    """The recipe as written to the run folder, with the base model's shape."""
    parts: tuple[Recipe, ...]
    """One recipe per entry of `stages:`, or the recipe alone. Each has a model, an optimizer and an objective."""
    stages: tuple[Stage, ...]
    base: Base | None

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """Layout of each stage."""
        return tuple(stage.layout for stage in self.stages)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all stages."""
        return self.stages[-1].last_step

    @property
    def part_ends(self) -> tuple[int, ...]:
        """Step after which each part is complete."""
        return tuple(list(group)[-1].last_step for _, group in groupby(self.stages, key=lambda stage: stage.part))

    def first_stage(self, part: int) -> int:
        """Return the index of the first stage of a part."""
        return next(index for index, stage in enumerate(self.stages) if stage.part == part)


def resolve(
    recipe: Recipe,
    world_size: int,
    device: str,
    *,
    base: Base | None = None,
    total_steps: Callable[[Recipe, Layout], int] = lambda recipe, layout: recipe.training.total_steps or 1,
) -> Resolved:
    """Resolve a recipe on `world_size` ranks of one device, `cpu` or `cuda`.

    Args:
        base: base model, for a recipe that names one.
        total_steps: number of steps of a recipe without phases; it may depend on the size of the data.

    Raises:
        ConfigError: a stage does not fit; the message lists every breach.
    """
    recipe = with_shape(recipe, base)
    parts = list(recipe.stages or [recipe])
    return Resolved(recipe, tuple(parts), tuple(stages_of(recipe, world_size, device, total_steps)), base)


def with_shape(recipe: Recipe, base: Base | None) -> Recipe:
    """Return the recipe with the shape of its base model in every part, and the training keys of `sft` and `dpo`."""
    parts = parts_of(recipe)
    if base is not None:
        parts[0] = parts[0].with_keys({"model": base.model, "moe": base.moe})
    if recipe.stages is None:
        return parts[0]
    parts = [part.with_keys({"model": parts[0].model, "moe": parts[0].moe}) for part in parts]
    return recipe.with_keys({"stages": tuple(parts)})


def shape_of_base(
    recipe: Recipe, models: Path | None = None, scale: str | None = None
) -> tuple[Base | None, list[str]]:
    """Return the shape of a recipe's base model without loading it, and what was assumed about it.

    Args:
        models: folder below which the base model is looked up; one that is not there has the shape of the 7B recipe,
            at `scale`.
    """
    first = parts_of(recipe)[0]
    if first.base_model is None or first.model is not None:
        return None, []
    whole, notes = with_base(first, models, scale)
    assert whole.model is not None, "with_base reads or assumes it"
    return Base(Path(first.base_model), whole.model, whole.moe), notes[:1]  # the rest is of the length
