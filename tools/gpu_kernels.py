"""Benchmark the CUDA kernels against their peers in the same run: the loss's gradient, and the memory-bound ops."""

import importlib.util
from collections.abc import Callable
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

ROUNDS = 15
NUM_ELEMENTS = 57 * 2**20
"""Number of elements for the memory-bound ops: a 7B model's shard on one of 128 ranks."""
EWC_LAMBDA, WEIGHT = 30.0, 0.5
SHAPES = [(4096, 32000), (2048, 128256), (8192, 16032)]
"""Tokens and vocabulary of one call: a chunk of a Llama-2 and a Llama-3 head, and of the latter on 8 tensor ranks."""

Gradient = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Function of logits [tokens, vocabulary], labels and weights [tokens] that returns the gradient of the logits."""


def igla(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """Compute the gradient of the mean loss in place of `logits`."""
    vocabulary = logits.shape[1]
    row_max, sum_exp, _ = torch.ops.igla.softmax_statistics(logits, labels, 0, vocabulary)
    torch.ops.igla.softmax_gradient_(logits, row_max + sum_exp.log(), labels, weight, 0, vocabulary)
    return logits


def torch_cross_entropy(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """Compute the same with torch's cross-entropy and autograd."""
    logits = logits.detach().requires_grad_()
    torch.nn.functional.cross_entropy(logits, labels).backward()
    assert logits.grad is not None
    return logits.grad


def peers() -> dict[str, Gradient]:
    """Return the implementations to compare; Liger's if it is installed."""
    found: dict[str, Gradient] = {
        "igla": igla,
        "torch eager": torch_cross_entropy,
        "torch compiled": torch.compile(torch_cross_entropy),
    }
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerCrossEntropyLoss

        def liger(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
            logits = logits.detach().requires_grad_()
            LigerCrossEntropyLoss()(logits, labels).backward()
            assert logits.grad is not None
            return logits.grad

        found["liger"] = liger
    return found


def milliseconds(call: Callable[[], object]) -> float:
    """Return the time of a call on the GPU's own clock."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def benchmark() -> list[dict]:
    """Return a row for each shape, dtype and peer: the median of ROUNDS, with the peers in turns within every round."""
    rows = []
    for num_tokens, vocabulary in SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            original = torch.randn(num_tokens, vocabulary, device="cuda", dtype=dtype)
            labels = torch.randint(0, vocabulary, (num_tokens,), device="cuda")
            weight = torch.full((num_tokens,), 1 / num_tokens, device="cuda")
            exact = original.double().softmax(1)
            exact[torch.arange(num_tokens, device="cuda"), labels] -= 1
            exact /= num_tokens

            variants = peers()
            errors = {}
            times: dict[str, list[float]] = {name: [] for name in variants}
            for name, gradient in variants.items():
                errors[name] = (gradient(original.clone(), labels, weight).double() - exact).norm() / exact.norm()
            del exact
            for _ in range(ROUNDS):
                for name, gradient in variants.items():
                    logits = original.clone()  # some peers overwrite it
                    times[name].append(milliseconds(lambda: gradient(logits, labels, weight)))  # noqa: B023
            for name in variants:
                median = sorted(times[name])[ROUNDS // 2]
                # Minimum traffic: the logits are read for the statistics, then read and written for the gradient.
                moved_bytes = 3 * original.numel() * original.element_size()
                rows.append(
                    {
                        "tokens": num_tokens,
                        "vocabulary": vocabulary,
                        "dtype": str(dtype).removeprefix("torch."),
                        "peer": name,
                        "milliseconds": median,
                        "all_milliseconds": times[name],
                        "gigabytes_per_second": moved_bytes / median / 1e6,
                        "relative_error": errors[name].item(),
                    }
                )
    return rows


def merge_eager(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Merge attention partials by their log-sum-exp, with torch's operations."""
    lse = torch.stack(lses).logsumexp(0)
    out = torch.exp(lses[0] - lse).unsqueeze(-1) * outs[0]
    for part, part_lse in zip(outs[1:], lses[1:], strict=True):
        out += torch.exp(part_lse - lse).unsqueeze(-1) * part
    return out, lse


def add_terms(sums: list[Tensor], terms: list[Tensor]) -> None:
    """Add bf16 terms to fp32 sums in place."""
    for total, term in zip(sums, terms, strict=True):
        total += term


def fisher_foreach(fisher: list[Tensor], grads: list[Tensor]) -> None:
    """Accumulate squared gradients with torch's foreach operations."""
    wide = [g.float() for g in grads]  # no copy of fp32 gradients
    torch._foreach_addcmul_(fisher, wide, wide, value=WEIGHT)


def fisher_eager(fisher: list[Tensor], grads: list[Tensor]) -> None:
    """Accumulate squared gradients tensor by tensor, the form that torch.compile fuses."""
    for total, grad in zip(fisher, grads, strict=True):
        total += WEIGHT * grad.float() ** 2


def pull_foreach(grads: list[Tensor], weights: list[Tensor], anchors: list[Tensor], fisher: list[Tensor]) -> Tensor:
    """Add the EWC gradient with torch's foreach operations; return the penalty."""
    drifts = torch._foreach_sub(weights, anchors)
    pulls = torch._foreach_mul(drifts, fisher)
    torch._foreach_add_(grads, pulls, alpha=EWC_LAMBDA)
    torch._foreach_mul_(drifts, pulls)
    return EWC_LAMBDA / 2 * torch.stack([d.sum() for d in drifts]).sum()


def pull_eager(grads: list[Tensor], weights: list[Tensor], anchors: list[Tensor], fisher: list[Tensor]) -> Tensor:
    """Add the EWC gradient tensor by tensor, the form that torch.compile fuses; return the penalty."""
    penalty = torch.zeros((), device=weights[0].device)
    for grad, weight, anchor, stiffness in zip(grads, weights, anchors, fisher, strict=True):
        drift = weight - anchor
        pull = EWC_LAMBDA * stiffness * drift
        grad += pull
        penalty = penalty + (pull * drift).sum() / 2
    return penalty


def pull_autograd(grads: list[Tensor], weights: list[Tensor], anchors: list[Tensor], fisher: list[Tensor]) -> Tensor:
    """Add the EWC gradient by autograd; return the penalty."""
    leaves = [w.detach().requires_grad_() for w in weights]
    for leaf, grad in zip(leaves, grads, strict=True):
        leaf.grad = grad
    penalties = [(f * (w - a) ** 2).sum() for f, w, a in zip(fisher, leaves, anchors, strict=True)]
    penalty = EWC_LAMBDA / 2 * torch.stack(penalties).sum()
    penalty.backward()
    return penalty.detach()


def bandwidth_cases(device: str, num_elements: int) -> dict[str, tuple[int, dict[str, Callable[[], object]]]]:
    """Return for each memory-bound op its minimum traffic in bytes and its implementations, on shared tensors."""
    ops = torch.ops.igla
    shape, attention = (num_elements // 12,), (1, 32, num_elements // 32 // 128, 128)

    def tensors(dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return [torch.randn(shape, device=device).to(dtype) for _ in range(12)]

    source, target = torch.randn(num_elements, device=device), torch.empty(num_elements, device=device)
    found: dict[str, tuple[int, dict[str, Callable[[], object]]]] = {
        "copy": (8 * num_elements, {"copy_": lambda: target.copy_(source)})
    }
    for num_partials in (2, 8):
        outs = [torch.randn(attention, device=device).bfloat16() for _ in range(num_partials)]
        lses = [torch.randn(attention[:3], device=device) for _ in range(num_partials)]
        out, lse = torch.empty(attention, device=device), torch.empty(attention[:3], device=device)
        found[f"merge_partials, {num_partials} bfloat16"] = (
            outs[0].numel() * (2 * num_partials + 4),
            {
                "igla": partial(ops.merge_partials, outs, lses, out, lse, False),
                "torch eager": partial(merge_eager, outs, lses),
                "torch compiled": partial(torch.compile(merge_eager), outs, lses),
            },
        )
    sums, terms = tensors(), tensors(torch.bfloat16)
    found["accumulate_, bfloat16 into float32"] = (
        10 * num_elements,
        {
            "igla": partial(ops.accumulate_, sums, terms),
            "torch eager": partial(add_terms, sums, terms),
            "torch compiled": partial(torch.compile(add_terms), sums, terms),
        },
    )
    for dtype, element_bytes in ((torch.bfloat16, 10), (torch.float32, 12)):
        fisher, grads = tensors(), tensors(dtype)
        found[f"fisher_accumulate_, {str(dtype).removeprefix('torch.')} gradients"] = (
            element_bytes * num_elements,
            {
                "igla": partial(ops.fisher_accumulate_, fisher, grads, WEIGHT, False),
                "torch foreach": partial(fisher_foreach, fisher, grads),
                "torch compiled": partial(torch.compile(fisher_eager), fisher, grads),
            },
        )
    pulled = (tensors(), tensors(), tensors(), [f.abs_() for f in tensors()])
    found["ewc_pull_"] = (
        20 * num_elements,
        {
            "igla": partial(ops.ewc_pull_, *pulled, EWC_LAMBDA),
            "torch foreach": partial(pull_foreach, *pulled),
            "torch autograd": partial(pull_autograd, *pulled),
            "torch compiled": partial(torch.compile(pull_eager), *pulled),
        },
    )
    return found


def benchmark_bandwidth(device: str = "cuda", num_elements: int = NUM_ELEMENTS, clock=milliseconds) -> list[dict]:
    """Return a row for each op and implementation: the median of ROUNDS, in turns within every round."""
    rows = []
    copied = 0.0
    for op, (moved_bytes, ways) in bandwidth_cases(device, num_elements).items():
        times: dict[str, list[float]] = {name: [] for name in ways}
        for call in ways.values():
            call()  # not counted: torch.compile compiles here
        for _ in range(ROUNDS):
            for name, call in ways.items():
                times[name].append(clock(call))
        for name in ways:
            median = sorted(times[name])[ROUNDS // 2]
            rate = moved_bytes / median / 1e6
            copied = copied or rate  # the first case is the copy
            rows.append(
                {
                    "op": op,
                    "peer": name,
                    "milliseconds": median,
                    "all_milliseconds": times[name],
                    "gigabytes_per_second": rate,
                    "of_copy": rate / copied,
                }
            )
    return rows


def print_bandwidth(rows: list[dict]) -> None:
    """Print the rows of `benchmark_bandwidth`."""
    columns = ("op", "peer", "ms", "x igla", "GB/s", "of copy")
    table = Table(*columns, title="memory-bound ops; GB/s of the minimum traffic")
    igla_ms = {row["op"]: row["milliseconds"] for row in rows if row["peer"] in ("igla", "copy_")}
    for row in rows:
        ms, rate = row["milliseconds"], row["gigabytes_per_second"]
        ratio = ms / igla_ms[row["op"]]
        table.add_row(row["op"], row["peer"], f"{ms:.3f}", f"{ratio:.2f}", f"{rate:.0f}", f"{row['of_copy']:.0%}")
    Console().print(table)


def print_table(rows: list[dict]) -> None:
    """Print the rows of `benchmark`."""
    columns = ("tokens", "vocabulary", "dtype", "peer", "ms", "x igla", "GB/s", "relative error")
    table = Table(*columns, title="gradient of the cross-entropy, from logits")
    igla_ms = {(r["tokens"], r["vocabulary"], r["dtype"]): r["milliseconds"] for r in rows if r["peer"] == "igla"}
    for row in rows:
        ratio = row["milliseconds"] / igla_ms[row["tokens"], row["vocabulary"], row["dtype"]]
        cells = (
            row["tokens"],
            row["vocabulary"],
            row["dtype"],
            row["peer"],
            f"{row['milliseconds']:.3f}",
            f"{ratio:.2f}",
        )
        table.add_row(*map(str, cells), f"{row['gigabytes_per_second']:.0f}", f"{row['relative_error']:.1e}")
    Console().print(table)
