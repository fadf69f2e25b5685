"""Comparison of a finished run with its plan."""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from igla_mega.config import json_text
from igla_mega.config.errors import ConfigError
from igla_mega.config.files import read_text
from igla_mega.layout.hardware import TABLE, Hardware, cpu
from igla_mega.plan.forecast import Forecast
from igla_mega.plan.time import model_flops_per_token

WARM_UP_STEPS = 3
"""Number of steps at the start that allocate and compile, which the median excludes."""


@dataclass(frozen=True)
class Comparison:
    """Measurements of a run next to the plan."""

    folder: Path
    rows: tuple[tuple[str, float, float, str], ...]
    """Quantity, measured, predicted, unit."""

    def lines(self) -> list[str]:
        """Return a table for a terminal."""
        found = [
            f"{self.folder}: the plan against the measured run",
            f"{'':26} {'measured':>14} {'plan':>14} {'error':>7}",
        ]
        for name, measured, planned, unit in self.rows:
            found.append(f"{name + ', ' + unit:26} {measured:14,.5g} {planned:14,.5g} {planned / measured - 1:+7.1%}")
        return [*found, ""]

    def values(self) -> list[dict[str, Any]]:
        """Return the same as values for JSON."""
        return [
            {"what": name, "unit": unit, "measured": measured, "predicted": planned, "error": planned / measured - 1}
            for name, measured, planned, unit in self.rows
        ]


@dataclass(frozen=True)
class FinishedRun:
    """Folder of a run with at least one step."""

    folder: Path
    steps: tuple[dict[str, Any], ...]
    warm_up_steps: int = WARM_UP_STEPS
    """Number of first steps that the medians exclude; 0 if they are left out already."""

    @property
    def recipe_file(self) -> Path:
        return self.folder / "recipe.yaml"

    def _median(self, key: str) -> float | None:
        """Return the median of a metric after the warm-up steps, or None if it was never logged."""
        found = [
            entry[key]
            for entry in self.steps[self.warm_up_steps if len(self.steps) > 2 * self.warm_up_steps else 0 :]
            if isinstance(entry.get(key), int | float) and abs(entry[key]) < 1e300
        ]
        return statistics.median(found) if found else None

    @property
    def num_ranks(self) -> int:
        """Number of ranks by the metrics: FLOP/s of all ranks over FLOP/s of one.

        Raises:
            ConfigError: the metrics lack one of them.
        """
        from igla_mega.config.load import load_recipe

        recipe = load_recipe(self.recipe_file)
        rate, each = self._median("tokens_per_second"), self._median("tflops_per_device")
        length = recipe.sequence_length
        if recipe.model is None or length is None or not rate or not each:
            raise ConfigError(f"{self.folder}: the metrics do not contain the number of ranks. Give --gpus.")
        # The metrics of a run count every weight as trained, also with adapters.
        whole = recipe.with_keys({"lora": None})
        return max(1, round(model_flops_per_token(whole, length) * rate / (each * 1e12)))

    def hardware(self) -> Hardware:
        """Return the table entry whose peak rate fits the logged utilization, else this CPU."""
        each, share = self._median("tflops_per_device"), self._median("mfu")
        if each and share:
            peak = each * 1e12 / share
            # 5 %: metrics are rounded. H100 and H200 share a peak; the memory in use distinguishes them.
            near = [entry for entry in TABLE.values() if abs(peak / entry.bf16_flops - 1) < 0.05]
            memory = self._median("memory_bytes") or 0.0
            fitting = [entry for entry in near if entry.memory_bytes >= memory]
            if fitting:
                return min(fitting, key=lambda entry: entry.memory_bytes)
        return cpu()

    def compare(self, planned: Forecast) -> Comparison:
        """Return the medians of the run next to the values of the plan."""
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
        """Return the planned memory as a run reports it: by the allocator on a GPU, of the process on a CPU."""
        memory = planned.parts[0].memory
        if planned.hardware.is_cpu:
            return memory.total
        return memory.total - memory.reserved - memory.slack


def find(folder: Path) -> FinishedRun | None:
    """Return the run in a folder, or None if it is not the folder of a run.

    Raises:
        ConfigError: the run has not completed a step.
    """
    if not (folder.is_dir() and (folder / "recipe.yaml").is_file()):
        return None
    steps = []
    metrics = folder / "metrics.jsonl"
    if metrics.is_file():
        for line in read_text(metrics, "replace", most=1 << 40).splitlines():
            try:
                entry = json_text.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict) and isinstance(entry.get("tokens_per_second"), int | float):
                steps.append(entry)
    if not steps:
        raise ConfigError(f"{folder}: the run has not completed a step. Plan its recipe: {folder}/recipe.yaml.")
    return FinishedRun(folder, tuple(steps))
