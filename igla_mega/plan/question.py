"""From what stands on the command line to the plans that answer it."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from igla_mega.config import load
from igla_mega.config.errors import ConfigError
from igla_mega.config.schema import Recipe
from igla_mega.layout.hardware import cpu, find, local_gpu, num_local_gpus, read
from igla_mega.plan import answer, card, finished
from igla_mega.plan.finished import Comparison
from igla_mega.plan.forecast import Forecast, forecast

MOST_BATCH_GROWTH = 64
"""For a number of GPUs that no layout of the recipe's batch divides, its batch grows up to this many times."""

Row = tuple[int, Forecast | ConfigError, str]
"""A number of devices; the plan, or why there is none; what was changed for it."""


@dataclass(frozen=True)
class Answer:
    """The plans of one question."""

    table: Sequence[Row]
    comparison: Comparison | None = None

    def text(self) -> str:
        """For a terminal."""
        if len(self.table) > 1:
            return "\n".join(answer.scaling(self.table))
        found = self.table[0][1]
        assert isinstance(found, Forecast), "refused before"
        lines = [*(self.comparison.lines() if self.comparison else ()), *answer.text(found)]
        return "\n".join(lines)

    def json(self) -> str:
        """One object; of several numbers of devices, a list of objects."""
        if len(self.table) > 1:
            return json.dumps([_row_values(row) for row in self.table], indent=1)
        found = self.table[0][1]
        assert isinstance(found, Forecast), "refused before"
        compared = {"comparison": self.comparison.values()} if self.comparison else {}
        return json.dumps({**answer.values(found), **compared}, indent=1)


def _row_values(row: Row) -> dict:
    gpus, found, note = row
    if isinstance(found, ConfigError):
        return {"gpus": gpus, "error": str(found)}
    return {**answer.values(found), "changed": note or None}


def ask(
    name: str,
    scale: str | None,
    overrides: list[str] | None,
    gpu: str | None,
    gpus: str | None,
    price: float | None,
    hardware_file: Path | None,
    calibration: Path | None,
    models: Path | None,
    samples: int | None,
) -> Answer:
    """Plan a recipe, or a run folder's recipe beside what the run took.

    Raises:
        ConfigError: something given cannot be, or the recipe does not fit.
    """
    run = finished.find(Path(name))
    recipe = load.load_recipe(run.recipe_file if run else name, scale=scale, overrides=overrides)
    more = read(hardware_file) if hardware_file is not None else None
    claim = card.claim_of(recipe.name) if scale is None and run is None else None
    if gpu is not None:
        hardware = find(gpu, more)
    elif run is not None:
        hardware = run.hardware()
    elif claim is not None:
        hardware = find(claim.gpu)
    else:
        hardware = cpu() if scale is not None else local_gpu() or find("a100-80gb")
    counts = (
        _counts(gpus)
        if gpus is not None
        else [run.num_ranks if run else claim.gpus if claim else num_local_gpus() or 1]
    )
    if price is not None and not 0 < price < math.inf:
        raise ConfigError(f"--price: {price:g} is no price above 0. Give dollars an hour of one GPU, such as 1.9.")

    def planned(one: Recipe, count: int, advise: bool) -> Forecast:
        return forecast(
            one,
            hardware,
            count,
            price=price,
            calibrated=calibration,
            models=models,
            samples=samples,
            scale=scale,
            claim=claim,
            advise=advise,
        )

    if len(counts) == 1:
        found = planned(recipe, counts[0], True)
        return Answer([(counts[0], found, "")], run.compare(found) if run else None)
    return Answer([_at(recipe, count, planned) for count in counts])


def _at(recipe: Recipe, count: int, planned) -> Row:
    try:
        return count, planned(recipe, count, False), ""
    except ConfigError as error:
        refusal = error
    # More devices than the batch has rows: what would be run there is a larger batch.
    for times in (2**power for power in range(1, MOST_BATCH_GROWTH.bit_length())):
        grown = _grown(recipe, times)
        if grown is None:
            break
        try:
            found = planned(grown, count, False)
        except ConfigError:
            continue
        return count, found, f"the batch {times} times as large: {grown.training.batch_size}, as many tokens in all"
    return count, refusal, ""


def _grown(recipe: Recipe, times: int) -> Recipe | None:
    """The recipe with a batch `times` as large, and as many tokens in all."""
    training = recipe.training
    if recipe.stages is not None or training.gradient_accumulation is not None:
        return None
    tokens = training.batch_tokens
    size: int | str = int(training.batch_size) * times if tokens is None else f"{tokens * times} tokens"
    if tokens is not None and tokens * times % 2**20 == 0:
        size = f"{tokens * times // 2**20}M tokens"
    update: dict = {"batch_size": size}
    if training.total_steps is not None:
        # The warm-up matters little to the time, and as written need not agree with fewer steps.
        update |= {"total_steps": max(1, training.total_steps // times), "warmup_steps": None}
    return recipe.model_copy(update={"training": training.model_copy(update=update)})


def _counts(written: str) -> list[int]:
    parts = [part.strip() for part in written.split(",")]
    counts = []
    for part in parts:
        if not (part.isascii() and part.isdigit()) or int(part) < 1:
            raise ConfigError(f"--gpus {written}: {part or 'nothing'} is not a whole number of at least 1.")
        counts.append(int(part))
    return list(dict.fromkeys(counts))
