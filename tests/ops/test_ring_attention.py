"""Tests of ring attention on gloo ranks, against one softmax over all scores in float64."""

import functools
import itertools
import math
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from igla_mega.ops import ring_attention as module
from igla_mega.ops.ring_attention import SCHEDULES, Kept, choose_schedule, ring_attention
from igla_mega.ops.zigzag import zigzag_join, zigzag_shard, zigzag_unshard

TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6}
"""Tolerances relative to the Frobenius norm: some tens of roundings."""
HEADS = [(8, 8), (8, 2), (8, 1)]


@dataclass(frozen=True)
class Case:
    length: int
    batch: int = 1
    heads: tuple[int, int] = (8, 2)
    head_size: int = 16
    causal: bool = True
    schedule: str = "p2p"
    dtype: torch.dtype = torch.float64
    documents: tuple | None = None
    peak: float = 1.0
    """Factor of the queries, for a softmax over peaked scores."""

    def inputs(self) -> list[Tensor]:
        """Return q, k, v and the output gradient of the whole sequence: [S, B, H, D] fp64, rounded to `dtype`."""
        generator = torch.Generator().manual_seed(self.length + 100 * self.batch + 1000 * self.heads[1])
        num_heads = [self.heads[0], self.heads[1], self.heads[1], self.heads[0]]
        shapes = [(self.length, self.batch, heads, self.head_size) for heads in num_heads]
        q, *rest = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        return [t.to(self.dtype).double() for t in (q * self.peak, *rest)]

    @property
    def padded_documents(self):
        """Documents of the sequence; padding tokens at its end belong to none of them."""
        return self.documents or (0, self.length)


@functools.lru_cache(maxsize=32)
def dense(case: Case) -> list[Tensor]:
    """Return out, dq, dk, dv and lse [B, H, S] of the whole sequence in fp64."""
    *qkv, grad_out = case.inputs()
    q, k, v = (t.requires_grad_() for t in qkv)
    wide_k, wide_v = (t.repeat_interleave(q.size(2) // t.size(2), 2) for t in (k, v))
    scores = torch.einsum("sbhd,tbhd->bhst", q, wide_k) / case.head_size**0.5
    scores = scores.masked_fill(~visible(case)[:, None], -torch.inf)
    lse = scores.logsumexp(-1)
    # A row that sees nothing has no softmax: 0.
    weights = torch.exp(scores - lse.masked_fill(lse.isinf(), 0.0)[..., None])
    out = torch.einsum("bhst,tbhd->sbhd", weights, wide_v)
    grads = torch.autograd.grad(out, (q, k, v), grad_out)
    return [out.detach(), *grads, lse.detach()]


def visible(case: Case) -> Tensor:
    """Return the mask of visible pairs, [B or 1, query, key]."""
    documents = case.padded_documents
    masks = []
    for offsets in documents if isinstance(documents[0], tuple) else [documents]:
        number = torch.full((case.length,), -1)
        for index, (start, stop) in enumerate(itertools.pairwise(offsets)):
            number[start:stop] = index
        mask = (number[:, None] == number) & (number >= 0)
        masks.append(mask.tril() if case.causal else mask)
    return torch.stack(masks)


def shard(whole: Tensor, dtype: torch.dtype, fill: float = 0) -> Tensor:
    return zigzag_shard(whole, dist.group.WORLD, 0, pad=True, fill=fill).to(dtype)


def parts_of_this_rank(case: Case, *, inputs: list[Tensor] | None = None, **options) -> list[Tensor]:
    """Return this rank's out, dq, dk, dv and lse."""
    *qkv, grad_out = (shard(t, case.dtype) for t in inputs or case.inputs())
    q, k, v = (t.requires_grad_() for t in qkv)
    out, lse = ring_attention(
        q,
        k,
        v,
        dist.group.WORLD,
        causal=case.causal,
        cu_seqlens=case.padded_documents,
        schedule=case.schedule,
        return_lse=True,
        **options,
    )
    assert (out.dtype, out.shape, lse.shape) == (case.dtype, q.shape, (q.size(1), q.size(2), q.size(0)))
    assert lse.dtype == (torch.float64 if case.dtype == torch.float64 else torch.float32) and not lse.requires_grad
    out.backward(grad_out)
    return [out.detach(), q.grad, k.grad, v.grad, lse]


def whole(parts: list[Tensor]) -> list[Tensor]:
    """Gather out, dq, dk and dv of all ranks on every rank, padding included."""
    return [zigzag_unshard(part, dist.group.WORLD, 0) for part in parts[:4]]


def squares(case: Case) -> list[tuple[float, float]]:
    """Return squared norms of the error and of the reference for this rank's out, dq, dk, dv and lse.

    The error is infinite where what fills up the sequence is not empty.
    """
    found = parts_of_this_rank(case)
    expected = dense(replace(case, schedule="p2p"))
    padding = shard(torch.zeros(case.length), torch.bool, fill=1)
    if any(part[padding].any() for part in found[:4]) or not (found[4][..., padding] == -torch.inf).all():
        return [(math.inf, 1.0)] * 5
    lse, right_lse = found[4], shard(expected[4].permute(2, 0, 1), found[4].dtype, fill=-torch.inf).permute(1, 2, 0)
    blind = right_lse.isinf()
    if not torch.equal(lse.isinf(), blind):
        return [(math.inf, 1.0)] * 5
    pairs = [(part, shard(right, torch.float64)) for part, right in zip(found[:4], expected[:4], strict=True)]
    pairs.append((lse[~blind], shard(expected[4].permute(2, 0, 1), torch.float64).permute(1, 2, 0)[~blind]))
    return [((a.double() - b).square().sum().item(), b.square().sum().item()) for a, b in pairs]


def squares_of(cases: list[Case]) -> list[list[tuple[float, float]]]:
    return [squares(case) for case in cases]


def errors(num_ranks: int, cases: list[Case], limit_seconds: float = 120.0) -> list[list[float]]:
    """Return each case's relative errors of out, dq, dk, dv and lse over all ranks, in the Frobenius norm."""
    per_rank = ranks.run(num_ranks, squares_of, cases, limit_seconds=limit_seconds)
    sums = torch.tensor(per_rank, dtype=torch.float64).sum(0)
    return (sums[..., 0] / sums[..., 1].clamp(min=1e-300)).sqrt().tolist()


def check(num_ranks: int, cases: list[Case], limit_seconds: float = 120.0) -> None:
    cases = [case for case in cases if case.schedule != "a2a" or case.heads[1] % num_ranks == 0]
    worst = dict.fromkeys(TOLERANCE, 0.0)
    for case, found in zip(cases, errors(num_ranks, cases, limit_seconds), strict=True):
        assert max(found) <= TOLERANCE[case.dtype], (case, found)
        worst[case.dtype] = max(worst[case.dtype], *found)
    print(f"{num_ranks} ranks, {len(cases)} cases: worst errors {worst}")


def matrix(shapes: list[tuple[int, int]], heads=HEADS) -> list[Case]:
    """Return cases of all schedules and types, causal and full, for these lengths and batches."""
    return [
        Case(length, batch, pair, causal=causal, schedule=schedule, dtype=dtype)
        for (length, batch), pair, schedule in itertools.product(shapes, heads, SCHEDULES)
        for causal, dtype in itertools.product((True, False), TOLERANCE)
    ]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_ring_attention_equals_dense_attention(num_ranks):
    # 29 is odd, and filled up on every number of ranks but one.
    check(num_ranks, matrix([(24, 1), (29, 3)]))


def test_ring_attention_equals_dense_attention_on_eight_ranks():
    check(8, matrix([(33, 1)]))


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
def test_more_lengths_and_batches_equal_dense_attention(num_ranks):
    check(num_ranks, matrix([(48, 3), (2 * num_ranks + 1, 1), (51, 3)]), 300)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_long_and_wide_heads_equal_dense_attention(num_ranks):
    shapes = [Case(1000, 1, (4, 2), 64), Case(96, 3, (8, 2), 128), Case(2 * num_ranks + 1, 3, (8, 1), 64)]
    check(num_ranks, [replace(case, schedule=s, dtype=d) for case in shapes for s in SCHEDULES for d in TOLERANCE], 300)


DOCUMENTS = {
    "borders on chunk edges": (0, 4, 8, 16, 32),
    "of one token": (0, 1, 2, 3, 17, 18, 31, 32),
    "one spans all ranks": (0, 2, 30, 32),
    "padding behind": (0, 5, 6, 20),
    "two tokens, and padding": (0, 2),
    "of each row": ((0, 7, 32), (0, 2), (0, 3, 4, 9, 20)),
}


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_documents_equal_dense_attention_within_each(num_ranks):
    cases = [
        Case(32, 3, (8, 2), causal=causal, schedule=schedule, dtype=dtype, documents=documents)
        for documents, schedule in itertools.product(DOCUMENTS.values(), SCHEDULES)
        for causal, dtype in ((True, torch.float64), (False, torch.float32))
    ]
    check(num_ranks, cases)


def test_documents_of_each_row_equal_dense_attention_in_a_padded_sequence():
    rows = ((0, 6, 37), (0, 37))
    check(
        4,
        [Case(37, 2, (8, 4), schedule=schedule, dtype=d, documents=rows) for schedule in SCHEDULES for d in TOLERANCE],
    )


def by_torch(case: Case) -> list[Tensor]:
    """Return out, dq, dk and dv of torch's attention on one device."""
    *qkv, grad_out = (t.to(case.dtype) for t in case.inputs())
    q, k, v = (t.requires_grad_() for t in qkv)
    out = F.scaled_dot_product_attention(
        *(t.permute(1, 2, 0, 3) for t in (q, k, v)), is_causal=case.causal, enable_gqa=True
    ).permute(2, 0, 1, 3)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad_out)]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_one_rank_is_torchs_attention_bit_for_bit(schedule, causal, dtype):
    for heads, length in itertools.product(HEADS, (32, 37)):
        case = Case(length, 2, heads, causal=causal, schedule=schedule, dtype=dtype)
        *qkv, grad_out = (t.to(dtype) for t in case.inputs())
        q, k, v = (t.requires_grad_() for t in qkv)
        out = ring_attention(q, k, v, None, causal=causal, schedule=schedule)
        grads = torch.autograd.grad(out, (q, k, v), grad_out)
        assert all(torch.equal(a, b) for a, b in zip((out, *grads), by_torch(case), strict=True))


class _Spread(torch.autograd.Function):
    """Take this rank's part of a tensor that every rank holds; the gradient is that of the whole, on every rank."""

    @staticmethod
    def forward(ctx, x):
        return zigzag_shard(x, dist.group.WORLD, 0)

    @staticmethod
    def backward(ctx, grad):
        return zigzag_unshard(grad, dist.group.WORLD, 0)


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx, part):
        return zigzag_unshard(part, dist.group.WORLD, 0)

    @staticmethod
    def backward(ctx, grad):
        return zigzag_shard(grad, dist.group.WORLD, 0)


def gradients_are_those_of_differences(schedules: list[str]) -> bool:
    # Whole on every rank, perturbed alike: the ranks stay in step.
    q, k, v = (t.requires_grad_() for t in Case(16, heads=(4, 2), head_size=8).inputs()[:3])
    for schedule in schedules:

        def attend(*qkv, schedule=schedule):
            return _Collect.apply(ring_attention(*map(_Spread.apply, qkv), dist.group.WORLD, schedule=schedule))

        torch.manual_seed(0)
        torch.autograd.gradcheck(attend, (q, k, v), fast_mode=True)
    return True


@pytest.mark.parametrize(
    ("num_ranks", "schedules"),
    [(1, ["p2p"]), (2, list(SCHEDULES)), (4, ["p2p", "allgather", "a2a+p2p"])],
)
def test_gradients_are_those_of_finite_differences(num_ranks, schedules):
    assert all(ranks.run(num_ranks, gradients_are_those_of_differences, schedules))


def in_bf16(cases: list[Case]) -> list[list]:
    return [[t.float().numpy() for t in parts_of_this_rank(case)[:4]] for case in cases]


def errors_in_bf16(num_ranks: int, cases: list[Case]) -> list[list[float]]:
    """Return the errors of out, dq, dk and dv for each case."""
    per_rank = ranks.run(num_ranks, in_bf16, cases, limit_seconds=300)
    found = []
    for index, case in enumerate(cases):
        parts = [[torch.from_numpy(t) for t in results[index]] for results in per_rank]
        tensors = [
            zigzag_join(list(of_ranks), 0) if num_ranks > 1 else of_ranks[0] for of_ranks in zip(*parts, strict=True)
        ]
        found.append(relative(tensors, case))
    return found


def relative(tensors: list[Tensor], case: Case) -> list[float]:
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(tensors, dense(case)[:4], strict=True)]


BF16 = Case(1024, heads=(2, 1), head_size=64, dtype=torch.bfloat16)
BF16_CASES = {"random": BF16, "peaked": replace(BF16, peak=8.0)}


def test_bf16_on_eight_ranks_errs_at_most_a_quarter_more_than_torch_on_one_device():
    cases = [replace(case, schedule=schedule) for case in BF16_CASES.values() for schedule in ("p2p", "allgather")]
    for case, found in zip(cases, errors_in_bf16(8, cases), strict=True):
        alone = relative(by_torch(case), case)
        ratios = [ours / theirs for ours, theirs in zip(found, alone, strict=True)]
        print(f"{case.schedule}, queries x {case.peak}: torch's errors {alone}, ours {ratios} times that")
        assert all(0 < ratio <= 1.25 for ratio in ratios), case


@pytest.mark.slow
def test_the_bf16_error_hardly_grows_from_two_ranks_to_sixteen():
    cases = list(BF16_CASES.values())
    for case, two, sixteen in zip(cases, errors_in_bf16(2, cases), errors_in_bf16(16, cases), strict=True):
        growth = [b / a for a, b in zip(two, sixteen, strict=True)]
        print(f"queries x {case.peak}: on sixteen ranks {growth} times the error on two")
        assert all(ratio <= 1.2 for ratio in growth), case


@contextmanager
def replaced(name: str, value):
    """Replace an attribute of the module under test on this rank."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield before
    finally:
        setattr(module, name, before)


def stale_keys(*args):
    """Run a backward pass that sees the same keys at every step."""
    pass_on = module._pass_on

    def stale(message, ring, tag, free):
        return (
            module._Arriving(message, [], torch.empty_like(message))
            if tag == module._KV_TAG
            else pass_on(message, ring, tag, free)
        )

    with replaced("_pass_on", stale):
        return RING_BACKWARD(*args)


def home_missed(*args):
    """Run a backward pass that ends one hop before the gradients of keys and values return to their rank."""
    pass_on, hops = module._pass_on, []

    def short(message, ring, tag, free):
        hops.append(tag)
        last = hops.count(module._GRAD_TAG) == ring.size()
        return module._Arriving(message, [], torch.empty_like(message)) if last else pass_on(message, ring, tag, free)

    with replaced("_pass_on", short):
        return RING_BACKWARD(*args)


def local_lse(*args):
    """Run a backward pass that uses each block's softmax in place of that of the whole row."""
    whole_row = module.block_backward

    def of_block(grad_out, q, k, v, out, lse, **options):
        return whole_row(grad_out, q, k, v, out, module.block_forward(q, k, v, **options)[1], **options)

    with replaced("block_backward", of_block):
        return RING_BACKWARD(*args)


def as_it_is(*args):
    return RING_BACKWARD(*args)


RING_BACKWARD = module._ring_backward
MUTATIONS = {mutation.__name__: mutation for mutation in (as_it_is, stale_keys, local_lse, home_missed)}


def squares_with(mutation: str, cases: list[Case]):
    with replaced("_ring_backward", MUTATIONS[mutation]):
        return squares_of(cases)


def mutated(cases: list[Case]) -> list:
    return [squares_with(mutation, cases) for mutation in MUTATIONS]


def test_the_comparison_notices_stale_keys_a_local_softmax_and_a_missing_hop():
    per_rank = torch.tensor(ranks.run(4, mutated, [Case(32), Case(32, schedule="a2a+p2p")]), dtype=torch.float64)
    sums = per_rank.sum(0)  # [mutation, case, tensor, 2]
    found = dict(zip(MUTATIONS, (sums[..., 0] / sums[..., 1]).sqrt(), strict=True))
    assert found.pop("as_it_is").max() < TOLERANCE[torch.float64]
    for mutation, of_cases in found.items():
        assert of_cases[:, 0].max() < TOLERANCE[torch.float64], "the forward pass is right"
        assert (of_cases[:, 1:4].amax(1) > 1e-2).all(), mutation


def moved(t: Tensor, tokens: slice) -> Tensor:
    t = t.clone()
    t[tokens] += 3.0
    return t


def causality_probe(case: Case, tokens: list[int]) -> list[bool]:
    """Return whether, when a token and all later ones change, exactly the outputs from it on change."""
    before = whole(parts_of_this_rank(case))[0]
    answers = []
    for token in tokens:
        q, k, v, grad_out = case.inputs()
        inputs = [*(moved(t, slice(token, None)) for t in (q, k, v)), grad_out]
        after = whole(parts_of_this_rank(case, inputs=inputs))[0]
        changed = (before != after).flatten(1).any(1)
        answers.append(not changed[:token].any() and bool(changed[token : case.length].all()))
    return answers


def document_probe(case: Case) -> list[bool]:
    """Return whether outputs and gradients of all other documents stay bit for bit when one changes."""
    before = whole(parts_of_this_rank(case))
    answers = []
    for document in itertools.starmap(slice, itertools.pairwise(case.documents)):
        after = whole(parts_of_this_rank(case, inputs=[moved(t, document) for t in case.inputs()]))
        for a, b in zip(before, after, strict=True):
            changed = (a != b).flatten(1).any(1)
            inside = changed[document].clone()
            changed[document] = False
            answers.append(not changed.any() and bool(inside.any()))
    return answers


def probes() -> list[bool]:
    case = Case(32, 2, (4, 4), dtype=torch.float32)
    # Chunks are of 4 tokens.
    answers = [causality_probe(replace(case, schedule=schedule), [1, 4, 13, 28, 31]) for schedule in SCHEDULES]
    packed = [replace(case, schedule=schedule, documents=(0, 3, 8, 23, 32)) for schedule in SCHEDULES]
    return [answer for found in (*answers, *map(document_probe, packed)) for answer in found]


def test_no_output_depends_on_a_later_token_or_on_another_document():
    for answers in ranks.run(4, probes):
        assert len(answers) == 4 * (5 + 4 * 4) and all(answers)


def calls_of_blocks(case: Case) -> tuple[int, int]:
    calls = []

    def counting(way, function):
        return lambda *args, **options: calls.append(way) or function(*args, **options)

    with (
        replaced("block_forward", counting("forward", module.block_forward)),
        replaced("block_backward", counting("backward", module.block_backward)),
    ):
        parts_of_this_rank(case)
    return calls.count("forward"), calls.count("backward")


def calls_of_cases() -> list[tuple[int, int]]:
    case = Case(32)
    return [
        calls_of_blocks(case),
        calls_of_blocks(replace(case, documents=(0, 4, 8, 12, 16, 20, 24, 28, 32))),
        calls_of_blocks(replace(case, documents=(0, 4))),
    ]


def test_blocks_without_a_visible_pair_are_not_computed():
    # Of 4 ranks: each meets all; sees the two documents, of a chunk each, that it holds; only the first holds any.
    assert ranks.run(4, calls_of_cases) == [[(4, 4), (2, 2), (1, 1) if rank == 0 else (0, 0)] for rank in range(4)]


def bits(case: Case) -> list[bytes]:
    return [t.contiguous().view(torch.uint8).numpy().tobytes() for t in parts_of_this_rank(case)]


REPEATED = [
    replace(Case(64, 2), dtype=dtype, schedule=schedule, documents=documents)
    for dtype, documents in ((torch.float32, None), (torch.bfloat16, (0, 5, 40, 64)))
    for schedule in ("p2p", "allgather", "a2a+p2p")
]


def runs_that_repeat() -> list[bool]:
    def at_once(*args, pass_on=module._pass_on):
        buffer, sent = pass_on(*args).wait()
        return module._Arriving(buffer, [], sent)

    answers = []
    for case in REPEATED:
        first = bits(case)
        answers += [bits(case) == first, bits(case) == first]
        with replaced("_pass_on", at_once):
            answers.append(bits(case) == first)
    return answers


def test_runs_repeat_bit_for_bit_and_do_as_well_when_nothing_overlaps():
    assert all(answer for answers in ranks.run(4, runs_that_repeat) for answer in answers)


def second_pass(case: Case) -> tuple[bool, int, int]:
    """Run a forward pass without gradients, then one that reuses its result; return equality and calls of blocks."""
    expected = parts_of_this_rank(case)
    kept = Kept()
    with torch.no_grad():
        *qkv, _ = (shard(t, case.dtype) for t in case.inputs())
        first = ring_attention(
            *qkv, dist.group.WORLD, schedule=case.schedule, cu_seqlens=case.padded_documents, kept=kept
        )
    calls = []
    with replaced("block_forward", lambda *_, **__: calls.append("forward")):
        found = parts_of_this_rank(case, kept=kept)
    same = all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    return (
        same and torch.equal(first, expected[0]),
        len(calls),
        sum(t.grad_fn is not None for t in (kept.out, kept.lse)),
    )


def second_passes() -> list:
    return [
        second_pass(replace(case, schedule=schedule))
        for case in REPEATED
        for schedule in SCHEDULES
        if case.heads[1] % 2 == 0
    ]


def test_what_a_first_pass_kept_is_not_computed_again():
    for results in ranks.run(2, second_passes):
        assert results == [(True, 0, 0)] * len(results)


def peak_bytes(case: Case) -> int:
    """Return the peak memory of forward and backward pass, above the memory in use before."""
    parts_of_this_rank(case)
    *qkv, grad_out = (shard(t, case.dtype) for t in case.inputs())
    q, k, v = (t.requires_grad_() for t in qkv)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        ring_attention(q, k, v, dist.group.WORLD, schedule=case.schedule).backward(grad_out)
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns())))


def test_memory_of_a_rank_does_not_grow_with_the_number_of_ranks():
    own = 256
    peaks = {}
    for num_ranks in (2, 4, 8):
        case = Case(own * num_ranks, head_size=64, dtype=torch.float32)
        peaks[num_ranks] = max(ranks.run(num_ranks, peak_bytes, case))
    print(f"peak bytes by ranks, {own} tokens of each: {peaks}")
    assert peaks[8] <= 1.02 * peaks[2]


def message_of(**changes) -> str:
    """Return the message that one call raises on this rank, or ""."""
    case = Case(32)
    *qkv, _ = (shard(t, case.dtype) for t in case.inputs())
    last = dist.get_rank() == dist.get_world_size() - 1
    if "tokens_of_the_last" in changes and last:
        qkv = [t[: changes["tokens_of_the_last"]] for t in qkv]
    changes.pop("tokens_of_the_last", None)
    if changes.pop("odd", False):
        qkv = [t[:-1] for t in qkv]
    if changes.pop("other_documents", False):
        changes["cu_seqlens"] = [0, 5 if last else 6, 32]
    try:
        ring_attention(*qkv, dist.group.WORLD, **changes)
    except ValueError as error:
        return str(error)
    return ""


def messages(calls: list[dict]) -> list[str]:
    return [message_of(**call) for call in calls]


BAD_CALLS = {
    "another length on one rank": (
        {"tokens_of_the_last": 6},
        "rank 3 of the context group holds [S, B, H, D, Hk] = [6,",
    ),
    "an odd length on one rank": (
        {"tokens_of_the_last": 7},
        "rank 3 of the context group holds [S, B, H, D, Hk] = [7,",
    ),
    "another length, and documents beyond it": (
        {"tokens_of_the_last": 6, "cu_seqlens": [0, 32]},
        "rank 3 of the context group holds",
    ),
    "other documents on one rank": ({"other_documents": True}, "documents and schedules must agree"),
    "odd on all": ({"odd": True}, "a rank holds 7 tokens, an odd number"),
    "heads": ({"schedule": "a2a"}, "2 key-value heads do not divide among 4 ranks. Use p2p, or 2 ranks."),
    "an inner size": ({"schedule": "a2a+p2p", "inner_size": 3}, "3 does not divide the 4 context-parallel ranks"),
    "a schedule": ({"schedule": "star"}, "'star' is none of p2p, allgather, a2a, a2a+p2p, auto"),
    "not rising": ({"cu_seqlens": [0, 8, 8, 32]}, "row 0 must rise from 0"),
    "not from 0": ({"cu_seqlens": [1, 32]}, "row 0 must rise from 0"),
    "of nothing": ({"cu_seqlens": []}, "row 0 must rise from 0"),
    "beyond the row": ({"cu_seqlens": [[0, 33]]}, "row 0 ends at 33, beyond the sequence of 32 tokens"),
    "too many rows": ({"cu_seqlens": [[0, 32], [0, 32]]}, "2 lists for 1 rows"),
}


def test_what_does_not_fit_is_an_error_on_all_ranks_within_seconds():
    calls = [call for call, _ in BAD_CALLS.values()]
    # A good call last: no message of a bad one is still under way.
    for found in ranks.run(4, messages, [*calls, {}], limit_seconds=20):
        for got, (what, (_, expected)) in zip(found, BAD_CALLS.items(), strict=False):
            assert expected in got, what
        assert found[-1] == ""


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        (((8, 1, 4, 16), (8, 1, 3, 16), (8, 1, 3, 16)), "3 key-value heads do not divide 4 query heads"),
        (((8, 1, 4, 16), (8, 1, 2, 16), (8, 1, 4, 16)), "got .8, 1, 4, 16., .8, 1, 2, 16., .8, 1, 4, 16."),
        (((8, 1, 4, 16), (6, 1, 2, 16), (6, 1, 2, 16)), "of the same S, B and D"),
        (((8, 1, 64), (8, 1, 64), (8, 1, 64)), "takes q .S, B, H, D."),
    ],
)
def test_shapes_that_do_not_fit_are_refused_by_name(shapes, expected):
    with pytest.raises(ValueError, match=expected):
        ring_attention(*map(torch.zeros, shapes), None)


def test_types_that_differ_are_refused():
    q = torch.zeros(8, 1, 2, 16)
    with pytest.raises(ValueError, match="one floating-point type, got"):
        ring_attention(q, q.double(), q.double(), None)


def poisoned(value: float) -> list[tuple[bool, bool]]:
    """Return for each schedule whether the outputs that see token 9, and gradients, are not finite."""
    case = Case(32, 1, (4, 4), dtype=torch.float32)
    answers = []
    for schedule in SCHEDULES:
        inputs = [t.clone() for t in case.inputs()]
        inputs[1][9] = value
        out, *grads = whole(parts_of_this_rank(replace(case, schedule=schedule), inputs=inputs))
        seeing = out.isfinite().flatten(1).all(1)
        answers.append((bool(seeing[:9].all() and not seeing[9:].any()), any(not t.isfinite().all() for t in grads)))
    return answers


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_comes_out_so_and_nothing_hangs(value):
    for answers in ranks.run(4, poisoned, value, limit_seconds=20):
        assert answers == [(True, True)] * 4


def with_an_expanded_gradient() -> list[float]:
    answers = []
    for schedule in SCHEDULES:
        grads = []
        for whole_gradient in (False, True):
            q, k, v = (shard(t, torch.float32).requires_grad_() for t in Case(16).inputs()[:3])
            out = ring_attention(q, k, v, dist.group.WORLD, schedule=schedule)
            # The gradient of a sum is one number, expanded.
            out.backward(torch.ones_like(out)) if whole_gradient else out.sum().backward()
            grads.append(torch.cat([t.grad.flatten() for t in (q, k, v)]))
        answers.append((grads[0] - grads[1]).abs().max().item())
    return answers


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_gradient_that_is_expanded_is_taken_as_it_is(num_ranks):
    assert all(max(answers) < 1e-6 for answers in ranks.run(num_ranks, with_an_expanded_gradient))


def in_fp16(case: Case) -> list[list[float]]:
    return [[t.float().isfinite().all().item() for t in parts_of_this_rank(case)], squares(case)]


def test_fp16_stays_near_dense_attention():
    per_rank = ranks.run(2, in_fp16, Case(48, dtype=torch.float16))
    sums = torch.tensor([found for _, found in per_rank], dtype=torch.float64).sum(0)
    # A few of fp16's 2^-11.
    assert all(all(finite) for finite, _ in per_rank) and (sums[:, 0] / sums[:, 1]).sqrt().max() < 2e-3


@pytest.mark.parametrize(
    ("num_kv_heads", "size", "ranks_of_node", "schedule"),
    [
        (8, 1, 8, "p2p"),
        (8, 8, 8, "a2a"),
        (8, 4, 8, "a2a"),
        (2, 8, 8, "p2p"),
        (8, 16, 8, "a2a+p2p"),
        (1, 16, 8, "p2p"),
        (3, 16, 8, "p2p"),
        (2, 16, 8, "a2a+p2p"),
    ],
)
def test_the_schedule_follows_from_heads_ranks_and_nodes(num_kv_heads, size, ranks_of_node, schedule):
    chosen, reason = choose_schedule(num_kv_heads, size, ranks_of_node)
    assert chosen == schedule and reason
