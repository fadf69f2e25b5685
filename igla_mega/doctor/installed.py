"""What is installed, which ops have compiled kernels, and what is lost without the missing."""

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
"""What, its state, and what uses it; where it is missing, also what happens without it."""
COLUMNS = ("what", "state", "used by; without it")

MISSING = "not installed"

# Name shown, distributions that bring it, module that must be there, what uses it, what happens without it.
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
        "Transformer Engine's attention, where it finds it",
        "nothing is lost: our layers use torch's own flash and cuDNN attention",
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
    (
        "gigatoken",
        ("gigatoken",),
        "gigatoken",
        "`prepare`, where it gives the same ids",
        "`tokenizers` makes the tokens; extra `data`",
    ),
    (
        "nvidia-dali",
        ("nvidia-dali-cuda130", "nvidia-dali-cuda120", "nvidia-dali-cuda110", "nvidia-dali"),
        "nvidia.dali",
        "`data.loader: dali`",
        "the native loader reads (in the NGC image; extra `dali`)",
    ),
)


def rows() -> list[Row]:
    """Look at this machine. Packages are looked up, not imported (but for torch)."""
    return [
        ("python", platform.python_version(), ""),
        ("torch", torch.__version__, ""),
        _cuda(),
        *(_package(*package) for package in _PACKAGES),
        *_kernels(ops.kernels(), ops.why_no_kernels),
    ]


def _cuda() -> Row:
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        return "cuda", f"{torch.version.cuda}, {count} x {torch.cuda.get_device_name(0)}", ""
    if torch.version.cuda is None:
        return "cuda", "torch is built without it", "GPUs; megatron-core runs on the CPU over gloo"
    return "cuda", f"{torch.version.cuda}, no device found", "GPUs; megatron-core runs on the CPU over gloo"


def unfit(gpu: int | None = None) -> list[str]:
    """Why no run can start here: what must be there and is not, or a GPU that does not answer.

    Args:
        gpu: the one to ask; None: all.
    """
    reasons = []
    if not _is_there("megatron.core"):
        reasons.append("megatron-core is not installed: `pip install megatron-core==0.16.1`")
    driver = num_local_gpus()
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    if driver and not hidden and not torch.cuda.is_available():
        reasons.append(
            f"the driver shows {driver} GPUs, torch {torch.__version__} none: another CUDA than the driver's?"
        )
    asked = range(torch.cuda.device_count()) if gpu is None else [gpu]
    for index in asked if torch.cuda.is_available() else ():
        try:
            torch.ones(1, device=f"cuda:{index}").item()
        except RuntimeError as error:
            reasons.append(f"GPU {index} does not answer: {str(error).splitlines()[0]}")
    return reasons


def _package(name: str, distributions: tuple[str, ...], module: str, used_by: str, without: str) -> Row:
    if name == "apex":
        return _apex(used_by, without)
    version = next(filter(None, map(_version, distributions)), None)
    if not _is_there(module):
        state = f"{version}, but without the module {module}" if version else MISSING
        return name, state, f"{used_by}; {without}"
    return name, version or "there, version unknown", used_by


def _apex(used_by: str, without: str = "") -> Row:
    """NVIDIA's, known by its compiled ops: on PyPI the name belongs to a toolkit for web applications."""
    lost = f"{used_by}; {without}"
    if _is_there("apex.optimizers") and _is_there("amp_C"):
        return "apex", _version("apex") or "there, version unknown", used_by
    if _is_there("apex.optimizers"):
        return "apex", "built without its CUDA ops (amp_C)", lost
    if _is_there("apex") or _version("apex"):
        return "apex", "another project of that name from PyPI: `pip uninstall apex`", lost
    return "apex", MISSING, lost


def _kernels(kernels: dict[str, dict[str, bool]], why_not: str | None) -> list[Row]:
    found = []
    for op, built in kernels.items():
        state = ", ".join(f"{label} {'yes' if built[device] else 'no'}" for device, label in _DEVICES)
        wanted = [label for device, label in _DEVICES if not built[device] and _WANTED[device]()]
        lost = f"speed on {' and '.join(wanted)}: the torch reference answers" if wanted else ""
        found.append((f"op {op}", state, lost))
    if why_not:
        found.append(("compiled ops", "not loaded", why_not))
    return found


_DEVICES = (("cpu", "CPU"), ("cuda", "CUDA"))
_WANTED: dict[str, Callable[[], bool]] = {"cpu": lambda: True, "cuda": torch.cuda.is_available}


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _is_there(module: str) -> bool:
    """Whether the module can be found, without running its package's code."""
    names = module.split(".")
    spec = importlib.util.find_spec(names[0])
    for depth in range(2, len(names) + 1):
        if spec is None:
            return False
        # `importlib.util.find_spec` would import the parent.
        places = list(spec.submodule_search_locations or [])
        spec = importlib.machinery.PathFinder.find_spec(".".join(names[:depth]), places)
    return spec is not None
