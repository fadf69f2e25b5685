"""megatron-core without CUDA: what is changed, and when."""

from concurrent.futures import ProcessPoolExecutor

import pytest
import ranks
import torch

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


def test_glibc_takes_the_settings_that_keep_freed_memory():
    assert in_fresh_process(host.keep_freed_memory) is True


def keep_without_glibc():
    def no_such_library(name):
        raise OSError(name)

    host.ctypes.CDLL = no_such_library
    return host.keep_freed_memory()


def test_without_glibc_keeping_freed_memory_says_no():
    assert in_fresh_process(keep_without_glibc) is False
