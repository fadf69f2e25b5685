import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from devices import DEVICES

from igla_mega import ops
from igla_mega.ops import cross_entropy

CSRC = Path(__file__).resolve().parents[2] / "csrc"
SIZES = [1, 7, 64, 4097]
# Ids of the shard under test: it starts at 100, and its last three columns are padding where it has that many.
START = 100

STATISTICS = {"op": cross_entropy.softmax_statistics, "reference": cross_entropy.softmax_statistics_reference}
GRADIENT = {"op": cross_entropy.softmax_gradient_, "reference": cross_entropy.softmax_gradient_reference_}


def case(columns: int, dtype: torch.dtype = torch.float32, device: str = "cpu", rows: int = 37, seed: int = 0):
    """Return logits, labels (in the shard, of other shards, masked) and the shard's vocab_limit."""
    generator = torch.Generator().manual_seed(seed)
    logits = (5 * torch.randn(rows, columns, generator=generator)).to(dtype)
    labels = START + torch.randint(-columns, 2 * columns, (rows,), generator=generator)
    labels[: rows // 2] = START + torch.randint(0, columns, (rows // 2,), generator=generator)
    labels[::5] = -100
    limit = START + max(1, columns - 3)
    return logits.to(device), labels.to(device), limit


def in_float64(logits, labels, limit):
    """Return the statistics and `column is the label`, computed by definition."""
    ids = START + torch.arange(logits.shape[1], device=logits.device)
    values = logits.double().masked_fill(ids >= limit, -torch.inf)
    hit = (ids == labels.unsqueeze(1)) & (ids < limit)
    row_max = values.amax(1)
    return row_max, (values - row_max.unsqueeze(1)).exp().sum(1), (logits.double() * hit).sum(1), hit


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", SIZES)
@pytest.mark.parametrize("which", STATISTICS)
def test_statistics_equal_their_definition_in_float64(which, columns, dtype, device):
    logits, labels, limit = case(columns, dtype, device)
    row_max, sum_exp, target = STATISTICS[which](logits, labels, START, limit)
    want_max, want_sum, want_target, _ = in_float64(logits, labels, limit)
    assert (row_max.dtype, sum_exp.dtype, target.dtype) == (torch.float32,) * 3
    # A maximum and a chosen logit are copies, not sums: exact.
    torch.testing.assert_close(row_max.double(), want_max, rtol=0, atol=0)
    torch.testing.assert_close(target.double(), want_target, rtol=0, atol=0)
    torch.testing.assert_close(sum_exp.double(), want_sum, rtol=1e-6, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", SIZES)
@pytest.mark.parametrize("which", GRADIENT)
def test_gradient_equals_its_definition_in_float64(which, columns, dtype, device):
    logits, labels, limit = case(columns, dtype, device)
    want_max, want_sum, _, hit = in_float64(logits, labels, limit)
    lse = (want_max + want_sum.log()).float()
    weight = torch.rand(len(labels), generator=torch.Generator().manual_seed(1)).to(device)
    real = START + torch.arange(columns, device=device) < limit
    want = weight.double().unsqueeze(1) * ((logits.double() - lse.double().unsqueeze(1)).exp() * real - hit.double())

    gradient = logits.clone()
    GRADIENT[which](gradient, lse, labels, weight, START, limit)
    # fp32: the rounding of logits - lse (up to 40) comes out of exp as a relative error; else one rounding to dtype.
    tolerance = max(2e-6, torch.finfo(dtype).eps)
    torch.testing.assert_close(gradient.double(), want, rtol=tolerance, atol=2e-7)
    assert (gradient[:, ~real] == 0).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("which", GRADIENT)
def test_a_row_of_weight_zero_becomes_zero_even_if_not_finite(which, device):
    logits, labels, limit = case(4097, device=device)
    logits[0], logits[1], logits[2] = torch.nan, torch.inf, -torch.inf
    lse = torch.zeros(len(labels), device=device)
    lse[:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    weight = torch.ones(len(labels), device=device)
    weight[:3] = 0
    GRADIENT[which](logits, lse, labels, weight, START, limit)
    assert (logits[:3] == 0).all() and (logits[3:] != 0).any(dim=1).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("which", STATISTICS)
def test_a_shard_of_padding_only_adds_nothing(which, device):
    logits, labels, _ = case(64, device=device)
    for limit in (START, START - 50):
        row_max, sum_exp, target = STATISTICS[which](logits, labels, START, limit)
        assert (row_max == -torch.inf).all() and (sum_exp == 0).all() and (target == 0).all()
        gradient = logits.clone()
        GRADIENT[which](gradient, torch.zeros_like(row_max), labels, torch.ones_like(row_max), START, limit)
        assert (gradient == 0).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("which", STATISTICS)
def test_minus_infinity_counts_as_zero_probability_and_nan_shows(which, device):
    logits, labels, _ = case(4097, device=device)
    limit = START + 4097
    logits[0] = -torch.inf
    logits[1, :3000] = -torch.inf
    logits[2, 4000] = torch.nan
    row_max, sum_exp, _ = STATISTICS[which](logits, labels, START, limit)
    assert row_max[0] == -torch.inf and sum_exp[0] == 0
    torch.testing.assert_close(row_max[1] + sum_exp[1].log(), logits[1, 3000:].logsumexp(0))
    assert sum_exp[2].isnan() and not sum_exp[3:].isnan().any()


@pytest.mark.parametrize("device", DEVICES)
def test_two_shards_joined_give_the_gradient_of_torch_cross_entropy(device):
    torch.manual_seed(0)
    vocabulary, padded = 1000, 1024
    logits = torch.randn(64, padded, device=device)
    labels = torch.randint(0, vocabulary, (64,), device=device)
    labels[3] = -100
    whole = logits[:, :vocabulary].clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(whole, labels)
    loss.backward()

    shards = [logits[:, :512].contiguous(), logits[:, 512:].contiguous()]
    found = [ops.cross_entropy.softmax_statistics(s, labels, 512 * i, vocabulary) for i, s in enumerate(shards)]
    row_max = torch.maximum(found[0][0], found[1][0])
    lse = row_max + sum(sums * (most - row_max).exp() for most, sums, _ in found).log()
    weight = (labels != -100).float() / 63
    torch.testing.assert_close(((lse - found[0][2] - found[1][2]) * weight).sum(), loss.detach())
    for i, shard in enumerate(shards):
        ops.cross_entropy.softmax_gradient_(shard, lse, labels, weight, 512 * i, vocabulary)
    torch.testing.assert_close(torch.cat(shards, 1)[:, :vocabulary], whole.grad)


@pytest.mark.parametrize("device", DEVICES)
def test_results_repeat_bit_for_bit_with_any_number_of_threads(device):
    logits, labels, limit = case(4097, device=device, rows=301)
    threads = torch.get_num_threads()
    seen = []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            row_max, sum_exp, target = cross_entropy.softmax_statistics(logits, labels, START, limit)
            gradient = logits.clone()
            cross_entropy.softmax_gradient_(gradient, row_max + sum_exp.log(), labels, sum_exp, START, limit)
            seen.append((row_max, sum_exp, target, gradient))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_accepts_schema_and_fake_tensors(dtype, device):
    logits, labels, limit = case(64, dtype, device)
    row = torch.ones(len(labels), device=device)
    utilities = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.igla.softmax_statistics, (logits, labels, START, limit), test_utils=utilities)
    torch.library.opcheck(
        torch.ops.igla.softmax_gradient_, (logits, row, labels, row, START, limit), test_utils=utilities
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("which", GRADIENT)
def test_wrong_input_is_refused_in_words(which, device):
    logits, labels, limit = case(64, device=device)
    row = torch.ones(len(labels), device=device)
    statistics, gradient = STATISTICS[which], GRADIENT[which]
    for call, words in (
        (lambda: statistics(logits.T, labels, START, limit), "logits must be contiguous"),
        (lambda: statistics(logits[0], labels, START, limit), "logits must be .tokens, columns."),
        (lambda: statistics(logits.double(), labels, START, limit), "logits must be float32, bfloat16 or float16"),
        (lambda: statistics(logits, labels.int(), START, limit), "labels must be int64"),
        (lambda: statistics(logits, labels[1:], START, limit), "labels must have one entry for each of the 37 rows"),
        (lambda: gradient(logits[:, 1:], row, labels, row, START, limit), "logits must be contiguous"),
        (lambda: gradient(logits, row.double(), labels, row, START, limit), "lse must be float32"),
        (lambda: gradient(logits, row, labels, row[1:], START, limit), "weight must have one entry"),
    ):
        with pytest.raises(RuntimeError, match=words):
            call()


def test_no_rows_give_no_rows():
    logits, labels = torch.empty(0, 5), torch.empty(0, dtype=torch.int64)
    assert [len(t) for t in cross_entropy.softmax_statistics(logits, labels, 0, 5)] == [0, 0, 0]
    cross_entropy.softmax_gradient_(logits, torch.empty(0), labels, torch.empty(0), 0, 5)


@pytest.mark.skipif(ops.why_no_kernels is not None, reason=str(ops.why_no_kernels))
def test_the_build_has_a_cpu_kernel_for_every_op():
    assert all(built["cpu"] for built in ops.kernels().values())
    ops.require_kernels("cpu")


@pytest.mark.skipif(any(ops.kernels()[op]["cuda"] for op in ops.OPS), reason="built with CUDA")
def test_requiring_a_kernel_that_is_not_built_names_it_and_the_way_out():
    with pytest.raises(RuntimeError, match=r"softmax_statistics.* no cuda kernel.*\n.*kernels: auto"):
        ops.require_kernels("cuda")


def test_a_library_that_does_not_load_is_said_and_the_reference_answers(tmp_path):
    (tmp_path / "_C.abi3.so").write_bytes(b"not a library")
    with pytest.warns(RuntimeWarning, match="built against another torch .* torch reference answers"):
        assert "Build again with" in ops._load_kernels(tmp_path)
    assert "is not built" in ops._load_kernels(tmp_path / "nowhere")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("source", sorted(CSRC.glob("*.cu")), ids=lambda path: path.name)
def test_nvcc_compiles_every_kernel_without_a_warning(source, tmp_path):
    targets = [f"--generate-code=arch=compute_{sm},code=sm_{sm}" for sm in (80, 90, 100)]
    subprocess.run(
        ["nvcc", "-std=c++20", "-O3", "-Werror", "all-warnings", *targets, "-c", source, "-o", tmp_path / "kernel.o"],
        check=True,
    )


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("source", sorted(CSRC.glob("*_cuda.cpp")), ids=lambda path: path.name)
def test_every_cuda_binding_compiles_against_the_stable_abi(source, tmp_path):
    flags = [
        "-std=c++20",
        "-Xcompiler=-Wall,-Wextra,-Werror",
        "-DUSE_CUDA",
        "-DTORCH_TARGET_VERSION=0x020B000000000000",
    ]
    headers = Path(torch.__file__).parent / "include"
    subprocess.run(["nvcc", *flags, "-isystem", headers, "-c", source, "-o", tmp_path / "binding.o"], check=True)
