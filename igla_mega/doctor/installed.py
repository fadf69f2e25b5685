"""List the packages that are installed, the ops with compiled kernels, and the effect of what is missing."""

import importlib.machinery
import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Callable

import torch

from igla_mega import ops
from igla_mega.layout.hardware import num_local_gpus

Row = tuple[str, str, str]
"""Name, state, and what uses it; if it is missing, also the effect."""
COLUMNS = ("what", "state", "used by; without it")

MISSING = "not installed"

# Name, distributions that contain it, module that must exist, what uses it, what happens without it.
_PACKAGES: tuple[tuple[str, tuple[str, ...], str, str, str], ...] = (
    (
        "megatron-core",
        ("megatron-core",),
        "megatron.core",
        "everything that trains",
        "`pip install megatron-core==0.16.1`",
    ),
    (
        "transformer-engine",
        ("transformer-engine", "transformer-engine-torch", "transformer_engine"),
        "transformer_engine",
        "`kernels: te` and FP8",
        "our own layers run instead (CUDA only; in the NGC image)",
    ),
    (
        "apex",
        ("apex",),
        "apex.optimizers",
        "the optimizer: its fused Adam, where Transformer Engine's is missing",
        "torch's runs instead (CUDA only; in the NGC image)",
    ),
    (
        "flash-attn",
        ("flash-attn",),
        "flash_attn",
        "Transformer Engine's attention, if installed",
        "no effect: our layers use torch's own flash and cuDNN attention",
    ),
    (
        "bitsandbytes",
        ("bitsandbytes",),
        "bitsandbytes",
        "a frozen base in NF4 (recipe qlora_7b)",
        "extra `quant`",
    ),
    ("transformers", ("transformers",), "transformers", "the comparison of logits on import and export", "extra `hf`"),
    ("tensorboard", ("tensorboard",), "tensorboard", "`logging.tensorboard`", "metrics.jsonl has the same numbers"),
    ("wandb", ("wandb",), "wandb", "`logging.wandb`", "extra `track`"),
    ("mlflow", ("mlflow-skinny", "mlflow"), "mlflow", "`logging.mlflow`", "extra `track`"),
    (
        "gigatoken",
        ("gigatoken",),
        "gigatoken",
        "`prepare`, if it gives the same ids",
        "`tokenizers` runs instead; extra `data`",
    ),
    (
        "nvidia-dali",
        ("nvidia-dali-cuda130", "nvidia-dali-cuda120", "nvidia-dali-cuda110", "nvidia-dali"),
        "nvidia.dali",
        "`data.loader: dali`",
        "the native loader runs instead (in the NGC image; extra `dali`)",
    ),
)


def rows() -> list[Row]:
    """Return the rows for this machine. Packages other than torch are looked up, not imported."""
    return [
        ("python", platform.python_version(), ""),
        ("torch", torch.__version__, ""),
        _cuda(),
        *(_package(*package) for package in _PACKAGES),
        *_kernels(ops.kernels(), ops.why_no_kernels),
    ]


def _cuda() -> Row:
    """Return the row for CUDA: its version and devices, or why it is not used."""
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        return "cuda", f"{torch.version.cuda}, {count} x {torch.cuda.get_device_name(0)}", ""
    if torch.version.cuda is None:
        return "cuda", "torch is built without CUDA", "GPUs; megatron-core runs on the CPU over gloo"
    return "cuda", f"{torch.version.cuda}, no device found", "GPUs; megatron-core runs on the CPU over gloo"


def unfit(gpu: int | None = None) -> list[str]:
    """Return the reasons why no run can start on this machine: a missing package, or a GPU that does not answer.

    Args:
        gpu: index of the GPU to test; None: all.
    """
    reasons = []
    if not _exists("megatron.core"):
        reasons.append("megatron-core is not installed: `pip install megatron-core==0.16.1`")
    driver = num_local_gpus()
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    # A run would start on the CPU here, a thousand times slower and without an error.
    if driver and not hidden and not torch.cuda.is_available():
        reasons.append(
            f"the driver shows {driver} GPUs, but torch {torch.__version__} none. Install a torch built for a CUDA "
            "version that the driver supports."
        )
    tested = range(torch.cuda.device_count()) if gpu is None else [gpu]
    for index in tested if torch.cuda.is_available() else ():
        try:
            torch.ones(1, device=f"cuda:{index}").item()
        except RuntimeError as error:
            reasons.append(f"GPU {index} does not answer: {str(error).splitlines()[0]}")
    return reasons


def _package(name: str, distributions: tuple[str, ...], module: str, used_by: str, without: str) -> Row:
    """Return the row for an entry of `_PACKAGES`."""
    if name == "apex":
        return _apex(used_by, without)
    version = next(filter(None, map(_version, distributions)), None)
    if not _exists(module):
        state = f"{version}, but without the module {module}" if version else MISSING
        return name, state, f"{used_by}; {without}"
    return name, version or "installed, version unknown", used_by


def _apex(used_by: str, without: str = "") -> Row:
    """Return the row for NVIDIA's apex, recognized by its compiled ops.

    On PyPI the name belongs to a toolkit for web applications, which `pip install apex` installs.
    """
    effect = f"{used_by}; {without}"
    if _exists("apex.optimizers") and _exists("amp_C"):
        return "apex", _version("apex") or "installed, version unknown", used_by
    if _exists("apex.optimizers"):
        return "apex", "built without its CUDA ops (amp_C)", effect
    if _exists("apex") or _version("apex"):
        return "apex", "another project of that name from PyPI: `pip uninstall apex`", effect
    return "apex", MISSING, effect


def _kernels(kernels: dict[str, dict[str, bool]], load_error: str | None) -> list[Row]:
    """Return a row for every op, and one for the error if the compiled ops could not be loaded."""
    found = []
    for op, built in kernels.items():
        state = ", ".join(f"{label} {'yes' if built[device] else 'no'}" for device, label in _DEVICES)
        missing = [label for device, label in _DEVICES if not built[device] and _USED[device]()]
        effect = f"speed on {' and '.join(missing)}: the torch reference runs instead" if missing else ""
        found.append((f"op {op}", state, effect))
    if load_error:
        found.append(("compiled ops", "not loaded", load_error))
    return found


_DEVICES = (("cpu", "CPU"), ("cuda", "CUDA"))
_USED: dict[str, Callable[[], bool]] = {"cpu": lambda: True, "cuda": torch.cuda.is_available}
"""True for the devices of this machine: a kernel that is missing for another device has no effect."""


def _version(distribution: str) -> str | None:
    """Return the installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _exists(module: str) -> bool:
    """Return True if a module can be found, without running its package's code."""
    names = module.split(".")
    spec = importlib.util.find_spec(names[0])
    for depth in range(2, len(names) + 1):
        if spec is None:
            return False
        # `importlib.util.find_spec` of a dotted name would import the parent, which can take seconds or fail.
        folders = list(spec.submodule_search_locations or [])
        spec = importlib.machinery.PathFinder.find_spec(".".join(names[:depth]), folders)
    return spec is not None
