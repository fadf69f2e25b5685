"""Register the tensor ops of the dispatcher namespace `igla`: references in torch, and kernels if `csrc/` is built."""

import warnings
from pathlib import Path

import torch

from igla_mega.ops import (  # noqa: F401  (registers schemas and references before the kernels)
    accumulate,
    cross_entropy,
    ewc_penalty,
    fisher,
    merge_partials,
    pointwise,
)

# Ops with a kernel of `csrc/` for both the CPU and CUDA.
OPS = (
    "softmax_statistics",
    "softmax_gradient_",
    "merge_partials",
    "accumulate_",
    "fisher_accumulate_",
    "ewc_pull_",
)
HOST_OPS = ("rms_norm", "rms_norm_gradient", "swiglu", "swiglu_gradient", "rotate")
"""Ops with a kernel of `csrc/` for the CPU only: on CUDA torch.compile compiles each reference."""
_BUILD = "pip install --no-build-isolation --no-deps -e ."


def _load_kernels(folder: Path) -> str | None:
    """Load the built library of `folder`; return the reason if it is missing or does not load, else None."""
    libraries = sorted(folder.glob("_C*.so"))
    if not libraries:
        return f"csrc/ is not built; build it with `{_BUILD}`"
    try:
        torch.ops.load_library(str(libraries[0]))
    except (OSError, RuntimeError) as error:
        problem = (
            f"{libraries[0].name} was built against another torch than {torch.__version__} and does not load; "
            f"the slower torch reference is used. Build again with `{_BUILD}`. ({error.__cause__ or error})"
        )
        warnings.warn(problem, RuntimeWarning, stacklevel=2)
        return problem
    return None


why_no_kernels = _load_kernels(Path(__file__).resolve().parent.parent)
"""Reason why the built library is not in use; None if it is."""


def kernels() -> dict[str, dict[str, bool]]:
    """Return for each op whether it has a compiled kernel on the CPU and on CUDA; without one the reference runs."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return {
        op: {"cpu": has(f"igla::{op}", "CPU"), "cuda": op in HOST_OPS or has(f"igla::{op}", "CUDA")}
        for op in (*OPS, *HOST_OPS)
    }


def require_kernels(device: str) -> None:
    """Check that every op has a compiled kernel, for recipes with `kernels: require`.

    Args:
        device: "cpu" or "cuda".

    Raises:
        RuntimeError: an op has no compiled kernel for this device.
    """
    missing = [op for op, built in kernels().items() if not built[device]]
    if missing:
        reason = why_no_kernels or f"csrc/ was built without {device.upper()}; build it again with `{_BUILD}`"
        raise RuntimeError(
            f"distributed.kernels: require, but {', '.join(missing)} has no {device} kernel: {reason}.\n"
            "  Or use `kernels: auto`, which falls back to the torch reference."
        )
