"""megatron-core without CUDA: what is changed, when, and that each patch is still needed by the pinned version."""

import datetime
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import ranks
import torch
import torch.distributed as dist

from igla_mega.distributed import host


def in_fresh_process(function, *args):
    """Call it where torch and megatron-core are imported and `host.prepare` has not run."""
    with ProcessPoolExecutor(1, mp_context=ranks._context) as pool:
        return pool.submit(function, *args).result(60)


def attributes() -> dict:
    """Everything that `prepare` could have replaced."""
    import megatron.core.tensor_parallel.random as random
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.token_dispatcher as dispatcher
    from torch.distributed.device_mesh import DeviceMesh

    places = (torch, torch.Tensor, torch.cuda, torch.cuda.random, torch.nn.Module, DeviceMesh)
    places += (random, moe_utils, dispatcher)
    return {(place.__name__, name): value for place in places for name, value in vars(place).items()}


def differences(before: dict) -> set:
    after = attributes()
    return {key for key in before.keys() | after.keys() if before.get(key) is not after.get(key)}


def prepare_with_cuda():
    chosen = []
    torch.cuda.is_available = lambda: True
    torch.cuda.set_device = chosen.append
    before = attributes()
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("LOCAL_RANK", "3")
        device = host.prepare()
    return device, chosen, differences(before)


def test_where_cuda_is_nothing_is_changed_and_the_rank_gets_its_device():
    device, chosen, changed = in_fresh_process(prepare_with_cuda)
    assert device == torch.device("cuda", 3) and chosen == [device]
    assert changed == set()


def import_again():
    import importlib

    before = attributes()
    importlib.reload(host)
    return differences(before)


def test_importing_host_changes_nothing():
    assert in_fresh_process(import_again) == set()


def prepare_twice():
    before = attributes()
    assert host.prepare() == torch.device("cpu")
    first, after_first = differences(before), attributes()
    assert host.prepare() == torch.device("cpu")
    return first, differences(after_first)


def test_a_second_call_changes_nothing_more():
    first, second = in_fresh_process(prepare_twice)
    assert ("torch", "zeros") in first and ("Tensor", "to") in first
    assert second == set()


def tensors_that_name_cuda():
    host.prepare()
    weights = torch.zeros(2, device="cuda", pin_memory=True)
    return [
        str(t.device)
        for t in (
            weights,
            weights.new_empty(3, device="cuda:0"),
            weights.to("cuda"),
            weights.to(device=torch.cuda.current_device()),
            weights.cuda(),
            torch.arange(3, device=torch.device("cuda", 0)),
            torch.nn.Linear(2, 2).cuda().weight,
        )
    ] + [weights.to(torch.bfloat16).dtype, torch.ones(2).to(weights.to(torch.float64)).dtype, weights.type()]


def test_a_tensor_that_names_cuda_is_made_on_the_host_and_types_stay():
    *devices, narrow, wide, type_name = in_fresh_process(tensors_that_name_cuda)
    assert devices == ["cpu"] * 7
    assert (narrow, wide) == (torch.bfloat16, torch.float64)
    assert type_name == "torch.cuda.FloatTensor"


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
    "_define_te_general_gemm": router_gates_without_transformer_engine,
    "_make_split_sizes_numpy": split_sizes_become_numpy,
    "_set_cuda_rng_state_on_host": random_state_is_set,
}


def without_and_with(patch_name: str) -> tuple[bool, bool]:
    host._map_cuda_to_host()
    for other in host._PATCHES:
        if other.__name__ != patch_name:
            other()
    without = WORKS[patch_name]()
    getattr(host, patch_name)()
    return without, WORKS[patch_name]()


@pytest.mark.parametrize("patch_name", [patch.__name__ for patch in host._PATCHES])
def test_the_pinned_megatron_core_still_needs_this_patch(patch_name):
    without, with_patch = in_fresh_process(without_and_with, patch_name)
    assert with_patch, "the patch does not mend it"
    assert not without, f"megatron-core does it by itself: remove {patch_name}"


def test_glibc_takes_the_settings_that_keep_freed_memory():
    assert in_fresh_process(host.keep_freed_memory) is True


def keep_without_glibc():
    def no_such_library(name):
        raise OSError(name)

    host.ctypes.CDLL = no_such_library
    return host.keep_freed_memory()


def test_without_glibc_keeping_freed_memory_says_no():
    assert in_fresh_process(keep_without_glibc) is False
