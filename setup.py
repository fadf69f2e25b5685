"""Builds csrc/: the CPU ops and index helpers always, the CUDA ops where a CUDA torch and nvcc are present.

IGLA_BUILD_CUDA  auto (default) | 0 | 1: 1 makes a missing CUDA an error
IGLA_MARCH       instruction set of the CPU ops; x86-64-v3 (Haswell, Zen and later) unless given, e.g. `native`
"""

import os
import platform
import shutil
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup


def cuda_home() -> str | None:
    """The CUDA toolkit, found also where the `nvcc` on the path is a wrapper outside of it."""
    nvcc = shutil.which("nvcc")
    beside_nvcc = [Path(nvcc).resolve().parents[1]] if nvcc else []
    for home in [*map(Path, filter(None, [os.environ.get("CUDA_HOME")])), *beside_nvcc, Path("/usr/local/cuda")]:
        if (home / "bin/nvcc").exists() and (home / "include/cuda_runtime.h").exists():
            return str(home)
    return None


# torch looks for the toolkit while cpp_extension is imported.
if found := cuda_home():
    os.environ["CUDA_HOME"] = found

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
except ImportError:
    raise SystemExit(
        "igla_mega is built against the torch that is already installed and none is: install torch >= 2.11 first, "
        "then `pip install --no-build-isolation -e .` (or just `make setup`)."
    ) from None

# The oldest torch whose stable ABI the ops use: one library serves 2.11 and every later torch.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020B000000000000"
OPS = ["cross_entropy", "merge_partials", "accumulate", "fisher", "ewc_penalty"]
# On CUDA torch.compile makes these.
HOST_OPS = ["pointwise"]


def build_cuda() -> bool:
    wish = os.environ.get("IGLA_BUILD_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        raise SystemExit(f"IGLA_BUILD_CUDA={wish}: use auto, 0 or 1.")
    lacking = []
    if torch.version.cuda is None:
        lacking.append(f"a CUDA build of torch (this is {torch.__version__})")
    if cuda_home() is None:
        lacking.append("nvcc with its headers")
    if wish == "1" and lacking:
        raise SystemExit(f"IGLA_BUILD_CUDA=1 needs {' and '.join(lacking)}.")
    return wish != "0" and not lacking


def architecture_flags() -> list[str]:
    march = os.environ.get("IGLA_MARCH") or ("x86-64-v3" if platform.machine() in ("x86_64", "AMD64") else None)
    return [f"-march={march}"] if march else []


def op_extension():
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
