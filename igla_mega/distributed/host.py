"""Let megatron-core run on a machine without CUDA, with gloo and CPU tensors; changes nothing where CUDA is available.

The entry point calls `prepare` once; importing this module changes nothing. `_map_cuda_to_host` replaces the functions
of torch that megatron-core calls by their CPU equivalents; `megatron_patches.HOST_PATCHES` replaces the lines of
megatron-core itself that fail even then.
"""

import contextlib
import ctypes
import functools
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch

from igla_mega.distributed import megatron_patches

MALLOC_TRIM_THRESHOLD, MALLOC_TOP_PAD, MALLOC_MMAP_MAX = -1, -2, -4  # mallopt(3), <malloc.h>


_mapped = False
"""True if this process's torch has been mapped; a second mapping would wrap the wrappers of the first."""


def prepare() -> torch.device:
    """Prepare this process for megatron-core and return the device that it will use."""
    # These warnings address the authors of the two libraries, and every rank would repeat them.
    warnings.filterwarnings("ignore", module=r"(megatron\.core|torch\.distributed)\.")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        return device
    global _mapped
    if not _mapped:
        _map_cuda_to_host()
        for patch in megatron_patches.HOST_PATCHES:
            patch()
        _mapped = True
    return torch.device("cpu")


def keep_freed_memory() -> bool:
    """Make glibc keep freed pages instead of returning them to the kernel after each large tensor.

    A training step frees and allocates the same gigabyte repeatedly, and the kernel must fault the pages in each time.
    Opt-in, because the process then never shrinks. `bench/results` has the measured gain.

    Returns:
        False if the C library is not glibc and nothing was changed.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return False
    settings = ((MALLOC_MMAP_MAX, 0), (MALLOC_TRIM_THRESHOLD, 2**31 - 1), (MALLOC_TOP_PAD, 64 * 2**20))
    return all(libc.mallopt(option, value) for option, value in settings)


def _names_cuda(device) -> bool:
    """Return True if a `device` argument refers to CUDA."""
    # `torch.cuda.current_device()` is an index, so a bare int means CUDA; a bool is an int too (`non_blocking`).
    return (isinstance(device, int) and not isinstance(device, bool)) or str(device).startswith("cuda")


def _on_host(constructor: Callable) -> Callable:
    """Wrap a constructor so that `torch.zeros(..., device="cuda", pin_memory=True)` makes an unpinned CPU tensor."""

    @functools.wraps(constructor)
    def wrapper(*args, **kwargs):
        """Call the constructor with the CPU as its device."""
        if kwargs.get("device") is not None and _names_cuda(kwargs["device"]):
            kwargs["device"] = "cpu"
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return constructor(*args, **kwargs)

    return wrapper


class _Inert:
    """A stand-in for a CUDA stream or event: CPU work is complete when the call returns, so every wait is a no-op."""

    def __init__(self, *args, **kwargs):
        pass

    def __getattr__(self, name):
        return lambda *args, **kwargs: self if name == "record_event" else None

    def __eq__(self, other):
        return isinstance(other, _Inert)

    def __hash__(self):
        return 0

    def query(self) -> bool:
        return True

    def elapsed_time(self, other) -> float:
        return 0.0


def _map_cuda_to_host() -> None:
    """Replace the functions of torch that name CUDA by their CPU equivalents, for this process."""
    # dynamo builds tables of the genuine torch.cuda functions when it is imported: import it before replacing them.
    from torch import _dynamo

    # megatron-core's `jit_fuser` is torch.compile, which would run a C++ compiler for about forty tiny fusions.
    _dynamo.config.disable = True
    _map_constructors()
    _map_moves()
    _map_streams_and_generators()


def _map_streams_and_generators() -> None:
    """Replace device selection, streams, events and random generators of `torch.cuda`."""
    cuda: Any = torch.cuda
    # One function object per name: dynamo rejects the same object under two names.
    for name in ("set_device", "synchronize", "empty_cache"):
        setattr(cuda, name, lambda *args, **kwargs: None)
    for name in ("current_stream", "default_stream"):
        setattr(cuda, name, lambda *args, **kwargs: _Inert())
    cuda.current_device = lambda: 0
    cuda.Stream, cuda.Event = type("Stream", (_Inert,), {}), type("Event", (_Inert,), {})
    cuda.stream = lambda stream: contextlib.nullcontext()

    # The "device" generator, which tensor_parallel/random.py tracks by name, is the CPU's: same seeds, same draws.
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed))
    for module in (cuda, cuda.random):
        module.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
        module.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


def _map_constructors() -> None:
    """Replace every function that creates a tensor or a mesh on a device."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.utils._device import _device_constructors

    for constructor in filter(None, _device_constructors()):
        name = constructor.__name__
        if getattr(torch, name, None) is constructor:
            setattr(torch, name, _on_host(constructor))  # type: ignore[arg-type]
    for name in ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor"):
        setattr(torch.Tensor, name, _on_host(getattr(torch.Tensor, name)))

    make_mesh = DeviceMesh.__init__

    def host_mesh(self, device_type, *args, **kwargs):
        make_mesh(self, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    DeviceMesh.__init__ = host_mesh  # type: ignore[method-assign]


def _map_moves() -> None:
    """Replace the methods of tensors and modules that move them to CUDA or report their type there."""
    tensor: Any = torch.Tensor
    move, type_name = torch.Tensor.to, torch.Tensor.type

    def to(self, *args, **kwargs):
        """Convert a tensor's type; a move to CUDA leaves it on the CPU."""
        args = tuple("cpu" if not torch.is_tensor(a) and _names_cuda(a) else a for a in args)
        if kwargs.get("device") is not None and _names_cuda(kwargs["device"]):
            kwargs["device"] = "cpu"
        return move(self, *args, **kwargs)

    def cuda_type(self, *args, **kwargs):
        """Return a CPU tensor's type under the name of the CUDA type, or convert it as `type` does."""
        # optimizer/optimizer.py:671,690 and distrib_optimizer.py:361 compare this *name* with torch.cuda.FloatTensor
        # to group the parameters, and raise TypeError on any other.
        name = type_name(self, *args, **kwargs)
        is_query = not args and not kwargs and self.device.type == "cpu"
        return name.replace("torch.", "torch.cuda.", 1) if is_query else name

    tensor.to, tensor.type = to, cuda_type
    tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
