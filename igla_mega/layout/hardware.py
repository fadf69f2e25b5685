"""Hardware table: peak rates from the data sheets of the makers, and prices per hour. Does not import torch."""

import difflib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from igla_mega.config import yaml_text
from igla_mega.config.errors import ConfigError
from igla_mega.config.files import read_text
from igla_mega.config.rules import FP8_CAPABILITY

GIB = 2**30


@dataclass(frozen=True)
class Hardware:
    """One device and its machine. Rates are dense peaks of one device; links are in bytes per second, one way."""

    name: str
    title: str
    memory_bytes: float
    """Memory that a process can allocate, as reported by the driver."""
    bf16_flops: float
    """Peak rate of bf16 matrix products with fp32 accumulation, in FLOP/s."""
    fp32_flops: float
    """Peak rate of fp32, in FLOP/s."""
    bandwidth: float
    """Memory bandwidth, in bytes per second."""
    node_size: int
    """Number of devices per machine, joined by `link`."""
    link: float
    """Bandwidth to other devices of the machine: NVLink if present, else PCIe."""
    network: float
    """Bandwidth of one device to other machines."""
    host_link: float
    """Bandwidth to host memory (PCIe)."""
    watts: float
    """Share of the power of the machine at full load, in watts."""
    price: float
    """Price of one hour, in dollars."""
    source: str
    """Source of the peaks, the memory size and the links."""
    price_source: str
    reserved_bytes: float = 1.5 * GIB
    """Memory of the driver, its libraries and NCCL outside the allocator. Assumed."""
    fp8_flops: float = 0.0
    """Peak rate of FP8 matrix products with fp32 accumulation, in FLOP/s; 0 if not supported."""
    capability: float = math.inf
    """Compute capability, such as 9.0 for H100; unset, sufficient for every FP8 recipe."""

    def peak(self, precision: str) -> float:
        """Return the peak rate for the utilization at a `precision`, in FLOP/s; bf16 for FP8, which covers only
        part."""
        return self.fp32_flops if precision == "FP32" else self.bf16_flops

    def has_fp8(self, fp8_recipe: str) -> bool:
        """Return True if the device has matrix products for an FP8 recipe."""
        major, minor = FP8_CAPABILITY[fp8_recipe]
        return self.fp8_flops > 0 and self.capability >= major + minor / 10

    @property
    def is_cpu(self) -> bool:
        return self.name.startswith("cpu")


_CLOUDS = "assumed: middle of the specialised clouds' list prices, May 2026 (mercatus-ai.com/blog/cloud-gpu-pricing)"
_NO_PRICE = "assumed: no list of prices was found that covers it"
_A100 = "NVIDIA A100 data sheet, 2020-2021; DGX A100 data sheet: 8 x 200 Gb/s, 6.5 kW"
_A100_40 = Hardware(
    "a100-40gb", "NVIDIA A100 40GB SXM", 39.4 * GIB, 312e12, 19.5e12, 1.555e12, 8, 300e9, 25e9, 32e9, 812, 1.1,
    _A100, _NO_PRICE,
)  # fmt: skip
_H100 = Hardware(
    "h100", "NVIDIA H100 80GB SXM", 79.1 * GIB, 989e12, 67e12, 3.35e12, 8, 450e9, 50e9, 64e9, 1275, 3.0,
    "NVIDIA H100 data sheet, 2022; DGX H100 data sheet: 8 x 400 Gb/s, 10.2 kW", _CLOUDS, fp8_flops=1979e12,
    capability=9.0,
)  # fmt: skip
TABLE: dict[str, Hardware] = {
    entry.name: entry
    for entry in (
        _A100_40,
        replace(
            _A100_40, name="a100-80gb", title="NVIDIA A100 80GB SXM", memory_bytes=79.15 * GIB, bandwidth=2.039e12,
            price=1.3, price_source=_CLOUDS,
        ),
        _H100,
        replace(
            _H100, name="h200", title="NVIDIA H200 SXM", memory_bytes=139.8 * GIB, bandwidth=4.8e12, price=4.0,
            source="NVIDIA H200 data sheet, 2023; links and power as DGX H100's",
        ),
        Hardware(
            "b200", "NVIDIA B200 SXM", 178.0 * GIB, 2250e12, 75e12, 7.7e12, 8, 900e9, 50e9, 64e9, 1788, 5.0,
            "NVIDIA DGX B200 data sheet, 2024: 8 x 400 Gb/s, 14.3 kW; fp32 from the Blackwell brief", _NO_PRICE,
            fp8_flops=4500e12, capability=10.0,
        ),
        Hardware(
            "rtx-4090", "NVIDIA GeForce RTX 4090 24GB", 23.6 * GIB, 165.2e12, 82.6e12, 1.008e12, 1, 25e9, 3e9, 25e9,
            650, 0.4, "NVIDIA Ada GPU architecture white paper, 2022 (bf16 with fp32 sums); PCIe 4.0 x16; one to a "
            "machine, 25 Gb/s Ethernet and 200 W for the rest of it are assumed", _NO_PRICE, 0.8 * GIB,
            fp8_flops=330.3e12, capability=8.9,
        ),
    )
}  # fmt: skip
_ALIASES = {"a100": "a100-80gb", "4090": "rtx-4090", "rtx4090": "rtx-4090"}
# Best measured matrix products on two hardware threads of an AMD EPYC (Zen 4): 195 GFLOP/s fp32, 390 GFLOP/s bf16.
_CPU_THREADS, _CPU_FP32, _CPU_BF16, _CPU_BANDWIDTH = 2, 195e9, 390e9, 20e9

# Part of the CUDA device name -> name in the table.
_CUDA_NAMES = {"A100": "a100-80gb", "H100": "h100", "H200": "h200", "B200": "b200", "RTX 4090": "rtx-4090"}


def cpu() -> Hardware:
    """Return this machine as one device with all its cores, regardless of the number of ranks that share them."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = threads / _CPU_THREADS
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Hardware(
        "cpu", f"this machine's CPU, {threads} threads", memory, _CPU_BF16 * share, _CPU_FP32 * share, _CPU_BANDWIDTH,
        10**6, 4e9, 1e9, _CPU_BANDWIDTH, 10 * threads, 0.05 * threads,
        "measured on two threads of an AMD EPYC (Zen 4), scaled to this machine's", _NO_PRICE, 0.5 * GIB,
    )  # fmt: skip


def find(name: str, more: Mapping[str, Hardware] | None = None) -> Hardware:
    """Return the hardware with a name from the table or the file of the user.

    Args:
        more: entries of a file for --hardware.

    Raises:
        ConfigError: unknown name; the message has the most similar ones.
    """
    table = {**TABLE, **(more or {})}
    key = name.strip().lower().replace("_", "-").replace(" ", "-").removeprefix("nvidia-")
    key = _ALIASES.get(key, key)
    if key == "cpu" and key not in table:
        return cpu()
    if key in table:
        return table[key]
    known = [*table, "cpu"]
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}."
    raise ConfigError(f"--gpu {name}: no such hardware; {hint} Describe other hardware in a file for --hardware.")


def read(path: Path) -> dict[str, Hardware]:
    """Read the file for --hardware: YAML, names -> fields of `Hardware`; `like:` names the entry with the defaults.

    Raises:
        ConfigError: fields are unknown, missing or not positive; the message lists all of them.
    """
    if not path.is_file():
        raise ConfigError(f"--hardware {path}: no such file.")
    try:
        content = yaml_text.parse(read_text(path), f"--hardware {path}")
    except UnicodeDecodeError as error:
        raise ConfigError(f"--hardware {path}: cannot be read as YAML ({error}).") from None
    if not isinstance(content, dict) or not all(isinstance(entry, dict) for entry in content.values()):
        raise ConfigError(f"--hardware {path}: not a mapping of names to mappings. Write `my-gpu:` and its fields.")
    found: dict[str, Hardware] = {}
    breaches: list[str] = []
    for name, entry in content.items():
        given = dict(entry)
        base = find(str(given.pop("like")), found) if "like" in given else None
        found_breaches = list(_breaches(str(name), given, complete=base is not None))
        breaches += found_breaches
        if not found_breaches:
            found[str(name).lower()] = _entry(str(name).lower(), given, base, path)
    if breaches:
        raise ConfigError(*(f"--hardware {path}: {breach}" for breach in breaches))
    return found


_TEXT = {"title", "source", "price_source"}
_OPTIONAL = {*_TEXT, "reserved_bytes", "host_link", "fp8_flops", "capability"}


def _breaches(name: str, given: dict[str, Any], *, complete: bool):
    """Yield an error text for each wrong field of an entry; `complete` if `like:` supplies missing fields."""
    known = [field.name for field in fields(Hardware) if field.name != "name"]
    for key, value in given.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"known are {', '.join(known)}."
            yield f"{name}.{key}: no such field; {hint}"
        elif key not in _TEXT and not _positive(value):
            yield f"{name}.{key}: {value!r} is not a number above 0."
        elif key == "node_size" and float(value) != int(float(value)):
            yield f"{name}.node_size: {value!r} is not a whole number of devices."
    missing = [key for key in known if key not in _OPTIONAL and key not in given]
    if missing and not complete:
        yield f"{name}: missing {', '.join(missing)}. Give them, or `like:` with the name of similar hardware."


def _positive(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and math.isfinite(float(value)) and float(value) > 0
    except (TypeError, ValueError, OverflowError):
        return False


def _entry(name: str, given: dict[str, Any], base: Hardware | None, path: Path) -> Hardware:
    """Return the hardware of a checked entry, with `base` as defaults."""
    numbers = {key: value if key in _TEXT else float(value) for key, value in given.items()}
    if "node_size" in numbers:
        numbers["node_size"] = int(numbers["node_size"])
    values = {"name": name, "title": name, "source": str(path), "price_source": str(path), **numbers}
    if base is not None:
        kept = {} if "price" in given else {"price_source": base.price_source}
        return replace(base, **{**values, **kept})  # type: ignore[arg-type]
    return Hardware(**{"host_link": 25e9, **values})  # type: ignore[arg-type]


def of_cuda_name(device_name: str) -> Hardware | None:
    """Return the table entry for a CUDA device name, or None."""
    if "A100" in device_name and "40GB" in device_name:
        return TABLE["a100-40gb"]
    return next((TABLE[key] for part, key in _CUDA_NAMES.items() if part in device_name), None)


def dense_peak_flops(device_name: str, dtype: str) -> float | None:
    """Return the peak rate of a CUDA device name in FLOP/s, or None if the table lacks the device or the dtype."""
    found = of_cuda_name(device_name)
    return found.bf16_flops if found is not None and dtype == "bfloat16" else None


def num_local_gpus() -> int:
    """Return the number of CUDA devices of this machine, without importing torch."""
    driver = Path("/proc/driver/nvidia/gpus")
    return len(list(driver.iterdir())) if driver.is_dir() else 0


def local_gpu() -> Hardware | None:
    """Return the table entry for the first GPU of this machine by the driver files; None if absent or not in the
    table."""
    for information in Path("/proc/driver/nvidia/gpus").glob("*/information"):
        return of_cuda_name(information.read_text(errors="replace"))
    return None
