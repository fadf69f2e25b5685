"""Build csrc/: the CPU ops and index helpers always, the CUDA ops if a CUDA build of torch and nvcc are present.

IGLA_BUILD_CUDA  auto (default) | 0 | 1: with 1, missing CUDA is an error
IGLA_MARCH       instruction set of the CPU ops, for example `native`; default x86-64-v3 (Haswell, Zen and later)
"""

import os
import platform
import shutil
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup


def cuda_home() -> str | None:
    """Return the folder of the CUDA toolkit, also if the `nvcc` on the path is a wrapper outside of it; else None."""
    nvcc = shutil.which("nvcc")
    beside_nvcc = [Path(nvcc).resolve().parents[1]] if nvcc else []
    for home in [*map(Path, filter(None, [os.environ.get("CUDA_HOME")])), *beside_nvcc, Path("/usr/local/cuda")]:
        if (home / "bin/nvcc").exists() and (home / "include/cuda_runtime.h").exists():
            return str(home)
    return None


# Before the import below: cpp_extension looks for the toolkit once, when it is imported.
if found := cuda_home():
    os.environ["CUDA_HOME"] = found

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
except ImportError:
    raise SystemExit(
        "igla_mega is built against the installed torch, and none is installed: install torch >= 2.11 first, "
        "then `pip install --no-build-isolation -e .` (or just `make setup`)."
    ) from None

# The oldest torch whose stable ABI the ops use: one library serves 2.11 and every later torch.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020B000000000000"
OPS = ["cross_entropy", "merge_partials", "accumulate", "fisher", "ewc_penalty"]
# CPU only: on CUDA torch.compile generates these.
HOST_OPS = ["pointwise"]


def build_cuda() -> bool:
    """Return True if the CUDA ops are to be built."""
    choice = os.environ.get("IGLA_BUILD_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"IGLA_BUILD_CUDA={choice}: use auto, 0 or 1.")
    missing = []
    if torch.version.cuda is None:
        missing.append(f"a CUDA build of torch (this is {torch.__version__})")
    if cuda_home() is None:
        missing.append("nvcc with its headers")
    if choice == "1" and missing:
        raise SystemExit(f"IGLA_BUILD_CUDA=1 needs {' and '.join(missing)}.")
    return choice != "0" and not missing


def architecture_flags() -> list[str]:
    """Return the compiler's flags for the CPU's instruction set."""
    march = os.environ.get("IGLA_MARCH") or ("x86-64-v3" if platform.machine() in ("x86_64", "AMD64") else None)
    return [f"-march={march}"] if march else []


def op_extension():
    """Return the extension of the ops; it uses only the stable ABIs of Python and torch."""
    cxx = ["-O3", "-g0", "-std=c++20", "-fvisibility=hidden", "-Wall", "-Wno-psabi", STABLE_ABI, *architecture_flags()]
    options = {"name": "igla_mega._C", "include_dirs": [str(Path("csrc").resolve())], "py_limited_api": True}
    sources = [f"csrc/{op}.cpp" for op in OPS + HOST_OPS]
    if not build_cuda():
        return CppExtension(sources=sources, extra_compile_args={"cxx": cxx}, **options)
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    nvcc = ["-O3", "-std=c++20", "-lineinfo", "--compiler-options", "-fvisibility=hidden"]
    return CUDAExtension(
        sources=[*sources, *(f"csrc/{op}{end}" for op in OPS for end in ("_cuda.cpp", ".cu"))],
        extra_compile_args={"cxx": [*cxx, "-DUSE_CUDA"], "nvcc": nvcc},
        **options,
    )


setup(
    ext_modules=[
        op_extension(),
        Pybind11Extension(
            "igla_mega._helpers", ["csrc/index_helpers.cpp"], cxx_std=17, extra_compile_args=["-O3", "-g0"]
        ),
    ],
    cmdclass={"build_ext": BuildExtension.with_options(use_ninja=True)},
)
