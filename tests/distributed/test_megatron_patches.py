"""Each patch of megatron-core is still needed by the pinned version, and repairs what fails there."""

import datetime
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import ranks
import torch
import torch.distributed as dist

from igla_mega.config.features import Moe
from igla_mega.distributed import host, megatron_patches


def in_fresh_process(function, *args):
    """Call it where torch and megatron-core are imported and `host.prepare` has not run."""
    with ProcessPoolExecutor(1, mp_context=ranks._context) as pool:
        return pool.submit(function, *args).result(60)


def router_gates_without_transformer_engine() -> bool:
    from megatron.core.transformer.moe.moe_utils import RouterGatingLinearFunction

    tokens, weight = torch.randn(3, 4), torch.randn(2, 4)
    try:
        gates = RouterGatingLinearFunction.apply(tokens, weight, None, torch.float32)
    except NameError:
        return False
    return torch.equal(gates, tokens @ weight.t())


def split_sizes_become_numpy() -> bool:
    import megatron.core.transformer.moe.token_dispatcher as dispatcher

    sizes = torch.tensor([1, 2])
    moved = dispatcher.maybe_move_tensor_to_cpu(sizes, as_numpy=True)
    assert dispatcher.maybe_move_tensor_to_cpu(sizes) is sizes
    assert dispatcher.maybe_move_tensor_to_cpu(None, as_numpy=True) is None
    return isinstance(moved, np.ndarray)


def random_state_is_set() -> bool:
    import megatron.core.tensor_parallel.random as random

    state = torch.get_rng_state()
    drawn = torch.rand(4)
    try:
        random._set_cuda_rng_state(state)
    except (RuntimeError, AssertionError, IndexError, AttributeError):
        return False
    return torch.equal(torch.rand(4), drawn)


def gathered(rank: int, folder: str, answers) -> None:
    import megatron.core.tensor_parallel.mappings as mappings

    timeout = datetime.timedelta(seconds=20)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timeout)
    own = torch.full((rank + 1, 1), float(rank))
    try:
        whole = mappings._gather_along_first_dim(own, dist.group.WORLD, [1, 2])
        summed = mappings._reduce_scatter_along_first_dim(whole, dist.group.WORLD, [1, 2])
        answers.put(whole.flatten().tolist() == [0.0, 1.0, 1.0] and torch.equal(summed, 2 * own))
    except RuntimeError:
        answers.put(False)


def uneven_parts_are_gathered() -> bool:
    fork = multiprocessing.get_context("fork")
    answers = fork.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        ranks_of_two = [fork.Process(target=gathered, args=(rank, folder, answers)) for rank in range(2)]
        for process in ranks_of_two:
            process.start()
        for process in ranks_of_two:
            process.join()
    return answers.get() and answers.get()


WORKS = {
    "_gather_unevenly_on_host": uneven_parts_are_gathered,
    "define_te_general_gemm": router_gates_without_transformer_engine,
    "_make_split_sizes_numpy": split_sizes_become_numpy,
    "_set_cuda_rng_state_on_host": random_state_is_set,
}


def without_and_with(patch_name: str) -> tuple[bool, bool]:
    host._map_cuda_to_host()
    for other in megatron_patches.HOST_PATCHES:
        if other.__name__ != patch_name:
            other()
    without = WORKS[patch_name]()
    getattr(megatron_patches, patch_name)()
    return without, WORKS[patch_name]()


@pytest.mark.parametrize("patch_name", [patch.__name__ for patch in megatron_patches.HOST_PATCHES])
def test_the_pinned_megatron_core_still_needs_this_patch(patch_name):
    without, with_patch = in_fresh_process(without_and_with, patch_name)
    assert with_patch, "the patch does not repair it"
    assert not without, f"megatron-core does it by itself: remove {patch_name}"


def router_of_a_spec_gates() -> bool:
    from igla_mega.model.experts import use_experts

    host._map_cuda_to_host()
    layer = SimpleNamespace(submodules=SimpleNamespace(mlp=SimpleNamespace(submodules=SimpleNamespace())))
    use_experts(layer, Moe(num_experts=2, num_experts_per_tok=1), grouped=False)
    return router_gates_without_transformer_engine()


def test_a_mixture_of_experts_needs_no_patch_of_the_host_for_its_router():
    """As on a GPU without Transformer Engine, where `HOST_PATCHES` do not apply."""
    assert in_fresh_process(router_of_a_spec_gates)


def fused_rotary_kernel():
    from megatron.core.models.common.embeddings import rope_utils

    kernel = object()
    megatron_patches.use_rotary_kernel(kernel)
    return rope_utils.fused_apply_rotary_pos_emb is kernel


def test_rotary_positions_are_turned_by_the_given_kernel():
    assert in_fresh_process(fused_rotary_kernel)
