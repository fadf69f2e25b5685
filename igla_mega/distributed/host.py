"""Let megatron-core run on a machine without CUDA: gloo, CPU tensors. Inert where CUDA is.

Called once by the entry point (`prepare`), never at import. Two parts, kept apart:
`_map_cuda_to_host` answers what megatron-core asks of `torch.cuda` with the CPU's equivalent;
`_PATCHES` mends lines of the pinned megatron-core 0.16.1 that fail there. Each patch names its line.
"""

import contextlib
import ctypes
import functools
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch

MALLOC_TRIM_THRESHOLD, MALLOC_TOP_PAD, MALLOC_MMAP_MAX = -1, -2, -4  # mallopt(3), <malloc.h>


_mapped = False
"""Whether this process's torch has been mapped already: twice would map the mapping."""


def prepare() -> torch.device:
    """Make this process ready for megatron-core and return the device that it will use."""
    # Advice to the authors of these two libraries, repeated by every rank.
    warnings.filterwarnings("ignore", module=r"(megatron\.core|torch\.distributed)\.")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        return device
    global _mapped
    if not _mapped:
        _map_cuda_to_host()
        for patch in _PATCHES:
            patch()
        _mapped = True
    return torch.device("cpu")


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed pages instead of giving them back to the kernel after each large tensor.

    A training step frees and takes the same gigabyte again and again; each time the kernel must fault it in.
    Opt-in, since a process then never shrinks. The measured gain stands in `bench/results`.

    Returns:
        False where the C library is not glibc and nothing was changed.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return False
    settings = ((MALLOC_MMAP_MAX, 0), (MALLOC_TRIM_THRESHOLD, 2**31 - 1), (MALLOC_TOP_PAD, 64 * 2**20))
    return all(libc.mallopt(option, value) for option, value in settings)


def _names_cuda(device) -> bool:
    # `torch.cuda.current_device()` is an index, so a bare int means CUDA.
    return (isinstance(device, int) and not isinstance(device, bool)) or str(device).startswith("cuda")


def _on_host(constructor: Callable) -> Callable:
    """`torch.zeros(..., device="cuda", pin_memory=True)` becomes an unpinned CPU tensor."""

    @functools.wraps(constructor)
    def wrapper(*args, **kwargs):
        if kwargs.get("device") is not None and _names_cuda(kwargs["device"]):
            kwargs["device"] = "cpu"
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return constructor(*args, **kwargs)

    return wrapper


class _Inert:
    """A CUDA stream or event: on the host everything has already happened."""

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
    from torch import _dynamo  # its tables must see the genuine torch.cuda functions, so import it first
    from torch.distributed.device_mesh import DeviceMesh
    from torch.utils._device import _device_constructors

    _dynamo.config.disable = True  # mcore's jit_fuser is torch.compile: no C++ compiler run for forty tiny fusions

    cuda: Any = torch.cuda
    tensor: Any = torch.Tensor
    # One function object per name: dynamo refuses the same object under two names.
    for name in ("set_device", "synchronize", "empty_cache"):
        setattr(cuda, name, lambda *args, **kwargs: None)
    for name in ("current_stream", "default_stream"):
        setattr(cuda, name, lambda *args, **kwargs: _Inert())
    cuda.current_device = lambda: 0
    cuda.Stream, cuda.Event = type("Stream", (_Inert,), {}), type("Event", (_Inert,), {})
    cuda.stream = lambda stream: contextlib.nullcontext()

    for constructor in filter(None, _device_constructors()):
        name = constructor.__name__
        if getattr(torch, name, None) is constructor:
            setattr(torch, name, _on_host(constructor))  # type: ignore[arg-type]
    for name in ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor"):
        setattr(torch.Tensor, name, _on_host(getattr(torch.Tensor, name)))

    move, type_name = torch.Tensor.to, torch.Tensor.type

    def to(self, *args, **kwargs):
        args = tuple("cpu" if not torch.is_tensor(a) and _names_cuda(a) else a for a in args)
        if kwargs.get("device") is not None and _names_cuda(kwargs["device"]):
            kwargs["device"] = "cpu"
        return move(self, *args, **kwargs)

    def cuda_type(self, *args, **kwargs):
        # mcore's optimizers sort parameters by the *name* of their CUDA tensor type.
        name = type_name(self, *args, **kwargs)
        asked_for_name = not args and not kwargs and self.device.type == "cpu"
        return name.replace("torch.", "torch.cuda.", 1) if asked_for_name else name

    tensor.to, tensor.type = to, cuda_type
    tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]

    make_mesh = DeviceMesh.__init__

    def host_mesh(self, device_type, *args, **kwargs):
        make_mesh(self, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    DeviceMesh.__init__ = host_mesh  # type: ignore[method-assign]

    # The tracked "device" random generator is the host's.
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed))
    for module in (cuda, cuda.random):
        module.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
        module.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


def _define_te_general_gemm() -> None:
    """moe/moe_utils.py:1192: the router names `te_general_gemm`, undefined without Transformer Engine."""
    import megatron.core.transformer.moe.moe_utils as moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def _make_split_sizes_numpy() -> None:
    """moe/moe_utils.py:1091: all-to-all split sizes become numpy only when they leave a GPU."""
    import megatron.core.transformer.moe.token_dispatcher as dispatcher

    def maybe_move_tensor_to_cpu(tensor, as_numpy=False, record_stream=False):
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    dispatcher.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu


def _gather_unevenly_on_host() -> None:
    """tensor_parallel/mappings.py:146,187: gloo gathers and scatters lists of one size alone; all-to-all takes any."""
    import megatron.core.tensor_parallel.mappings as mappings
    import torch.distributed as dist

    gather, scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather_unevenly(input_, group, output_split_sizes=None, use_global_buffer=False):
        if output_split_sizes is None or group.size() == 1:
            return gather(input_, group, output_split_sizes, use_global_buffer)
        output = input_.new_empty(sum(output_split_sizes), *input_.shape[1:])
        copies = torch.cat([input_] * group.size())
        dist.all_to_all_single(output, copies, output_split_sizes, [len(input_)] * group.size(), group=group)
        return output

    def scatter_unevenly(input_, group, input_split_sizes=None, use_global_buffer=False):
        if input_split_sizes is None or group.size() == 1:
            return scatter(input_, group, input_split_sizes, use_global_buffer)
        own, size = input_split_sizes[group.rank()], group.size()
        parts = input_.new_empty(size * own, *input_.shape[1:])
        dist.all_to_all_single(parts, input_.contiguous(), [own] * size, input_split_sizes, group=group)
        return parts.view(size, own, *input_.shape[1:]).sum(0)

    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = gather_unevenly, scatter_unevenly


def _set_cuda_rng_state_on_host() -> None:
    """tensor_parallel/random.py:60: `_set_cuda_rng_state` takes a CUDA generator by index."""
    import megatron.core.tensor_parallel.random as random

    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


_PATCHES = (
    _define_te_general_gemm,
    _make_split_sizes_numpy,
    _gather_unevenly_on_host,
    _set_cuda_rng_state_on_host,
)
