"""Tests of norms, SwiGLU and rotary positions: csrc's kernels and references against plain formulas in float64."""

import pytest
import torch
from torch.nn import functional as F

from igla_mega.ops import pointwise

EPSILON = 1e-5
# Roundings of a product of a few factors, relative to the largest value.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}
TYPES = list(TOLERANCE)
WIDTHS = [2, 16, 50, 64, 200]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def turned(x, angles):
    first, second = x.chunk(2, -1)
    return x * angles.double().cos() + torch.cat((-second, first), -1) * angles.double().sin()


def assert_same(ours, exact, dtype):
    assert ours.dtype == dtype
    largest = exact.abs().max().clamp(min=1e-30)
    assert ((ours.double() - exact).abs().max() / largest).item() < TOLERANCE[dtype]


def compare(ours, exact, dtype, *inputs):
    """Return outputs and gradients of two functions of the same inputs."""
    given = [x.to(dtype).requires_grad_() for x in inputs]
    wide = [x.detach().double().requires_grad_() for x in given]
    out, expected = ours(*given), exact(*wide)
    upstream = random(*expected.shape, seed=9).to(dtype)
    out.backward(upstream)
    expected.backward(upstream.double())
    assert_same(out, expected, dtype)
    for x, y in zip(given, wide, strict=True):
        assert_same(x.grad, y.grad, dtype)


@pytest.fixture(params=["kernel", "reference"])
def ways(request, monkeypatch):
    if request.param == "reference":
        monkeypatch.setattr(pointwise, "_call", lambda name, *args: pointwise._OPS[name][1](*args))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", TYPES)
def test_the_norm_and_its_gradients_are_those_of_the_formula(dtype, width, ways):
    # 130 rows: three sums of the weight's gradient, the last of them a short one.
    compare(
        lambda x, w: pointwise.rms_norm(x, w, EPSILON),
        lambda x, w: F.rms_norm(x, (width,), w, EPSILON),
        dtype,
        random(65, 2, width),
        1 + 0.1 * random(width, seed=1),
    )


@pytest.mark.parametrize("width", [64, 4096, 100_003])
def test_a_norm_is_as_exact_as_torchs_at_any_width(width):
    x = random(200, width)
    exact = (x.double().square().mean(-1) + EPSILON).rsqrt()
    torchs = torch.rsqrt(x.square().mean(-1) + EPSILON)
    ours = torch.ops.igla.rms_norm(x, torch.ones(width), EPSILON)[1]
    ours_off, torchs_off = (((scale - exact) / exact).square().mean().sqrt() for scale in (ours, torchs))
    assert ours_off <= 1.1 * torchs_off


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", TYPES)
def test_swiglu_and_its_gradient_are_those_of_the_formula(dtype, width, ways):
    compare(pointwise.swiglu, lambda x: F.silu(x[..., :width]) * x[..., width:], dtype, 3 * random(7, 3, 2 * width))


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", TYPES)
def test_positions_turn_pairs_half_a_head_apart(dtype, width, rows, ways):
    half = 100 * random(5, rows, 1, width // 2)
    angles = torch.cat((half, half), -1)
    compare(lambda x: pointwise.rotate(x, angles), lambda x: turned(x, angles), dtype, random(5, 2, 3, width, seed=2))


def test_positions_turn_a_view_of_the_stacked_projections():
    stacked, angles = random(6, 2, 3 * 8), torch.cat(2 * [random(6, 1, 1, 4)], -1)
    view = stacked.view(6, 2, 3, 8)[:, :, 1:2]
    assert not view.is_contiguous()
    assert torch.equal(pointwise.rotate(view, angles), pointwise.rotate(view.contiguous(), angles))


def test_no_result_depends_on_the_number_of_threads():
    x, weight, upstream = random(3000, 48), random(48, seed=1), random(3000, 48, seed=2)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            given = x.clone().requires_grad_(), weight.clone().requires_grad_()
            pointwise.rms_norm(*given, EPSILON).backward(upstream)
            found.append([t.grad for t in given])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_large_gates_neither_overflow_nor_become_nan():
    gates = torch.tensor([-1e4, -90.0, 0.0, 90.0, 1e4]).requires_grad_()
    out = pointwise.swiglu(torch.stack((gates, torch.ones(5)), 1))
    out.sum().backward()
    torch.testing.assert_close(out.flatten(), F.silu(gates.detach()))
    assert torch.isfinite(gates.grad).all()


def test_an_expert_without_tokens_is_no_trouble():
    x = torch.empty(0, 8, requires_grad=True)
    out = pointwise.swiglu(x)
    out.sum().backward()
    assert out.shape == (0, 4) and x.grad.shape == (0, 8)


def test_other_types_are_torchs_own():
    x, weight = random(4, 6).double(), random(6).double()
    assert torch.equal(pointwise.rms_norm(x, weight, EPSILON), F.rms_norm(x, (6,), weight, EPSILON))
    assert pointwise.swiglu(x).dtype == torch.float64


def test_a_wrong_shape_is_refused():
    with pytest.raises(RuntimeError, match="one entry for each of the 6 columns"):
        torch.ops.igla.rms_norm(random(4, 6), random(5), EPSILON)
    with pytest.raises(RuntimeError, match="even number of columns"):
        torch.ops.igla.swiglu(random(4, 5))
    with pytest.raises(RuntimeError, match="half as wide as x"):
        torch.ops.igla.swiglu_gradient(random(4, 5), random(4, 12))
    with pytest.raises(RuntimeError, match="cos and sin must be"):
        torch.ops.igla.rotate(random(4, 1, 2, 8), random(4, 1, 1, 8), random(4, 1, 1, 8))
