import pytest
import torch
from devices import DEVICES

from igla_mega.ops.fisher import fisher_accumulate_, fisher_accumulate_reference_

SIZES = [1, 3, 4, 7, 64, 4095, 4096, 4097, 50001]
PAIRS = [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.float64, torch.float64)]
WAYS = {
    "op": fisher_accumulate_,
    "reference": lambda f, g, w, zero_grads=False: fisher_accumulate_reference_(f, g, w, zero_grads),
}


def case(sizes, fisher_type=torch.float32, grad_type=torch.float32, device="cpu", offset=0):
    """Return nonzero Fisher tensors and gradients, each starting `offset` elements into its memory."""
    generator = torch.Generator().manual_seed(0)
    fisher = [torch.rand(size + offset, generator=generator).to(fisher_type).to(device)[offset:] for size in sizes]
    grads = [torch.randn(size + offset, generator=generator).to(grad_type).to(device)[offset:] for size in sizes]
    return fisher, grads


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize(("fisher_type", "grad_type"), PAIRS)
@pytest.mark.parametrize("which", WAYS)
def test_fisher_equals_the_weighted_sum_of_squares_in_float64(which, fisher_type, grad_type, offset, device):
    fisher, grads = case(SIZES, fisher_type, grad_type, device, offset)
    want = [f.double() + 0.3 * g.double() ** 2 for f, g in zip(fisher, grads, strict=True)]
    before = [g.clone() for g in grads]
    WAYS[which](fisher, grads, 0.3)
    tolerance = 1e-15 if fisher_type == torch.float64 else 2e-7
    for found, exact in zip(fisher, want, strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(grads, before, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("grad_type", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", WAYS)
def test_gradients_are_zeroed_on_request_and_their_neighbours_are_not(which, grad_type, offset, device):
    fisher, grads = case([4097], grad_type=grad_type, device=device)
    want = fisher[0].clone()
    WAYS[which]([want[offset:-1]], [grads[0].clone()[offset:-1]], 0.5)
    ends = grads[0][:offset].clone(), grads[0][-1].clone()
    WAYS[which]([fisher[0][offset:-1]], [grads[0][offset:-1]], 0.5, zero_grads=True)
    assert torch.equal(fisher[0], want)
    assert (grads[0][offset:-1] == 0).all()
    assert torch.equal(grads[0][:offset], ends[0]) and grads[0][-1] == ends[1]


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_too_small_for_half_precision_squares_still_count(device):
    fisher = [torch.zeros(100, device=device)]
    fisher_accumulate_(fisher, [torch.full((100,), 1e-10, dtype=torch.bfloat16, device=device)], 1.0)
    torch.testing.assert_close(fisher[0], torch.full_like(fisher[0], 1e-20), rtol=1e-2, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_many_tensors_of_any_shape_go_in_one_call_and_repeat_bit_for_bit(device):
    shapes = [(1,), (), (3, 5), (0,), (2, 3, 4), (70000,)] * 30
    grads = [
        torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(device) for i, shape in enumerate(shapes)
    ]
    seen = []
    for _ in range(3):
        fisher = [torch.ones(shape, device=device) for shape in shapes]
        fisher_accumulate_(fisher, grads, 2.0)
        seen.append(fisher)
    for found, again, grad in zip(seen[0], seen[2], grads, strict=True):
        assert torch.equal(found, again)
        torch.testing.assert_close(found, 1 + 2 * grad**2)


@pytest.mark.parametrize("device", DEVICES)
def test_nan_and_infinity_show(device):
    fisher, grads = case([20], device=device)
    grads[0][3], grads[0][4] = torch.nan, -torch.inf
    fisher_accumulate_(fisher, grads, 1.0)
    assert fisher[0][3].isnan() and fisher[0][4] == torch.inf and fisher[0].isfinite().sum() == 18


def test_no_tensor_at_all_is_no_work():
    fisher_accumulate_([], [], 1.0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("fisher_type", "grad_type"), PAIRS)
def test_opcheck_accepts_schema_and_fake_tensors(fisher_type, grad_type, device):
    arguments = (*case([5, 64], fisher_type, grad_type, device), 0.5, True)
    torch.library.opcheck(torch.ops.igla.fisher_accumulate_, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("which", WAYS)
def test_wrong_input_is_refused_in_words(which, device):
    accumulate = WAYS[which]
    fisher, grads = case([64, 64], device=device)
    for call, words in (
        (lambda: accumulate(fisher, grads[:1], 1.0), r"fisher, grads must be of one length, got \[2, 1\]"),
        (
            lambda: accumulate([f.bfloat16() for f in fisher], grads, 1.0),
            r"fisher\[0\] must be float32 or float64, got",
        ),
        (lambda: accumulate(fisher, [grads[0], grads[1].double()], 1.0), r"grads\[1\] must be .*, got float64"),
        (lambda: accumulate([f.double() for f in fisher], grads, 1.0), r"grads\[0\] must be float64, got float32"),
        (
            lambda: accumulate(fisher, [g[1:] for g in grads], 1.0),
            r"grads\[0\] must be \[64\] like fisher\[0\], got \[63\]",
        ),
        (lambda: accumulate([fisher[0][::2]], [grads[0][::2]], 1.0), r"fisher\[0\] must be contiguous"),
    ):
        with pytest.raises(RuntimeError, match=words):
            call()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gradient_on_another_device_is_refused():
    with pytest.raises(RuntimeError, match=r"grads\[0\] must be on the device of fisher\[0\], got cpu"):
        fisher_accumulate_([torch.zeros(4, device="cuda")], [torch.zeros(4)], 1.0)
