"""Plans for a command line of `igla-mega plan`."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from igla_mega.config import load
from igla_mega.config.errors import ConfigError
from igla_mega.config.schema import Recipe
from igla_mega.layout.hardware import Hardware, cpu, find, local_gpu, num_local_gpus, read
from igla_mega.plan import answer, card, finished
from igla_mega.plan.finished import Comparison
from igla_mega.plan.forecast import Forecast, Given, forecast

MOST_BATCH_GROWTH = 64
"""Maximum factor by which the batch is enlarged for a number of GPUs that does not divide it."""

Row = tuple[int, Forecast | ConfigError, str]
"""Number of devices; the plan, or the error; the change to the recipe, or an empty string."""


@dataclass(frozen=True)
class Answer:
    """Plans for one command line."""

    table: Sequence[Row]
    comparison: Comparison | None = None

    def text(self) -> str:
        """Return the text for a terminal."""
        if len(self.table) > 1:
            return "\n".join(answer.scaling(self.table))
        found = self.table[0][1]
        assert isinstance(found, Forecast), "refused before"
        lines = [*(self.comparison.lines() if self.comparison else ()), *answer.text(found)]
        return "\n".join(lines)

    def json(self) -> str:
        """Return JSON: an object, or a list of objects for several numbers of devices."""
        if len(self.table) > 1:
            return json.dumps([_row_values(row) for row in self.table], indent=1)
        found = self.table[0][1]
        assert isinstance(found, Forecast), "refused before"
        compared = {"comparison": self.comparison.values()} if self.comparison else {}
        return json.dumps({**answer.values(found), **compared}, indent=1)


def _row_values(row: Row) -> dict:
    """Return one row of the table as values for JSON."""
    gpus, found, note = row
    if isinstance(found, ConfigError):
        return {"gpus": gpus, "error": str(found)}
    return {**answer.values(found), "changed": note or None}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The command line of `plan`."""

    name: str
    """Name of a packaged recipe, a path, or a run folder."""
    scale: str | None = None
    overrides: list[str] | None = None
    gpu: str | None = None
    gpus: str | None = None
    price: float | None = None
    hardware_file: Path | None = None
    calibration: Path | None = None
    models: Path | None = None
    samples: int | None = None


def ask(asked: Asked) -> Answer:
    """Return the plan of a recipe, or of a run folder together with a comparison to the measured run.

    Without `gpu` and `gpus`, they are those of the run, of the claim of the card, or of this machine.

    Raises:
        ConfigError: an option is invalid, or the recipe does not fit.
    """
    run, scale, price = finished.find(Path(asked.name)), asked.scale, asked.price
    recipe = load.load_recipe(run.recipe_file if run else asked.name, scale=scale, overrides=asked.overrides)
    claim = card.claim_of(recipe.name) if scale is None and run is None else None
    hardware = _hardware(asked, run, claim)
    counts = (
        _counts(asked.gpus)
        if asked.gpus is not None
        else [run.num_ranks if run else claim.gpus if claim else num_local_gpus() or 1]
    )
    if price is not None and not 0 < price < math.inf:
        raise ConfigError(f"--price: {price:g} is not above 0. Give dollars per GPU-hour, such as 1.9.")
    given = Given(price, asked.calibration, asked.models, asked.samples, scale, claim, advise=len(counts) == 1)
    if len(counts) == 1:
        found = forecast(recipe, hardware, counts[0], given)
        return Answer([(counts[0], found, "")], run.compare(found) if run else None)
    return Answer([_at(recipe, count, lambda one, count: forecast(one, hardware, count, given)) for count in counts])


def _hardware(asked: Asked, run: finished.FinishedRun | None, claim: card.Claim | None) -> Hardware:
    """Return the hardware to plan for."""
    more = read(asked.hardware_file) if asked.hardware_file is not None else None
    if asked.gpu is not None:
        return find(asked.gpu, more)
    if run is not None:
        return run.hardware()
    if claim is not None:
        return find(claim.gpu)
    return cpu() if asked.scale is not None else local_gpu() or find("a100-80gb")


def _at(recipe: Recipe, count: int, planned) -> Row:
    """Return the row for a number of devices, with a larger batch if necessary."""
    try:
        return count, planned(recipe, count), ""
    except ConfigError as error:
        refusal = error
    # More devices than rows in the batch: a real run there would use a larger batch.
    for times in (2**power for power in range(1, MOST_BATCH_GROWTH.bit_length())):
        grown = _grown(recipe, times)
        if grown is None:
            break
        try:
            found = planned(grown, count)
        except ConfigError:
            continue
        return (
            count,
            found,
            f"the batch {times} times as large: {grown.training.batch_size}, same number of tokens in all",
        )
    return count, refusal, ""


def _grown(recipe: Recipe, times: int) -> Recipe | None:
    """Return the recipe with a batch `times` as large and the same number of tokens in all, or None if not possible."""
    training = recipe.training
    if recipe.stages is not None or training.gradient_accumulation is not None:
        return None
    tokens = training.batch_tokens
    size: int | str = int(training.batch_size) * times if tokens is None else f"{tokens * times} tokens"
    if tokens is not None and tokens * times % 2**20 == 0:
        size = f"{tokens * times // 2**20}M tokens"
    update: dict = {"training.batch_size": size}
    if training.total_steps is not None:
        # The warm-up hardly affects the time, and its steps could exceed the reduced number of steps.
        update |= {"training.total_steps": max(1, training.total_steps // times), "training.warmup_steps": None}
    return recipe.with_keys(update)


def _counts(written: str) -> list[int]:
    """Return the numbers of devices in `8,16,32`.

    Raises:
        ConfigError: one is not a whole number of at least 1.
    """
    parts = [part.strip() for part in written.split(",")]
    counts = []
    for part in parts:
        if not (part.isascii() and part.isdigit()) or int(part) < 1:
            raise ConfigError(f"--gpus {written}: {part or 'nothing'} is not a whole number of at least 1.")
        counts.append(int(part))
    return list(dict.fromkeys(counts))
