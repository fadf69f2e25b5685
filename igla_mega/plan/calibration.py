"""Share of the peak rates that the hardware reaches, by kind of kernel: measured, or assumed with a source.

`make gpu-check` and `tools/calibrate.py` measure and write calibration files.
"""

import bisect
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from igla_mega.config import json_text
from igla_mega.config.errors import ConfigError
from igla_mega.layout.hardware import Hardware

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"
"""Folder of calibration files, searched if none is given."""
FORMAT = 1
"""Version of the calibration file format."""
WIDTH_OF_7B = 7400
"""Harmonic mean of the widths of the products of a 7B layer, to which the assumed share of products belongs."""
HALF_WIDTH, _ITS_PEAK = 1500, 312e12
"""Assumed half width of products on an A100, and its peak: of five widths the one with the smallest error for the
calibrating half of `tests/plan/published_runs.json`. On a faster device a fixed time costs more FLOP."""
MOST_GEMM = 0.9
"""Maximum share of the peak that is assumed of products of any width."""
MOST_SHARE = 10
"""Maximum share of a peak. Above 1, since the peaks of a CPU are scaled from another CPU and may be too low."""


@dataclass(frozen=True)
class Rate:
    """Share of a peak, or seconds if its name ends in `_seconds`, with its source."""

    value: float
    source: str
    measured: bool = False

    def __str__(self) -> str:
        return f"{self.value:.3g} ({'measured' if self.measured else 'assumed'}: {self.source})"


@dataclass(frozen=True)
class Rates:
    """Rates of a device. All are shares of a peak, 0 to 1, except those that end in `_seconds`."""

    gemm: Rate
    """Share of the peak of matrix products, for the large products of a layer."""
    gemm_fp8: Rate
    """Share of the FP8 peak, for the same products with `precision: FP8`, conversion to 8 bits included."""
    attention_forward: Rate
    """Share of the peak of matrix products, counting causal work only."""
    attention_backward: Rate
    memory: Rate
    """Share of the memory bandwidth, for elementwise work."""
    loss: Rate
    """Share of the memory bandwidth, for the passes over the logits."""
    optimizer: Rate
    """Share of the memory bandwidth, for AdamW."""
    link: Rate
    """Share of the bandwidth within a machine, for collectives."""
    network: Rate
    """Share of the bandwidth between machines, for collectives."""
    overlap: Rate
    """Share of concurrent compute time that actually overlaps with communication."""
    op_seconds: Rate
    """Minimum time of one kernel, including its launch."""
    data_seconds: Rate
    """Time to read one token of a batch."""
    step_seconds: Rate
    """Remaining host time per step."""
    sizes: tuple[tuple[float, float], ...] = field(default=())
    """FLOP of a product -> share of the peak, by rising FLOP; empty: `gemm`, scaled by `half_width`."""
    half_width: float = 0.0
    """Width of a weight, sqrt(rows x columns) on a rank, at which products reach half of their largest share; 0: `gemm`
    for all sizes."""

    def gemm_share(self, flops: float, width: float = WIDTH_OF_7B) -> float:
        """Return the share of the peak that a product reaches.

        Args:
            flops: FLOP of the product; measured shares are interpolated over log(FLOP).
            width: sqrt(rows x columns) of its weight on a rank, by which an assumed share is scaled.
        """
        if not self.sizes:
            # A product costs a fixed time more than its FLOP: tiles at its borders, the first and the last load.
            larger = (1 + self.half_width / WIDTH_OF_7B) / (1 + self.half_width / width)
            return min(self.gemm.value * larger, max(self.gemm.value, MOST_GEMM))
        points = [size for size, _ in self.sizes]
        at = bisect.bisect(points, flops)
        if at in (0, len(points)):
            return self.sizes[min(at, len(points) - 1)][1]
        (low, low_share), (high, high_share) = self.sizes[at - 1], self.sizes[at]
        part = math.log(flops / low) / math.log(high / low)
        return low_share + part * (high_share - low_share)


NAMES = tuple(name for name in Rates.__dataclass_fields__ if name not in ("sizes", "half_width"))
_FOUNDRY = "llm-foundry's MPT-7B on 8 x A100 at 2048, 4096 and 8192 tokens is then predicted within 10 % (docs/plan.md)"
_FLASH_2 = "FlashAttention-2 on A100, arXiv:2307.08691, figures 5 and 6"
_GEMM = {
    "a100": Rate(0.68, _FOUNDRY),
    "h100": Rate(0.55, "between llm-foundry's MPT-7B on 8 x H100 (0.47) and KempnerForge's 7B on one H200 (0.68)"),
    "h200": Rate(0.68, "KempnerForge's 7B on one H200, full recompute, 4096 tokens (10,471 tok/s), is then predicted"),
    "b200": Rate(0.55, "as H100; no published run of a dense model in bf16 was found"),
    "rtx-4090": Rate(0.70, "no published run was found"),
}
_GEMM_FP8 = Rate(
    0.45, "between torchtitan's Llama-3.1-8B in Float8 on 8 x H100 (8,532 tokens/s and GPU) and Bridge's (14,451)"
)
_ATTENTION = {
    "a100": (Rate(0.70, _FLASH_2), Rate(0.60, _FLASH_2)),
    "h100": (Rate(0.60, "FlashAttention-3, arXiv:2407.08608, causal, head 128"), Rate(0.50, "the same")),
}


def assumed(hardware: Hardware) -> Rates:
    """Return the rates of hardware without a calibration; each has the source of its number."""
    if hardware.is_cpu:
        source = "a machine with two cores, AMD EPYC; tools/calibrate.py measures this machine"
        attention = (Rate(0.45, source), Rate(0.35, source))
        gemm, memory = Rate(0.75, source), Rate(0.6, source)
        ops = Rate(5e-6, source)
    else:
        family = next((key for key in _GEMM if hardware.name.startswith(key)), None)
        gemm = _GEMM[family] if family else Rate(0.55, f"as H100: {hardware.name} is not in the table")
        attention = _ATTENTION["a100" if family in ("a100", "rtx-4090") else "h100"]
        memory = Rate(0.80, "STREAM-like kernels reach 80 to 90 % of the data sheet's bandwidth")
        ops = Rate(5e-6, "a kernel launch of CUDA, about 5 microseconds")
    return Rates(
        gemm=gemm,
        gemm_fp8=_GEMM_FP8,
        attention_forward=attention[0],
        attention_backward=attention[1],
        memory=memory,
        loss=memory,
        optimizer=replace(memory, source="as memory"),
        link=Rate(0.75, "nccl-tests on NVLink machines: 75 to 80 % of the data sheet's one-way rate as bus bandwidth"),
        network=Rate(0.80, "nccl-tests over InfiniBand: 80 to 90 % of the line rate as bus bandwidth"),
        overlap=Rate(
            0.0 if hardware.is_cpu else 0.85, "collectives use multiprocessors; the first and last do not overlap"
        ),
        op_seconds=ops,
        data_seconds=Rate(2e-7, "reading windows of indexed data on this host"),
        step_seconds=Rate(2e-3, "host work of a step"),
        half_width=0.0 if hardware.is_cpu else HALF_WIDTH * hardware.bf16_flops / _ITS_PEAK,
    )


@dataclass(frozen=True)
class Calibration:
    """Rates of one kind of hardware."""

    hardware: str
    rates: Rates
    path: Path | None = None


def read(path: Path, hardware: Hardware) -> Calibration:
    """Read a calibration file; missing rates are assumed.

    Raises:
        ConfigError: the file is not a calibration, or a rate is out of range.
    """
    try:
        content: Any = json_text.read(path)
    except OSError:
        raise ConfigError(f"--calibration {path}: no such file. `make gpu-check` writes one.") from None
    except ValueError as error:
        raise ConfigError(f"--calibration {path}: not JSON ({error}). `make gpu-check` writes one.") from None
    if (
        not isinstance(content, dict)
        or not isinstance(content.get("rates"), dict)
        or not isinstance(content.get("hardware"), str)
    ):
        raise ConfigError(f"--calibration {path}: not a calibration: `hardware` or `rates` is missing.")
    if content.get("format", FORMAT) != FORMAT:
        raise ConfigError(f"--calibration {path}: format {content['format']}, but this version reads {FORMAT}.")
    rates, breaches = assumed(hardware), []
    named = str(path.relative_to(RESULTS.parents[1])) if path.is_relative_to(RESULTS.parents[1]) else str(path)
    for name, value in content["rates"].items():
        good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
        if name not in NAMES:
            breaches.append(f"--calibration {path}: rates.{name}: no such rate; known are {', '.join(NAMES)}.")
        elif not good or not (value >= 0 if name.endswith("_seconds") or name == "overlap" else value > 0):
            breaches.append(f"--calibration {path}: rates.{name}: {value!r} is not a number above 0.")
        elif not name.endswith("_seconds") and value > (most := 1 if name == "overlap" else MOST_SHARE):
            breaches.append(f"--calibration {path}: rates.{name}: {value!r} is not a share of a peak, at most {most}.")
        else:
            measured: Any = {name: Rate(float(value), named, measured=True)}
            rates = replace(rates, **measured)
    sizes = _sizes(content.get("gemm_sizes") or [])
    if rates.gemm.measured:
        rates = replace(rates, half_width=0.0)
    if sizes is None:
        breaches.append(f"--calibration {path}: gemm_sizes: not a list of [FLOP, share], both above 0.")
    if breaches:
        raise ConfigError(*breaches)
    return Calibration(content["hardware"], replace(rates, sizes=sizes or ()), path)


def _sizes(found: Any) -> tuple[tuple[float, float], ...] | None:
    """Return sizes and shares by rising size, or None if they are invalid."""
    try:
        sizes = sorted((float(flops), float(share)) for flops, share in found)
    except (TypeError, ValueError):
        return None
    return tuple(sizes) if all(0 < flops < math.inf and 0 < share <= MOST_SHARE for flops, share in sizes) else None


def of(hardware: Hardware, precision: str, named: Path | None = None) -> tuple[Calibration, list[str]]:
    """Return the calibration to use, and warnings about it.

    It is the given file, else the newest in `bench/results` for this hardware and precision, else assumptions.
    """
    if named is not None:
        found = read(named, hardware)
        if found.hardware != hardware.name:
            return found, [
                f"{named} was measured on {found.hardware}, not {hardware.name}: its shares of the peaks are used, "
                "which may differ on this hardware."
            ]
        return found, []
    # FP8 runs use bf16 outside the products of the layers, and a calibration of bf16 includes `gemm_fp8`.
    precision = "BF16" if precision == "FP8" else precision
    pattern = f"calibration_*_{hardware.name}_{precision.lower()}*.json"
    for path in sorted(RESULTS.glob(pattern), reverse=True):
        if hardware.is_cpu and not _same_machine(path):
            continue
        return read(path, hardware), []
    return Calibration(hardware.name, assumed(hardware)), []


def _same_machine(path: Path) -> bool:
    """Return True if the calibration of a CPU is of the same CPU model as this machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        return str(json_text.read(path).get("machine", "")).startswith(model)
    except (OSError, StopIteration, ValueError, AttributeError):
        return False
