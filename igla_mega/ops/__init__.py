"""Tensor ops in the dispatcher namespace `igla`: a reference in torch, and faster kernels once `csrc/` is built."""

import warnings
from pathlib import Path

import torch

from igla_mega.ops import (  # noqa: F401  (schemas and references come before the kernels)
    accumulate,
    cross_entropy,
    ewc_penalty,
    fisher,
    merge_partials,
    pointwise,
)

OPS = (
    "softmax_statistics",
    "softmax_gradient_",
    "merge_partials",
    "accumulate_",
    "fisher_accumulate_",
    "ewc_pull_",
)
HOST_OPS = ("rms_norm", "rms_norm_gradient", "swiglu", "swiglu_gradient", "rotate")
"""Those that csrc has for the CPU alone: on CUDA torch.compile makes a kernel of each reference."""
_BUILD = "pip install --no-build-isolation --no-deps -e ."


def _load_kernels(folder: Path) -> str | None:
    """Load the built library of `folder`; return the reason, as text, if it is absent or does not load."""
    libraries = sorted(folder.glob("_C*.so"))
    if not libraries:
        return f"csrc/ is not built; build it with `{_BUILD}`"
    try:
        torch.ops.load_library(str(libraries[0]))
    except (OSError, RuntimeError) as error:
        problem = (
            f"{libraries[0].name} was built against another torch than {torch.__version__} and does not load; "
            f"the torch reference answers, slower. Build again with `{_BUILD}`. ({error.__cause__ or error})"
        )
        warnings.warn(problem, RuntimeWarning, stacklevel=2)
        return problem
    return None


why_no_kernels = _load_kernels(Path(__file__).resolve().parent.parent)
"""Reason why the built library is not in use, as text; None if it is."""


def kernels() -> dict[str, dict[str, bool]]:
    """For each op whether a compiled kernel answers on the CPU and on CUDA; where not, the torch reference does."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    compiles = torch.version.cuda is not None  # a CPU build of torch makes no kernel for a GPU
    return {
        op: {"cpu": has(f"igla::{op}", "CPU"), "cuda": (compiles and op in HOST_OPS) or has(f"igla::{op}", "CUDA")}
        for op in (*OPS, *HOST_OPS)
    }


def require_kernels(device: str) -> None:
    """Answer `kernels: require`.

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
