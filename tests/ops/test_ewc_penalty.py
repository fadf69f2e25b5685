import pytest
import torch
from devices import DEVICES
from torch import Tensor

from igla_mega.ops.ewc_penalty import ewc_pull_, ewc_pull_reference_

SIZES = [1, 3, 4, 1023, 4095, 4096, 4097, 50001]
LAMBDA = 30.0
WAYS = {"op": ewc_pull_, "reference": ewc_pull_reference_}
Case = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


def case(sizes, dtype=torch.float32, grad_type=None, device="cpu", offset=0) -> Case:
    """Return gradients, weights near their anchors, anchors and Fisher, each `offset` elements into its memory."""
    generator = torch.Generator().manual_seed(0)

    def tensors(scale: float, to: torch.dtype) -> list[Tensor]:
        made = [scale * torch.randn(s + offset, generator=generator, dtype=torch.float64) for s in sizes]
        return [t.to(to).to(device)[offset:] for t in made]

    anchors = tensors(1.0, dtype)
    weights = [a + d for a, d in zip(anchors, tensors(0.1, dtype), strict=True)]
    if offset:
        weights = [torch.cat([w.new_zeros(offset), w])[offset:] for w in weights]
    return tensors(1.0, grad_type or dtype), weights, anchors, [f.abs_() for f in tensors(1.0, dtype)]


def by_autograd(grads: list[Tensor], weights: list[Tensor], anchors: list[Tensor], fisher: list[Tensor]):
    """Return the penalty, its gradient and the three sums, computed in fp64."""
    leaves = [w.double().requires_grad_() for w in weights]
    terms = [f.double() * (w - a.double()) ** 2 for w, a, f in zip(leaves, anchors, fisher, strict=True)]
    penalty = LAMBDA / 2 * torch.stack([t.sum() for t in terms]).sum()
    pulls = torch.autograd.grad(penalty, leaves)
    squares = [sum(t.double().square().sum() for t in tensors) for tensors in (grads, pulls)]
    return [g.double() + p for g, p in zip(grads, pulls, strict=True)], torch.stack([penalty.detach(), *squares])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("which", WAYS)
def test_pull_and_value_equal_those_of_autograd_in_float64(which, dtype, offset, device):
    tensors = case(SIZES, dtype, device=device, offset=offset)
    want, want_sums = by_autograd(*tensors)
    sums = WAYS[which](*tensors, LAMBDA)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    for grad, exact in zip(tensors[0], want, strict=True):
        # Relative to what is added: grad + pull may cancel.
        torch.testing.assert_close(grad.double(), exact, rtol=tolerance, atol=tolerance * exact.abs().max().item())
    assert sums.dtype == torch.float64 and sums.shape == (3,)
    torch.testing.assert_close(sums, want_sums, rtol=tolerance, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", SIZES)
def test_every_size_alone_and_unaligned_in_every_tensor_differently(size, device):
    tensors = [
        [torch.cat([t[0].new_zeros(shift), t[0]])[shift:]] for shift, t in enumerate(case([size], device=device))
    ]
    want, want_sums = by_autograd(*tensors)
    sums = ewc_pull_(*tensors, LAMBDA)
    torch.testing.assert_close(tensors[0][0].double(), want[0], rtol=1e-6, atol=1e-6 * want[0].abs().max().item())
    torch.testing.assert_close(sums, want_sums, rtol=1e-6, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("which", WAYS)
def test_bf16_gradients_are_rounded_once(which, offset, device):
    tensors = case([4097], grad_type=torch.bfloat16, device=device, offset=offset)
    want, want_sums = by_autograd(*tensors)
    sums = WAYS[which](*tensors, LAMBDA)
    assert tensors[0][0].dtype == torch.bfloat16
    torch.testing.assert_close(tensors[0][0].double(), want[0], rtol=2**-8, atol=1e-5)
    torch.testing.assert_close(sums, want_sums, rtol=1e-6, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("grad_type", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", WAYS)
def test_at_the_anchor_nothing_moves_and_the_penalty_is_zero(which, grad_type, device):
    grads, _, anchors, fisher = case(SIZES, grad_type=grad_type, device=device)
    before = [g.clone() for g in grads]
    sums = WAYS[which](grads, [a.clone() for a in anchors], anchors, fisher, 1e9)
    assert sums[0] == 0 and sums[2] == 0 and sums[1] > 0
    assert all(torch.equal(a, b) for a, b in zip(grads, before, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_only_the_gradients_are_written_and_nothing_beside_them(device):
    tensors = [t[0] for t in case([9000], device=device)]
    before = [t.clone() for t in tensors]
    ewc_pull_(*[[t[5:8600]] for t in tensors], LAMBDA)
    assert all(torch.equal(a, b) for a, b in zip(tensors[1:], before[1:], strict=True))
    assert torch.equal(tensors[0][:5], before[0][:5]) and torch.equal(tensors[0][8600:], before[0][8600:])
    assert not torch.equal(tensors[0][5:8600], before[0][5:8600])


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_and_sums_repeat_bit_for_bit(device):
    seen = []
    for _ in range(3):
        tensors = case([70001, 3, 250000] * 3, device=device)
        seen.append((ewc_pull_(*tensors, LAMBDA), *tensors[0]))
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))


def test_the_number_of_threads_changes_no_bit_on_a_cpu():
    threads = torch.get_num_threads()
    seen = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            seen.append(ewc_pull_(*case([250000, 17, 70001]), LAMBDA))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])


@pytest.mark.parametrize("device", DEVICES)
def test_the_value_of_many_elements_equals_the_sum_in_float64(device):
    size = 3_000_000
    tensors = case([size], device=device)
    drift = tensors[1][0].double() - tensors[2][0].double()
    want = LAMBDA / 2 * (tensors[3][0].double() * drift**2).sum()
    torch.testing.assert_close(ewc_pull_(*tensors, LAMBDA)[0], want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_more_tensors_than_any_table_holds_go_in_one_call(device):
    tensors = case([5, 0, 130] * 100, device=device)
    want, want_sums = by_autograd(*tensors)
    sums = ewc_pull_(*tensors, LAMBDA)
    torch.testing.assert_close(sums, want_sums, rtol=1e-6, atol=0)
    for grad, exact in zip(tensors[0], want, strict=True):
        torch.testing.assert_close(grad.double(), exact, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("culprit", range(4))
def test_nan_shows_in_the_gradient_and_in_the_sums(culprit, device):
    tensors = case([100], device=device)
    tensors[culprit][0][7] = torch.nan
    sums = ewc_pull_(*tensors, LAMBDA)
    assert tensors[0][0][7].isnan() and tensors[0][0].isnan().sum() == 1
    assert sums.isnan().tolist() == ([False, True, False] if culprit == 0 else [True, False, True])


def test_no_tensor_at_all_gives_zeros():
    assert torch.equal(ewc_pull_([], [], [], [], 1.0), torch.zeros(3, dtype=torch.float64))


def test_parameters_that_require_grad_leave_no_trace_in_autograd():
    weight = torch.nn.Parameter(torch.ones(5))
    grad = torch.zeros(5)
    sums = ewc_pull_([grad], [weight], [torch.zeros(5)], [torch.ones(5)], 2.0)
    assert not sums.requires_grad and not grad.requires_grad
    assert torch.equal(grad, torch.full((5,), 2.0)) and sums.tolist() == [5.0, 0.0, 20.0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck_accepts_schema_and_fake_tensors(dtype, device):
    arguments = (*case([5, 64], dtype, device=device), LAMBDA)
    torch.library.opcheck(torch.ops.igla.ewc_pull_, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("which", WAYS)
def test_wrong_input_is_refused_in_words(which, device):
    pull = WAYS[which]
    g, w, a, f = case([64, 64], device=device)
    doubles = [t.double() for t in g]
    for call, words in (
        (
            lambda: pull(g, w, a, f[:1], 1.0),
            r"grads, weights, anchors, fisher must be of one length, got \[2, 2, 2, 1\]",
        ),
        (
            lambda: pull(g, [t.bfloat16() for t in w], a, f, 1.0),
            r"weights\[0\] must be float32 or float64, got bfloat16",
        ),
        (lambda: pull(g, w, [t.bfloat16() for t in a], f, 1.0), r"anchors\[0\] must be float32, got bfloat16"),
        (lambda: pull(g, w, a, [f[0], f[1].double()], 1.0), r"fisher\[1\] must be float32, got float64"),
        (lambda: pull(doubles, w, a, f, 1.0), r"grads\[0\] must be float32 or bfloat16, got float64"),
        (lambda: pull(g, w, a, [t[1:] for t in f], 1.0), r"fisher\[0\] must be \[64\] like weights\[0\], got \[63\]"),
        (
            lambda: pull([g[0].view(8, 8).T], [w[0].view(8, 8)], [a[0].view(8, 8)], [f[0].view(8, 8)], 1.0),
            r"grads\[0\] must be contiguous",
        ),
    ):
        with pytest.raises(RuntimeError, match=words):
            call()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_an_anchor_on_another_device_is_refused():
    g, w, a, f = case([64], device="cuda")
    with pytest.raises(RuntimeError, match=r"anchors\[0\] must be on the device of weights\[0\], got cpu"):
        ewc_pull_(g, w, [a[0].cpu()], f, 1.0)
