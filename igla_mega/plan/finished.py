"""A run that has been taken, beside its plan."""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from igla_mega.config import json_text
from igla_mega.config.errors import ConfigError
from igla_mega.layout.hardware import TABLE, Hardware, cpu
from igla_mega.plan.forecast import Forecast
from igla_mega.plan.time import model_flops_per_token

WARM_UP_STEPS = 3
"""Steps at the start (and after a resume) that allocate and compile: they are left out of the median."""


@dataclass(frozen=True)
class Comparison:
    """What was measured of a run, and its plan."""

    folder: Path
    rows: tuple[tuple[str, float, float, str], ...]
    """What, measured, predicted, unit."""

    def lines(self) -> list[str]:
        """A table for a terminal."""
        found = [
            f"{self.folder}: the plan against what was measured",
            f"{'':26} {'measured':>14} {'plan':>14} {'error':>7}",
        ]
        for name, measured, planned, unit in self.rows:
            found.append(f"{name + ', ' + unit:26} {measured:14,.5g} {planned:14,.5g} {planned / measured - 1:+7.1%}")
        return [*found, ""]

    def values(self) -> list[dict[str, Any]]:
        """The same for JSON."""
        return [
            {"what": name, "unit": unit, "measured": measured, "predicted": planned, "error": planned / measured - 1}
            for name, measured, planned, unit in self.rows
        ]


@dataclass(frozen=True)
class FinishedRun:
    """The folder of a run that has taken steps."""

    folder: Path
    steps: tuple[dict[str, Any], ...]

    @property
    def recipe_file(self) -> Path:
        return self.folder / "recipe.yaml"

    def _median(self, key: str) -> float | None:
        found = [
            entry[key]
            for entry in self.steps[WARM_UP_STEPS if len(self.steps) > 2 * WARM_UP_STEPS else 0 :]
            if isinstance(entry.get(key), int | float) and abs(entry[key]) < 1e300
        ]
        return statistics.median(found) if found else None

    @property
    def num_ranks(self) -> int:
        """As its metrics tell: FLOP/s of all ranks over those of one."""
        from igla_mega.config.load import load_recipe

        recipe = load_recipe(self.recipe_file)
        rate, each = self._median("tokens_per_second"), self._median("tflops_per_device")
        length = recipe.sequence_length
        if recipe.model is None or length is None or not rate or not each:
            raise ConfigError(f"{self.folder}: does not tell how many ranks it ran on. Give --gpus.")
        # A run's metrics count every weight as trained.
        whole = recipe.model_copy(update={"lora": None})
        return max(1, round(model_flops_per_token(whole, length) * rate / (each * 1e12)))

    def hardware(self) -> Hardware:
        """The table's entry whose peak the run's utilisation was taken of; else this CPU."""
        each, share = self._median("tflops_per_device"), self._median("mfu")
        if each and share:
            peak = each * 1e12 / share
            near = [entry for entry in TABLE.values() if abs(peak / entry.bf16_flops - 1) < 0.05]
            memory = self._median("memory_bytes") or 0.0
            fitting = [entry for entry in near if entry.memory_bytes >= memory]
            if fitting:
                return min(fitting, key=lambda entry: entry.memory_bytes)
        return cpu()

    def compare(self, planned: Forecast) -> Comparison:
        """Put the plan beside the run's medians."""
        part, rows = planned.parts[0], []
        for name, key, prediction, unit, factor in (
            ("throughput", "tokens_per_second", part.tokens_per_second, "tokens/s", 1.0),
            ("step", "step_seconds", part.step.seconds, "s", 1.0),
            ("MFU", "mfu", part.utilization(planned.hardware), "%", 100.0),
        ):
            if measured := self._median(key):
                rows.append((name, measured * factor, prediction * factor, unit))
        peaks = [entry["memory_bytes"] for entry in self.steps if isinstance(entry.get("memory_bytes"), int | float)]
        if peaks:
            rows.append(("peak memory of rank 0", max(peaks) / 2**20, self._memory(planned) / 2**20, "MiB"))
        return Comparison(self.folder, tuple(rows))

    def _memory(self, planned: Forecast) -> float:
        """On a GPU the run reports what its allocator handed out; on a CPU all that the process had."""
        memory = planned.parts[0].memory
        if planned.hardware.is_cpu:
            return memory.total
        return memory.total - memory.reserved - memory.slack


def find(folder: Path) -> FinishedRun | None:
    """The run in a folder; None when this is no folder of a run.

    Raises:
        ConfigError: a run's folder without a step in it.
    """
    if not (folder.is_dir() and (folder / "recipe.yaml").is_file()):
        return None
    steps = []
    metrics = folder / "metrics.jsonl"
    if metrics.is_file():
        for line in metrics.read_text(errors="replace").splitlines():
            try:
                entry = json_text.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict) and isinstance(entry.get("tokens_per_second"), int | float):
                steps.append(entry)
    if not steps:
        raise ConfigError(f"{folder}: a run that has taken no step yet. Plan its recipe: {folder}/recipe.yaml.")
    return FinishedRun(folder, tuple(steps))
