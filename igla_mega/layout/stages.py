"""Stages of a run: a recipe as a list of stages, each with consecutive steps on one mix of data.

From one phase of a curriculum to the next, the weights, the optimizer state and the EWC anchors carry over; data,
sequence length and learning rate schedule belong to each stage. Between `stages:`, which are separate recipes, only the
weights carry over. A recipe without either is one stage.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction

from igla_mega.config.features import Phase
from igla_mega.config.schema import Data, Recipe
from igla_mega.layout.layout import Layout

MIX = "mix"
"""Name that stands for all sources of `data.mix`."""


@dataclass(frozen=True)
class Stage:
    """Consecutive optimizer steps of a run. Step numbers count over the whole run."""

    name: str
    recipe: Recipe
    """Recipe of the run, with the name, sequence length and learning rate of the stage."""
    layout: Layout
    mix: dict[str, float]
    """Sources of the batches, source -> weight; whole numbers if earlier domains are replayed."""
    first_step: int
    num_steps: int
    schedule_first: int
    """First step of the learning rate schedule, which may span several stages."""
    schedule_steps: int
    """Number of steps of that schedule."""
    data_step: int
    """Steps of earlier stages on the same data with the same batches; this stage continues after them."""
    domain: dict[str, float] = field(default_factory=dict)
    """Sources of the phase without replay, source -> weight; empty if the stage is not a phase."""
    notes: tuple[str, ...] = ()
    part: int = 0
    """Index of the entry of `stages:` that it belongs to; each has its own model, optimizer and objective."""

    @property
    def last_step(self) -> int:
        """Step of the run at the end of the stage."""
        return self.first_step + self.num_steps


def parts_of(recipe: Recipe) -> list[Recipe]:
    """Return the recipes of `stages:`, or the recipe itself, with the training keys of `sft` or `dpo` applied.

    A stage without a name is named after its number and kind; one without a model has that of the first stage.
    """
    parts: list[Recipe] = []
    for number, part in enumerate(recipe.stages or [recipe]):
        changes: dict = {}
        if recipe.stages is not None:
            kind = "sft" if part.sft is not None else "dpo" if part.dpo is not None else "stage"
            changes["name"] = part.name or f"{recipe.name or 'stages'}.{number + 1}.{kind}"
            changes["model"] = part.model or (parts[0].model if parts else None)
            changes["moe"] = part.moe or (parts[0].moe if parts else None)
            changes["base_model"] = part.base_model or (parts[-1].name if parts else None)
        if (own := part.sft or part.dpo) is not None:
            given = {key: getattr(own, key) for key in ("learning_rate", "batch_size", "epochs")}
            given = {key: value for key, value in given.items() if value is not None}
            # Keys of `training:` that would contradict those of the section are dropped.
            if "epochs" in given:
                given["total_steps"] = None
            if "batch_size" in given:
                given["gradient_accumulation"] = None
            changes["training"] = part.training.model_copy(update=given)
        changes["data"] = _own_data(part, recipe.data)
        parts.append(part.model_copy(update=changes))
    return parts


def _own_data(part: Recipe, shared: Data) -> Data:
    """Return the data section of one of `stages:`; without sources it uses those of the whole recipe."""
    data = part.data
    if not data.sources:
        keys = ("sources", "tokenizer", "prepared", "chat_template")
        data = data.model_copy(update={key: getattr(data, key) or getattr(shared, key) for key in keys})
    own = part.sft or part.dpo
    if own is not None and own.data and own.data not in data.sources and own.data.endswith(".jsonl"):
        data = data.model_copy(update={"sources": {own.data: own.data}})
    return data


def segments(recipe: Recipe, layout: Layout, total_steps: int) -> Iterator[Stage]:
    """Yield one stage, or one per `koshey.consolidate_every` tokens; one learning rate schedule spans them all."""
    every = recipe.koshey.consolidate_every if recipe.koshey is not None and recipe.memory is recipe.koshey else None
    steps = -(-every // (layout.global_batch * layout.sequence_length)) if every else total_steps
    for first in range(0, total_steps, steps):
        yield Stage(
            recipe.name,
            recipe,
            layout,
            dict(recipe.data.mix) if recipe.form == "text" else dict.fromkeys(drawn_from(recipe), 1.0),
            first,
            min(steps, total_steps - first),
            schedule_first=0,
            schedule_steps=total_steps,
            data_step=first,
        )


def phase_recipe(recipe: Recipe, phase: Phase) -> Recipe:
    """Return the recipe with the name, sequence length and learning rate of a phase."""
    length = phase.sequence_length or recipe.training.sequence_length
    training = recipe.training.model_copy(update={"learning_rate": phase.lr, "sequence_length": length})
    return recipe.model_copy(update={"name": phase.name, "training": training})


def phase_mix(recipe: Recipe, index: int) -> dict[str, float]:
    """Return the weights of the sources of a phase: its own, and replay from earlier domains."""
    assert recipe.curriculum is not None
    phases, continual = recipe.curriculum.phases, recipe.continual
    phase = phases[index]
    own = weights_of(recipe, phase.source)
    earlier = [p.source for p in phases[:index]]
    if continual is not None and continual.base_data is not None:
        earlier.insert(0, continual.base_data)
    earlier = [source for source in dict.fromkeys(earlier) if source != phase.source]
    share = phase.replay if phase.replay is not None else continual.replay if continual is not None else 0.0
    if not share or not earlier:
        return own
    replayed = Fraction(str(share))
    weights = {name: Fraction(str(weight)) * (1 - replayed) for name, weight in _parts(own).items()}
    for source in earlier:
        for name, weight in _parts(weights_of(recipe, source)).items():
            weights[name] = weights.get(name, Fraction()) + weight * replayed / len(earlier)
    # Exact fractions scaled to whole numbers: the blend then has a short period and no rounding error.
    unit = math.lcm(*(weight.denominator for weight in weights.values()))
    return {name: float(weight * unit) for name, weight in weights.items()}


def _parts(weights: dict[str, float]) -> dict[str, Fraction]:
    """Return weights as exact shares that add up to 1."""
    exact = {name: Fraction(str(weight)) for name, weight in weights.items()}
    return {name: weight / sum(exact.values()) for name, weight in exact.items()}


def weights_of(recipe: Recipe, source: str) -> dict[str, float]:
    """Return source -> weight of a source name: a key of `data.sources`, or `mix` for all of `data.mix`."""
    return dict(recipe.data.mix) if source == MIX else {source: 1.0}


def drawn_data(recipe: Recipe) -> Data:
    """Return the data section without the sources of text that have a weight of 0 and that nothing else names."""
    data, phases, memory = recipe.data, recipe.curriculum.phases if recipe.curriculum else (), recipe.memory
    named = {*(phase.source for phase in phases), memory.base_data if memory is not None else None}
    idle = [name for name in data.sources if data.mix.get(name) == 0 and name not in named]
    return data.model_copy(update={"sources": {n: path for n, path in data.sources.items() if n not in idle}})


def drawn_from(recipe: Recipe) -> list[str]:
    """Return the sources of conversations or pairs: the one named by `sft.data` or `dpo.data`, else all."""
    named = (recipe.sft or recipe.dpo) and (recipe.sft or recipe.dpo).data  # type: ignore[union-attr]
    return [named] if named else list(recipe.data.sources)
