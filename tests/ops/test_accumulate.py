import pytest
import torch
from devices import DEVICES

from igla_mega.ops.accumulate import accumulate_, accumulate_reference_

TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
WAYS = {"op": accumulate_, "reference": accumulate_reference_}


def random(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("term_type", TYPES)
@pytest.mark.parametrize("sum_type", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1,), (7,), (4097,), (2, 3, 5, 17), (2, 3, 5, 64), (3, 40000), (2, 1, 1), (0, 4)])
def test_sums_equal_those_of_float64_rounded_once(shape, sum_type, term_type, device):
    total = random(*shape, dtype=sum_type, device=device)
    term = random(*shape, dtype=term_type, device=device, seed=1)
    want = (total.double() + term.double()).to(sum_type)
    accumulate_([total], [term])
    assert torch.equal(total, want)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("which", WAYS)
def test_one_call_adds_tensors_of_different_shapes_and_types(which, device):
    shapes = [(2, 8, 5, 64), (2, 2, 5, 64), (2, 2, 5, 17)] * 9  # more than any table holds
    sums = [random(*shape, device=device, seed=i) for i, shape in enumerate(shapes)]
    terms = [random(*shape, dtype=TYPES[i % 3], device=device, seed=50 + i) for i, shape in enumerate(shapes)]
    want = [total + term for total, term in zip(sums, terms, strict=True)]
    WAYS[which](sums, terms)
    assert all(torch.equal(total, exact) for total, exact in zip(sums, want, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("head_size", [17, 64])
@pytest.mark.parametrize("which", WAYS)
def test_half_a_sequence_is_added_into_its_place_in_a_buffer(which, head_size, device):
    buffer = random(2, 12, 3, head_size, device=device)  # [B, S, H, D]
    term = random(2, 3, 6, head_size, dtype=torch.bfloat16, device=device, seed=1)  # [B, H, S / 2, D]
    want = buffer.clone()
    want[:, 6:] += term.transpose(1, 2)
    WAYS[which]([buffer[:, 6:].transpose(1, 2)], [term])
    assert torch.equal(buffer, want)

    want[:, :6] += term.transpose(1, 2)
    WAYS[which]([buffer[:, :6]], [term.transpose(1, 2)])
    assert torch.equal(buffer, want)


@pytest.mark.parametrize("device", DEVICES)
def test_views_at_odd_offsets_are_added_without_touching_their_neighbours(device):
    total, term = random(9001, device=device), random(9001, dtype=torch.bfloat16, device=device, seed=1)
    want = total.clone()
    want[3:8200] += term[1:8198]
    accumulate_([total[3:8200]], [term[1:8198]])
    assert torch.equal(total, want)


@pytest.mark.parametrize("device", DEVICES)
def test_a_term_may_be_expanded_and_nan_stays(device):
    total, term = torch.zeros(2, 3, 4, device=device), random(1, 3, 4, device=device)
    term[0, 1, 2] = torch.nan
    accumulate_([total], [term.expand(2, 3, 4)])
    assert total[:, 1, 2].isnan().all() and total.isnan().sum() == 2
    assert torch.equal(total[:, 0], term[:, 0].expand(2, 4))


def test_nothing_to_add_adds_nothing():
    accumulate_([], [])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TYPES)
def test_opcheck_accepts_schema_and_fake_tensors(dtype, device):
    arguments = ([random(2, 3, 5, 8, device=device)] * 2, [random(2, 3, 5, 8, dtype=dtype, device=device)] * 2)
    arguments = ([t.clone() for t in arguments[0]], arguments[1])
    torch.library.opcheck(torch.ops.igla.accumulate_, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("which", WAYS)
def test_wrong_input_is_refused_in_words(which, device):
    add = WAYS[which]
    total = random(2, 3, 4, device=device)
    for call, words in (
        (lambda: add([total], []), r"sums, terms must be of one length, got \[1, 0\]"),
        (lambda: add([total.bfloat16()], [total]), r"sums\[0\] must be float32 or float64, got bfloat16"),
        (lambda: add([total, total], [total, total.int()]), r"terms\[1\] must be float32 or bfloat16 or .*, got"),
        (lambda: add([total], [total[:1]]), r"terms\[0\] must be \[2, 3, 4\] like sums\[0\], got \[1, 3, 4\]"),
        (lambda: add([total.mT], [total.mT.contiguous()]), r"sums\[0\] must have stride 1 in its last dimension"),
        (lambda: add([total[0, 0, 0]], [total[0, 0, 0]]), r"sums\[0\] must have 1 to 4 dimensions, got 0"),
        (lambda: add([total[:1].expand(2, 3, 4)], [total]), r"sums\[0\] is written, so must not be expanded"),
    ):
        with pytest.raises(RuntimeError, match=words):
            call()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_term_on_another_device_is_refused():
    with pytest.raises(RuntimeError, match=r"terms\[0\] must be on the device of sums\[0\], got cpu"):
        accumulate_([random(4, device="cuda")], [random(4)])
