"""What a run trains one after another: a recipe as a list of stages, each a stretch of steps on one mix of data.

Between phases weights, moments and what is held pass on; the data, the length of the sequences and the course of the
learning rate are a stage's own. Of `stages:`, each a recipe of its own, only the weights pass on. A recipe without
either is one stage.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction

from igla_mega.config.features import Phase
from igla_mega.config.schema import Data, Recipe
from igla_mega.layout.layout import Layout

MIX = "mix"
"""A source of this name is all of `data.mix`."""


@dataclass(frozen=True)
class Stage:
    """Consecutive optimizer steps of a run. Steps are counted over the whole run."""

    name: str
    recipe: Recipe
    """The run's, with the stage's name, sequence length and learning rate."""
    layout: Layout
    mix: dict[str, float]
    """What its batches are drawn from, source -> weight; whole numbers where something is replayed."""
    first_step: int
    num_steps: int
    schedule_first: int
    """Where the course of its learning rate begins, which may span several stages."""
    schedule_steps: int
    data_step: int
    """Steps taken on the same data in the same batches before this stage: it goes on behind them."""
    domain: dict[str, float] = field(default_factory=dict)
    """What the stage is to learn, source -> weight, without what is replayed; empty where it is not a phase."""
    notes: tuple[str, ...] = ()
    part: int = 0
    """Which of the recipe's `stages:` it belongs to: each has a model, an optimizer and an objective of its own."""

    @property
    def last_step(self) -> int:
        """The run's step when the stage is done."""
        return self.first_step + self.num_steps


def parts_of(recipe: Recipe) -> list[Recipe]:
    """The recipes of `stages:`, or the one there is, each with what `sft` or `dpo` says of its training.

    A stage without a name is called by its number and what it learns, and has the first one's model.
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
            said = {key: getattr(own, key) for key in ("learning_rate", "batch_size", "epochs")}
            said = {key: value for key, value in said.items() if value is not None}
            if "epochs" in said:
                said["total_steps"] = None
            if "batch_size" in said:
                said["gradient_accumulation"] = None
            changes["training"] = part.training.model_copy(update=said)
        changes["data"] = _own_data(part, recipe.data)
        parts.append(part.model_copy(update=changes))
    return parts


def _own_data(part: Recipe, shared: Data) -> Data:
    """The data section of one of `stages:`: what it leaves out of sources is the whole recipe's."""
    data = part.data
    if not data.sources:
        keys = ("sources", "tokenizer", "prepared", "chat_template")
        data = data.model_copy(update={key: getattr(data, key) or getattr(shared, key) for key in keys})
    own = part.sft or part.dpo
    if own is not None and own.data and own.data not in data.sources and own.data.endswith(".jsonl"):
        data = data.model_copy(update={"sources": {own.data: own.data}})
    return data


def _segments(recipe: Recipe, layout: Layout, total_steps: int) -> Iterator[Stage]:
    """One stage, or so many that the Fisher is taken anew between them; one course of the learning rate."""
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


def _phase_recipe(recipe: Recipe, phase: Phase) -> Recipe:
    length = phase.sequence_length or recipe.training.sequence_length
    training = recipe.training.model_copy(update={"learning_rate": phase.lr, "sequence_length": length})
    return recipe.model_copy(update={"name": phase.name, "training": training})


def _mix(recipe: Recipe, index: int) -> dict[str, float]:
    """Weights of the sources that a phase draws from: its own, and what it replays of the domains before it."""
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
    # Whole numbers, so that the blend repeats soon and is exact.
    unit = math.lcm(*(weight.denominator for weight in weights.values()))
    return {name: float(weight * unit) for name, weight in weights.items()}


def _parts(weights: dict[str, float]) -> dict[str, Fraction]:
    exact = {name: Fraction(str(weight)) for name, weight in weights.items()}
    return {name: weight / sum(exact.values()) for name, weight in exact.items()}


def weights_of(recipe: Recipe, source: str) -> dict[str, float]:
    """Sources and weights that a name of data means: a key of `data.sources`, or `mix` for all of `data.mix`."""
    return dict(recipe.data.mix) if source == MIX else {source: 1.0}


def drawn_from(recipe: Recipe) -> list[str]:
    """The sources of conversations or pairs: the one that `sft.data` or `dpo.data` names, else all."""
    named = (recipe.sft or recipe.dpo) and (recipe.sft or recipe.dpo).data  # type: ignore[union-attr]
    return [named] if named else list(recipe.data.sources)
