"""Every change this package makes to megatron-core's own functions, in one file; written for megatron-core 0.16.1.

`use_rotary_kernel` and `define_te_general_gemm` apply on every device. The other functions in `HOST_PATCHES` apply on a
machine without CUDA alone: `host.prepare` calls them there, and on CUDA megatron-core's own lines run unchanged. Each
docstring names the lines that it replaces, relative to `megatron/core`. megatron-core is imported inside the functions,
because `host.prepare` must map `torch.cuda` to the CPU before megatron-core binds any of it.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def use_rotary_kernel(kernel: Callable[..., Tensor]) -> None:
    """Replace the function behind `apply_rope_fusion` by `kernel`, on every device.

    models/common/embeddings/rope_utils.py:21 binds Transformer Engine's kernel, or None where that package is missing.
    transformer_config.py:1549 then rejects `apply_rope_fusion`, hence call this before a `TransformerConfig` is built.
    Transformer Engine's kernel is replaced too: it takes one table of angles for the whole batch, while packed rows
    need the positions of each document.

    Args:
        kernel: called with x [S, B, H, D], the angles, and `interleaved`, as rope_utils.py:287 does.
    """
    from megatron.core.models.common.embeddings import rope_utils

    rope_utils.fused_apply_rotary_pos_emb = kernel


def define_te_general_gemm() -> None:
    """Define the name `te_general_gemm` that the router's product compares with None.

    transformer/moe/moe_utils.py:34 imports it from Transformer Engine in a `try`; its `except` leaves it undefined, so
    line 1192 raises NameError. None selects the plain `torch.mm` of line 1196. May be called more than once.
    """
    import megatron.core.transformer.moe.moe_utils as moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def _make_split_sizes_numpy() -> None:
    """Convert the split sizes of the token dispatcher's all-to-all to numpy on the CPU too.

    transformer/moe/moe_utils.py:1093 converts only tensors that leave a GPU; a CPU tensor is returned as it is, and
    token_dispatcher.py:876-895 would then pass tensors where `all_to_all_single` takes lists of numbers.
    """
    import megatron.core.transformer.moe.token_dispatcher as dispatcher

    def maybe_move_tensor_to_cpu(tensor, as_numpy=False, record_stream=False):
        """Return the tensor, as numpy where that is requested; there is no stream to record."""
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    # In the dispatcher, not in `moe_utils`: token_dispatcher.py:31 holds its own reference to the function.
    dispatcher.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu


def _gather_unevenly_on_host() -> None:
    """Gather and reduce-scatter parts of different sizes over gloo.

    tensor_parallel/mappings.py:146 and 187 use `all_gather` and `reduce_scatter` with lists of different sizes. NCCL
    takes those; gloo requires one size for all. gloo's all-to-all takes any sizes, so both are built on it. The sum
    runs in rank order in one tensor, so that every run adds in the same order.
    """
    import megatron.core.tensor_parallel.mappings as mappings
    import torch.distributed as dist

    gather, scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather_unevenly(input_, group, output_split_sizes=None, use_global_buffer=False):
        """Return the ranks' parts concatenated; each rank sends its whole part to every other."""
        if output_split_sizes is None or group.size() == 1:
            return gather(input_, group, output_split_sizes, use_global_buffer)
        output = input_.new_empty(sum(output_split_sizes), *input_.shape[1:])
        copies = torch.cat([input_] * group.size())
        dist.all_to_all_single(output, copies, output_split_sizes, [len(input_)] * group.size(), group=group)
        return output

    def scatter_unevenly(input_, group, input_split_sizes=None, use_global_buffer=False):
        """Return this rank's part of the sum over the ranks."""
        if input_split_sizes is None or group.size() == 1:
            return scatter(input_, group, input_split_sizes, use_global_buffer)
        rows, size = input_split_sizes[group.rank()], group.size()
        parts = input_.new_empty(size * rows, *input_.shape[1:])
        dist.all_to_all_single(parts, input_.contiguous(), [rows] * size, input_split_sizes, group=group)
        return parts.view(size, rows, *input_.shape[1:]).sum(0)

    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = gather_unevenly, scatter_unevenly


def _set_cuda_rng_state_on_host() -> None:
    """Set the CPU's generator where megatron-core sets the CUDA generator of an index.

    tensor_parallel/random.py:72 indexes `torch.cuda.default_generators`, a tuple that is empty without CUDA.
    `host._map_cuda_to_host` makes the CPU's generator the device's, so that this is the state that was read.
    """
    import megatron.core.tensor_parallel.random as random

    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


HOST_PATCHES = (
    define_te_general_gemm,
    _make_split_sizes_numpy,
    _gather_unevenly_on_host,
    _set_cuda_rng_state_on_host,
)
"""Changes that megatron-core needs on a machine without CUDA; each may be called once."""
