"""Compare the fused ops of csrc/ with torch's own operations: 48M elements, far more than fit into any cache."""

import statistics
from collections.abc import Callable

from _common import Variant, arguments, paired, ratio, rounded, text, write

NUM_TENSORS, ROWS, COLUMNS = 12, 2000, 2000
ATTENTION = (1, 32, 11720, 128)  # batch, heads, queries, head size
EWC_LAMBDA, WEIGHT = 30.0, 0.5

Step = Callable[[], float]
"""Function that runs an operation once and returns one number of its result.

The number must be equal for all variants of a case. The result is written into existing tensors where possible.
"""


def seeded(*names: str) -> list:
    """Return a list of NUM_TENSORS fp32 tensors for each name, with the same values in every process."""
    import torch

    from igla_mega.distributed import host

    # As in a run of igla_mega. Without it the variants with temporaries would mostly measure page faults.
    host.keep_freed_memory()
    generator = torch.Generator().manual_seed(1)
    return [[torch.randn(ROWS, COLUMNS, generator=generator) for _ in range(NUM_TENSORS)] for _ in names]


def partials(num_partials: int, type_name: str) -> tuple:
    """Return attention partials: outputs [B, H, S, D] and fp32 log-sum-exps [B, H, S]."""
    import torch

    from igla_mega.distributed import host

    host.keep_freed_memory()
    generator = torch.Generator().manual_seed(1)
    outs = [torch.randn(ATTENTION, generator=generator).to(getattr(torch, type_name)) for _ in range(num_partials)]
    lses = [torch.randn(ATTENTION[:3], generator=generator) for _ in range(num_partials)]
    return outs, lses


def merge_fused(num_partials: int, type_name: str) -> Step:
    """Build the merge of attention partials by igla_mega's op."""
    import torch

    from igla_mega.ops.merge_partials import merge_partials

    outs, lses = partials(num_partials, type_name)
    out, lse = torch.empty(ATTENTION), torch.empty(ATTENTION[:3])

    def step() -> float:
        merge_partials(outs, lses, out=out, lse=lse)
        return out[0, 1, 2, 3].item()

    return step


def merge_eager(num_partials: int, type_name: str) -> Step:
    """Build the merge of attention partials by torch's operations."""
    import torch

    outs, lses = partials(num_partials, type_name)

    def step() -> float:
        lse = torch.stack(lses).logsumexp(0)
        out = torch.exp(lses[0] - lse).unsqueeze(-1) * outs[0].float()
        for partial, part_lse in zip(outs[1:], lses[1:], strict=True):
            out += torch.exp(part_lse - lse).unsqueeze(-1) * partial.float()
        return out[0, 1, 2, 3].item()

    return step


def accumulate_fused() -> Step:
    """Build the sum of bf16 terms into fp32 by igla_mega's op."""
    import torch

    from igla_mega.ops.accumulate import accumulate_

    (terms,), total = partials(1, "bfloat16")[:1], torch.zeros(ATTENTION)

    def step() -> float:
        accumulate_([total], terms)
        return total[0, 1, 2, 3].item()

    return step


def accumulate_torch() -> Step:
    """Build the sum of bf16 terms into fp32 by `add_`."""
    import torch

    (terms,), total = partials(1, "bfloat16")[:1], torch.zeros(ATTENTION)

    def step() -> float:
        total.add_(terms[0])
        return total[0, 1, 2, 3].item()

    return step


def ewc_tensors() -> tuple:
    """Return gradients, weights close to their anchors, the anchors, and a positive Fisher."""
    grads, anchors, drifts, fisher = seeded("grads", "anchors", "drifts", "fisher")
    weights = [a.add(d, alpha=0.1) for a, d in zip(anchors, drifts, strict=True)]
    return grads, weights, anchors, [f.abs_() for f in fisher]


def pull_fused() -> Step:
    """Build the EWC gradient and penalty by igla_mega's op."""
    from igla_mega.ops.ewc_penalty import ewc_pull_

    grads, weights, anchors, fisher = ewc_tensors()
    return lambda: ewc_pull_(grads, weights, anchors, fisher, EWC_LAMBDA)[0].item()


def pull_foreach() -> Step:
    """Compute gradient and penalty only, without the two norms that the fused op returns as well."""
    import torch

    grads, weights, anchors, fisher = ewc_tensors()

    def step() -> float:
        drifts = torch._foreach_sub(weights, anchors)
        pulls = torch._foreach_mul(drifts, fisher)
        torch._foreach_add_(grads, pulls, alpha=EWC_LAMBDA)
        torch._foreach_mul_(drifts, pulls)
        return EWC_LAMBDA / 2 * sum(d.sum().item() for d in drifts)

    return step


def pull_autograd() -> Step:
    """Build the EWC gradient and penalty by autograd."""
    import torch

    grads, weights, anchors, fisher = ewc_tensors()
    for weight, grad in zip(weights, grads, strict=True):
        weight.requires_grad_().grad = grad

    def step() -> float:
        terms = [(f * (w - a) ** 2).sum() for f, w, a in zip(fisher, weights, anchors, strict=True)]
        penalty = EWC_LAMBDA / 2 * torch.stack(terms).sum()
        penalty.backward()
        return penalty.item()

    return step


def fisher_fused(type_name: str) -> Step:
    """Build the accumulation of squared gradients by igla_mega's op."""
    import torch

    from igla_mega.ops.fisher import fisher_accumulate_

    fisher, grads = seeded("fisher", "grads")
    grads = [g.to(getattr(torch, type_name)) for g in grads]

    def step() -> float:
        fisher_accumulate_(fisher, grads, WEIGHT)
        return fisher[3][1, 2].item()

    return step


def fisher_foreach(type_name: str) -> Step:
    """Build the accumulation of squared gradients by torch's foreach operations."""
    import torch

    fisher, grads = seeded("fisher", "grads")
    grads = [g.to(getattr(torch, type_name)) for g in grads]

    def step() -> float:
        wide = [g.float() for g in grads]  # no copy of fp32 gradients
        torch._foreach_addcmul_(fisher, wide, wide, value=WEIGHT)
        return fisher[3][1, 2].item()

    return step


def cases() -> dict[str, dict[str, Variant]]:
    """Return the variants of each case, the fused op first."""
    found = {
        f"merge_partials, {count} partials, {name}": {
            "fused": Variant(merge_fused, (count, name)),
            "eager": Variant(merge_eager, (count, name)),
        }
        for count, name in ((2, "float32"), (2, "bfloat16"), (4, "bfloat16"))
    }
    found["accumulate_, bfloat16 into float32"] = {
        "fused": Variant(accumulate_fused),
        "add_": Variant(accumulate_torch),
    }
    for name in ("bfloat16", "float32"):
        found[f"fisher_accumulate_, {name} gradients"] = {
            "fused": Variant(fisher_fused, (name,)),
            "foreach": Variant(fisher_foreach, (name,)),
        }
    found["ewc_pull_"] = {
        "fused": Variant(pull_fused),
        "foreach": Variant(pull_foreach),
        "autograd": Variant(pull_autograd),
    }
    return found


def main() -> None:
    parser = arguments(__doc__, rounds=21)
    parser.add_argument("--only", default="", help="run only the cases whose name contains this text")
    args = parser.parse_args()
    table: dict[str, dict[str, dict]] = {}
    print(f"{'':42} {'':9} {'median ms':>9} {'least ms':>9} {'time / fused':>20}")
    for name, variants in cases().items():
        if args.only not in name:
            continue
        timings = paired(variants, args.rounds)
        fused = timings["fused"]
        for way, timing in timings.items():
            if abs(timing.first_loss - fused.first_loss) > 1e-4 * abs(fused.first_loss):
                raise SystemExit(f"{name}: {way} returns {timing.first_loss}, and the fused op {fused.first_loss}")
            row = {
                "median_ms": round(timing.median * 1e3, 2),
                "least_ms": round(min(timing.seconds) * 1e3, 2),
                "time_over_fused": ratio(timing.seconds, fused.seconds),
                "result": timing.first_loss,
                "milliseconds": rounded([s * 1e3 for s in timing.seconds], 2),
            }
            table.setdefault(name, {})[way] = row
            median, quartiles = statistics.median(timing.seconds) * 1e3, text(row["time_over_fused"])
            print(f"{name:42} {way:9} {median:9.1f} {row['least_ms']:9.1f} {quartiles:>20}")
    if args.write:
        write("kernels", {"rounds": args.rounds, "elements": NUM_TENSORS * ROWS * COLUMNS, "cases": table})


if __name__ == "__main__":
    main()
