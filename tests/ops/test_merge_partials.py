import itertools

import pytest
import torch
from devices import DEVICES
from torch import Tensor

from igla_mega.ops.merge_partials import merge_partials, merge_partials_reference


def by_reference(outs, lses, *, out=None, lse=None, zero_means_empty=False):
    out = torch.empty_like(outs[0], dtype=lses[0].dtype) if out is None else out
    lse = torch.empty_like(lses[0]) if lse is None else lse
    merge_partials_reference(outs, lses, out, lse, zero_means_empty)
    return out, lse


MERGES = {"op": merge_partials, "reference": by_reference}


def attention(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Attend with one softmax in fp64; return out [B, H, S, D] and lse [B, H, S]."""
    return scores.softmax(-1) @ values, scores.logsumexp(-1)


def case(num_partials: int, head_size: int = 64, rows: int = 13, spread: float = 1.0, seed: int = 0, device="cpu"):
    """Return fp64 partials over disjoint keys of different scales, and attention over all of them."""
    generator = torch.Generator().manual_seed(seed)
    keys = 5 * num_partials
    scores = torch.randn(2, 3, rows, keys, generator=generator, dtype=torch.float64)
    scores += spread * torch.randn(2, 3, rows, num_partials, generator=generator).repeat_interleave(5, -1)
    values = torch.randn(2, 3, keys, head_size, generator=generator, dtype=torch.float64)
    scores, values = scores.to(device), values.to(device)
    parts = [attention(s, v) for s, v in zip(scores.split(5, -1), values.split(5, -2), strict=True)]
    return [out for out, _ in parts], [lse for _, lse in parts], *attention(scores, values)


def narrowed(outs: list[Tensor], lses: list[Tensor], *types: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    return [o.to(t) for o, t in zip(outs, itertools.cycle(types), strict=False)], [lse.float() for lse in lses]


def exact_merge(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Apply the formula in fp64 to the rounded partials."""
    scores = torch.stack(lses).double()
    lse = scores.logsumexp(0)
    return ((scores - lse).exp().unsqueeze(-1) * torch.stack([o.double() for o in outs])).sum(0), lse


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("head_size", [1, 17, 64, 128, 300])
@pytest.mark.parametrize("num_partials", range(1, 9))
@pytest.mark.parametrize("which", MERGES)
def test_merged_partials_equal_one_softmax_over_all_keys(which, num_partials, head_size, device):
    outs, lses, want_out, want_lse = case(num_partials, head_size, device=device)
    out, lse = MERGES[which](outs, lses)
    torch.testing.assert_close(out, want_out, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(lse, want_lse, rtol=1e-14, atol=1e-14)

    outs, lses = narrowed(outs, lses, torch.float32)
    out, lse = MERGES[which](outs, lses)
    want_out, want_lse = exact_merge(outs, lses)
    assert (out.dtype, lse.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(out.double(), want_out, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_partials", [1, 2, 5])
def test_a_partial_of_weight_one_is_copied_exactly(num_partials, device):
    outs, lses, _, _ = case(num_partials, device=device)
    outs, lses = narrowed(outs, lses, torch.float32)
    for lse in lses[1:]:
        lse.fill_(-torch.inf)
    out, lse = merge_partials(outs, lses)
    assert torch.equal(out, outs[0]) and torch.equal(lse, lses[0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("which", MERGES)
@pytest.mark.parametrize("out_type", [torch.float32, torch.bfloat16, torch.float16])
def test_partials_of_different_types_are_joined_in_fp32(which, out_type, device):
    outs, lses, _, _ = case(5, 72, device=device)
    outs, lses = narrowed(outs, lses, torch.float32, torch.bfloat16, torch.float16)
    out, lse = MERGES[which](outs, lses, out=torch.empty_like(outs[0], dtype=out_type))
    want, _ = exact_merge(outs, lses)
    assert out.dtype == out_type and lse.dtype == torch.float32
    tolerance = max(1e-6, torch.finfo(out_type).eps)
    torch.testing.assert_close(out.double(), want, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("which", MERGES)
def test_the_order_of_partials_changes_only_the_rounding(which, device):
    outs, lses, _, _ = case(4, device=device)
    outs, lses = narrowed(outs, lses, torch.float32)
    want_out, want_lse = MERGES[which](outs, lses)
    for order in itertools.permutations(range(4)):
        out, lse = MERGES[which]([outs[i] for i in order], [lses[i] for i in order])
        torch.testing.assert_close(out, want_out, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(lse, want_lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("which", MERGES)
def test_scores_that_lie_ten_thousand_apart_neither_overflow_nor_vanish(which, device):
    outs, lses, want_out, want_lse = case(6, spread=1e4, device=device)
    out, lse = MERGES[which](outs, lses)
    torch.testing.assert_close(out, want_out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, want_lse, rtol=1e-14, atol=0)
    outs, lses = narrowed(outs, lses, torch.float32)
    out, lse = MERGES[which](outs, lses)
    torch.testing.assert_close(out.double(), exact_merge(outs, lses)[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mark", [-torch.inf, torch.inf, 0.0])
@pytest.mark.parametrize("which", MERGES)
def test_a_row_that_saw_no_key_takes_no_part_in_any_convention(which, mark, dtype, device):
    outs, lses, _, _ = case(3, 17, device=device)
    outs, lses = [o.to(dtype) for o in outs], [lse.to(dtype) for lse in lses]
    want_out, want_lse = MERGES[which]([outs[0], outs[2]], [lses[0], lses[2]])
    lses[1][0, :, 3:] = mark
    outs[1][0, :, 3:] = 0 if mark == 0 else torch.nan
    lses[0][1, 1, 5] = lses[1][1, 1, 5] = lses[2][1, 1, 5] = mark
    for partial in outs:
        partial[1, 1, 5] = 0
    out, lse = MERGES[which](outs, lses, zero_means_empty=mark == 0)
    torch.testing.assert_close(out[0, :, 3:], want_out[0, :, 3:], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lse[0, :, 3:], want_lse[0, :, 3:], rtol=1e-6, atol=1e-6)
    assert (out[1, 1, 5] == 0).all() and lse[1, 1, 5] == -torch.inf
    assert out.isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("which", MERGES)
def test_a_zero_lse_counts_where_the_out_is_not_zero_or_zero_does_not_mean_empty(which, device):
    shape = (1, 1, 2, 17)
    outs = [torch.ones(shape, device=device), torch.zeros(shape, device=device)]
    outs[1][0, 0, 0, -1] = 1  # only the last element tells that row 0 saw a key
    lses = [torch.zeros(shape[:3], device=device) for _ in outs]
    out, lse = MERGES[which](outs, lses, zero_means_empty=True)
    torch.testing.assert_close(out[0, 0], torch.tensor([[0.5] * 16 + [1.0], [1.0] * 17], device=device))
    torch.testing.assert_close(lse[0, 0], torch.tensor([2.0, 1.0], device=device).log())
    out, lse = MERGES[which](outs, lses)
    torch.testing.assert_close(out[0, 0, 1], torch.full((17,), 0.5, device=device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("which", MERGES)
def test_every_row_empty_gives_zeros_and_minus_infinity(which, dtype, device):
    outs = [torch.full((2, 1, 3, 5), torch.nan, dtype=dtype, device=device) for _ in range(3)]
    lses = [torch.full((2, 1, 3), mark, dtype=dtype, device=device) for mark in (-torch.inf, torch.inf, -torch.inf)]
    out, lse = MERGES[which](outs, lses)
    assert (out == 0).all() and (lse == -torch.inf).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("which", MERGES)
def test_nan_stays_in_its_row_and_is_not_lost(which, dtype, device):
    outs, lses, _, _ = case(3, device=device)
    outs, lses = [o.to(dtype) for o in outs], [lse.to(dtype) for lse in lses]
    outs[1][0, 0, 2, 7] = torch.nan
    lses[0][1, 2, 4] = torch.nan
    lses[2][1, 2, 6] = torch.nan
    out, lse = MERGES[which](outs, lses)
    assert out[0, 0, 2, 7].isnan() and out[1, 2, 4].isnan().all() and out[1, 2, 6].isnan().all()
    assert lse[1, 2, 4].isnan() and lse[1, 2, 6].isnan()
    assert out.isnan().sum() == 1 + 2 * 64 and lse.isnan().sum() == 2


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("slot", [0, 2])
@pytest.mark.parametrize("which", MERGES)
def test_the_result_may_lie_where_one_of_the_partials_does(which, slot, device):
    outs, lses, _, _ = case(3, 300, device=device)
    outs, lses = narrowed(outs, lses, torch.float32)
    lses[slot][0, 0] = 0
    outs[slot][0, 0] = 0
    want_out, want_lse = MERGES[which](outs, lses, zero_means_empty=True)
    out, lse = MERGES[which](outs, lses, out=outs[slot], lse=lses[slot], zero_means_empty=True)
    assert out is outs[slot] and lse is lses[slot]
    assert torch.equal(out, want_out) and torch.equal(lse, want_lse)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("head_size", [17, 64])
def test_strides_other_than_the_last_are_free(head_size, device):
    outs, lses, _, _ = case(3, head_size, device=device)
    outs, lses = narrowed(outs, lses, torch.float32, torch.bfloat16)
    want_out, want_lse = merge_partials(outs, lses)

    def interleaved(tensor: Tensor) -> Tensor:
        """Return [B, H, S, ..] stored as [B, S, H, ..] inside a wider buffer."""
        buffer = torch.empty(tensor.transpose(1, 2).shape, dtype=tensor.dtype, device=device).repeat(
            1, 2, 2, *[1] * (tensor.dim() - 3)
        )
        view = buffer[:, 1 : 1 + tensor.shape[2], : tensor.shape[1]].transpose(1, 2)
        return view.copy_(tensor)

    out, lse = merge_partials(
        [interleaved(outs[0]), outs[1], interleaved(outs[2])], [lses[0], *map(interleaved, lses[1:])]
    )
    assert torch.equal(out, want_out) and torch.equal(lse, want_lse)
    out, lse = merge_partials(outs, lses, out=interleaved(want_out), lse=interleaved(want_lse))
    assert torch.equal(out, want_out) and torch.equal(lse, want_lse)
    broadcast = outs[1][:, :1].expand_as(outs[1])
    out, _ = merge_partials([outs[0], broadcast, outs[2]], lses)
    assert torch.equal(out, merge_partials([outs[0], broadcast.contiguous(), outs[2]], lses)[0])


@pytest.mark.parametrize("device", DEVICES)
def test_more_partials_than_any_table_holds_are_joined(device):
    outs, lses, _, _ = case(75, 8, device=device)
    outs, lses = narrowed(outs, lses, torch.float32, torch.bfloat16)
    out, lse = merge_partials(outs, lses, out=outs[0], lse=lses[0])
    outs, lses, _, _ = case(75, 8, device=device)
    outs, lses = narrowed(outs, lses, torch.float32, torch.bfloat16)
    want_out, want_lse = exact_merge(outs, lses)
    torch.testing.assert_close(out.double(), want_out, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(lse.double(), want_lse, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_results_repeat_bit_for_bit_with_any_number_of_threads(device):
    outs, lses, _, _ = case(4, 17, rows=700, device=device)
    outs, lses = narrowed(outs, lses, torch.float32, torch.bfloat16)
    threads = torch.get_num_threads()
    seen = []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            seen.append(merge_partials(outs, lses))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(0, 3, 4, 8), (2, 3, 0, 8), (2, 3, 4, 0)])
def test_no_rows_give_no_rows(shape, device):
    outs = [torch.empty(shape, device=device)] * 2
    out, lse = merge_partials(outs, [torch.zeros(shape[:3], device=device)] * 2)
    assert out.shape == shape and lse.shape == shape[:3]
    torch.testing.assert_close(lse, torch.full(shape[:3], 2.0, device=device).log())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck_accepts_schema_and_fake_tensors(dtype, device):
    outs, lses, _, _ = case(3, device=device)
    outs = [o.to(dtype) for o in outs]
    lses = [lse.to(torch.float64 if dtype == torch.float64 else torch.float32) for lse in lses]
    arguments = (outs, lses, torch.empty_like(outs[0]), torch.empty_like(lses[0]), False)
    torch.library.opcheck(torch.ops.igla.merge_partials, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("which", MERGES)
def test_wrong_input_is_refused_in_words(which, device):
    merge = MERGES[which]
    outs, lses, _, _ = case(2, device=device)
    outs, lses = narrowed(outs, lses, torch.float32)
    out = outs[0]
    for call, words in (
        (lambda: merge(outs, lses[:1]), r"outs, lses must be of one length, got \[2, 1\]"),
        (lambda: merge([o[0] for o in outs], lses), r"out must be \[B, H, S, D\], got 3 dimensions"),
        (lambda: merge([out, out[:, :2]], lses), r"outs\[1\] must be \[2, 3, 13, 64\] like out, got \[2, 2, 13, 64\]"),
        (lambda: merge([out, out.double()], lses), r"outs\[1\] must be float32 or bfloat16 or float16, got float64"),
        (
            lambda: merge([o.double() for o in outs], lses),
            r"outs\[0\] must be float32 or bfloat16 or float16, got float64",
        ),
        (lambda: merge(outs, [lse.double() for lse in lses]), "must be float64, got float32"),
        (lambda: merge(outs, [lse.bfloat16() for lse in lses]), "lse must be float32 or float64, got bfloat16"),
        (lambda: merge(outs, [lses[0], lses[1].double()]), r"lses\[1\] must be float32, got float64"),
        (
            lambda: merge(outs, [lses[0], lses[1][:1]]),
            r"lses\[1\] must be \[2, 3, 13\] like the rows of out, got \[1, 3, 13\]",
        ),
        (lambda: merge([out, out.mT.contiguous().mT], lses), r"outs\[1\] must have stride 1 in its last dimension"),
        (lambda: merge(outs, lses, out=out[:, :1].expand_as(out)), "out is written, so must not be expanded"),
    ):
        with pytest.raises(RuntimeError, match=words):
            call()


def test_no_partial_at_all_is_refused():
    with pytest.raises(RuntimeError, match="at least one partial"):
        merge_partials([], [])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_partial_on_another_device_is_refused():
    outs, lses, _, _ = case(2, device="cuda")
    with pytest.raises(RuntimeError, match=r"lses\[1\] must be on the device of out, got cpu"):
        merge_partials(outs, [lses[0], lses[1].cpu()])
