"""Measure causal ring attention, forward and backward: against the bare op on one rank, torch's own ring on several.

`torch.distributed.tensor.experimental.context_parallel` does not run on CPU: it finds no sharding strategy for
aten._scaled_dot_product_flash_attention_for_cpu. The ring of torch 2.13 that it would call does run with that op, and
is called here directly with both of its rotation methods, without the cost of its dispatch.

    one rank    seconds of ring_attention over those of F.scaled_dot_product_attention, in turns in one process
    CPU time    user seconds of all ranks over those of one rank at the same total length, and the busiest over the mean
    torch       its seconds over ours, our peak bytes over its: of tensors, above the inputs, of the worst rank
"""

import itertools
import math
import resource
import statistics
import time
from collections.abc import Callable

from _common import Variant, arguments, in_turns, ratio, text, write

HEADS, KV_HEADS, HEAD_SIZE = 8, 2, 64
SCHEDULES = ("p2p", "allgather", "a2a+p2p")
TORCHS = {"torch, all-gather": "allgather", "torch, all-to-all": "alltoall"}


def inputs(length: int) -> list:
    """Return this rank's shards of q, k, v [S, B, H, D] and of the gradient of the output."""
    import torch
    import torch.distributed as dist

    from igla_mega.ops.zigzag import zigzag_shard

    generator = torch.Generator().manual_seed(1)
    group = dist.group.WORLD if dist.is_initialized() else None
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    return [zigzag_shard(torch.randn(length, 1, n, HEAD_SIZE, generator=generator), group, 0).clone() for n in heads]


def ours(length: int, schedule: str) -> Callable[[], dict]:
    """Build the step of igla_mega's ring attention."""
    import torch
    import torch.distributed as dist

    from igla_mega.ops.ring_attention import ring_attention

    q, k, v, grad_out = inputs(length)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    group = dist.group.WORLD if dist.is_initialized() else None

    def run() -> list:
        out = ring_attention(q, k, v, group, schedule=schedule)
        assert isinstance(out, torch.Tensor), "no log-sum-exp was asked for"
        return list(torch.autograd.grad(out, leaves, grad_out))

    return measured(run)


def torchs(length: int, rotate: str) -> Callable[[], dict]:
    """Build the step of torch's ring attention."""
    import torch
    import torch.distributed as dist
    from torch.distributed.tensor.experimental._context_parallel import _attention as theirs

    q, k, v, grad_out = (t.permute(1, 2, 0, 3).contiguous() for t in inputs(length))
    options = {"dropout_p": 0.0, "is_causal": True, "scale": HEAD_SIZE**-0.5}
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    theirs.set_rotate_method(rotate)
    group = dist.group.WORLD
    assert group is not None, "torch's ring needs several ranks"

    def run() -> list:
        out, lse = theirs._templated_ring_attention(group, 2, attend, q, k, v, **options)
        return list(
            theirs._templated_ring_attention_backward(
                group, 2, attend_backward, grad_out, "grad_out", q, k, v, out, lse, **options
            )
        )

    return measured(run)


def measured(run: Callable[[], list]) -> Callable[[], dict]:
    """Build a step that returns seconds of the slowest rank, user CPU seconds of each, peak bytes and gradient norm."""
    import torch
    import torch.distributed as dist

    def of_all(value: float) -> list[float]:
        if not dist.is_initialized():
            return [value]
        values = [torch.zeros(1, dtype=torch.float64) for _ in range(dist.get_world_size())]
        dist.all_gather(values, torch.tensor([value], dtype=torch.float64))
        return [v.item() for v in values]

    norm = math.sqrt(sum(of_all(sum(grad.double().square().sum().item() for grad in run()))))
    peak_bytes = max(of_all(_peak_bytes(run)))

    def step() -> dict:
        of_all(0.0)  # a barrier: all ranks start together
        before, started = resource.getrusage(resource.RUSAGE_SELF).ru_utime, time.perf_counter()
        run()
        seconds = time.perf_counter() - started
        cpu_seconds = resource.getrusage(resource.RUSAGE_SELF).ru_utime - before
        return {
            "seconds": max(of_all(seconds)),
            "cpu_seconds": of_all(cpu_seconds),
            "peak_bytes": peak_bytes,
            "norm": norm,
        }

    return step


def _peak_bytes(run: Callable[[], list]) -> int:
    """Return the peak of bytes that torch's allocator holds during `run`, in addition to those before it."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns())))


def one_rank(length: int) -> Callable[[], dict]:
    """Build a step that runs the bare op and ring_attention, and returns the seconds of each."""
    import torch
    from torch.nn import functional as F

    from igla_mega.ops.ring_attention import ring_attention

    q, k, v, grad_out = inputs(length)
    leaves = [t.requires_grad_() for t in (q, k, v)]

    def bare() -> torch.Tensor:
        by_head = [t.permute(1, 2, 0, 3) for t in (q, k, v)]
        out = F.scaled_dot_product_attention(by_head[0], by_head[1], by_head[2], is_causal=True, enable_gqa=True)
        return out.permute(2, 0, 1, 3)

    def ring() -> torch.Tensor:
        out = ring_attention(q, k, v, None)
        assert isinstance(out, torch.Tensor), "no log-sum-exp was asked for"
        return out

    def step() -> dict:
        taken = {}
        for name, attend in {"bare": bare, "ring": ring}.items():
            started = time.perf_counter()
            torch.autograd.grad(attend(), leaves, grad_out)
            taken[name] = time.perf_counter() - started
        return taken

    return step


def results_of(variants: dict[str, Variant], rounds: int) -> dict[str, list[dict]]:
    """Return what the steps of every variant return on rank 0."""
    _, steps = in_turns(variants, rounds)
    return {name: [step.results[0] for step in taken] for name, taken in steps.items()}


def compare_one_rank(lengths: list[int], rounds: int) -> dict:
    """Compare ring_attention with the bare op on one rank, for each length in tokens."""
    table = {}
    print(f"one rank, 2 threads: {'tokens':>8} {'bare ms':>9} {'ring / bare':>20}")
    for length in lengths:
        results = results_of({"": Variant(one_rank, (length,))}, rounds)[""]
        bare, ring = ([seconds[name] for seconds in results] for name in ("bare", "ring"))
        table[length] = {"bare_ms": round(statistics.median(bare) * 1e3, 2), "ring_over_bare": ratio(ring, bare)}
        print(f"{'':20} {length:8d} {table[length]['bare_ms']:9.2f} {text(table[length]['ring_over_bare']):>20}")
    return table


def compare_ranks(length: int, num_ranks: int, rounds: int) -> dict:
    """Compare our schedules and torch's on several ranks with one rank, for sequences of `length` tokens in total."""
    several = {"num_ranks": num_ranks, "threads": 1}
    variants = {"one rank": Variant(ours, (length, "p2p"), threads=1)}
    variants |= {schedule: Variant(ours, (length, schedule), **several) for schedule in SCHEDULES}
    variants |= {name: Variant(torchs, (length, rotate), **several) for name, rotate in TORCHS.items()}
    results = results_of(variants, rounds)
    table: dict[str, dict] = {}
    print(f"{length} tokens on {num_ranks} ranks of one thread, {rounds} rounds")
    print(
        f"{'':18} {'median ms':>9} {'CPU / one rank':>17} {'busiest / mean':>17} {'MiB':>6} "
        f"{'p2p is faster by':>17} {'p2p MiB / its':>13}"
    )
    for name, steps in results.items():
        if abs(steps[0]["norm"] / results["one rank"][0]["norm"] - 1) > 1e-5:
            raise SystemExit(
                f"{name}: gradient norm {steps[0]['norm']}; on one rank it is {results['one rank'][0]['norm']}"
            )
        cpu_seconds = {which: [sum(step["cpu_seconds"]) for step in results[which]] for which in (name, "one rank")}
        row = table[name] = {
            "median_ms": round(statistics.median(step["seconds"] for step in steps) * 1e3, 1),
            "cpu_over_one_rank": ratio(cpu_seconds[name], cpu_seconds["one rank"]),
            "busiest_over_mean": ratio(
                [max(step["cpu_seconds"]) for step in steps], [statistics.mean(step["cpu_seconds"]) for step in steps]
            ),
            "peak_mib": round(steps[0]["peak_bytes"] / 2**20, 2),
            "p2p_faster_by": ratio([step["seconds"] for step in steps], [step["seconds"] for step in results["p2p"]]),
            "p2p_peak_over_its": round(results["p2p"][0]["peak_bytes"] / steps[0]["peak_bytes"], 3),
        }
        print(
            f"{name:18} {row['median_ms']:9.0f} {text(row['cpu_over_one_rank']):>17} "
            f"{text(row['busiest_over_mean']):>17} {row['peak_mib']:6.1f} {text(row['p2p_faster_by']):>17} "
            f"{row['p2p_peak_over_its']:13.2f}"
        )
    return table


def main() -> None:
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 16384], help="total tokens of the sequences")
    parser.add_argument("--ranks", type=int, default=4)
    args = parser.parse_args()
    one = compare_one_rank([256, 2048, *args.lengths], 4 * args.rounds)
    several = {length: compare_ranks(length, args.ranks, args.rounds) for length in args.lengths}
    if args.write:
        write("ring", {"rounds": args.rounds, "ranks": args.ranks, "one_rank": one, "lengths": several})


if __name__ == "__main__":
    main()
