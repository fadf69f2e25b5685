"""Measure seconds and peak memory of a training step against Hugging Face transformers on the same tokens and threads.

Both clip the gradient to 1. `+malloc`: freed pages stay in the process (`distributed.keep_freed_memory`). A large fp32
product is timed in the same rounds, for the share of its rate that a step reaches.
"""

import math
import statistics
from collections.abc import Callable

from _common import (
    MODELS,
    VOCAB,
    Variant,
    arguments,
    engine_step,
    paired,
    ratio,
    recipe_of,
    text,
    transformers_llama,
    transformers_step,
    transformers_tokens,
    write,
)

PRODUCT = 4096
"""Rows and columns of the matrices of the product."""


def hugging_face(model: str, keep: bool) -> Callable[[], float]:
    """Build the step of a stock LlamaForCausalLM in fp32 with torch's default AdamW."""
    from igla_mega.distributed import host

    if keep:
        host.keep_freed_memory()
    tokens = transformers_tokens(model)
    return transformers_step(transformers_llama(model), tokens, tokens)


def ours(model: str, precision: str) -> Callable[[], float]:
    return engine_step(model, precision=precision)


def product(size: int) -> Callable[[], float]:
    """Build the product of two square fp32 matrices of `size` rows."""
    import torch

    left, right = torch.randn(size, size), torch.randn(size, size)
    out = torch.empty(size, size)

    def multiply() -> float:
        torch.mm(left, right, out=out)
        return 0.0

    return multiply


def step_flops(model: str) -> float:
    """Return the FLOPs of the matrix products of a step: attention counted as causal, recomputation not counted."""
    from igla_mega.plan.time import model_flops_per_token

    rows, sequence = MODELS[model]["rows"], MODELS[model]["sequence"]
    return rows * sequence * model_flops_per_token(recipe_of(model), sequence)


def main() -> None:
    args = arguments(__doc__, threads=True, models=True).parse_args()
    tables: dict[str, dict] = {}
    for model in [args.model] if args.model else ["A", "B"]:
        variants = {
            "hf": Variant(hugging_face, (model, False), threads=args.threads),
            "hf+malloc": Variant(hugging_face, (model, True), threads=args.threads),
            "ours fp32": Variant(ours, (model, "FP32"), threads=args.threads),
            "ours bf16": Variant(ours, (model, "BF16"), threads=args.threads),
            "product": Variant(product, (PRODUCT,), threads=args.threads),
        }
        timings = paired(variants, args.rounds)
        products = [2.0 * PRODUCT**3 / seconds for seconds in timings.pop("product").seconds]
        num_tokens = MODELS[model]["rows"] * MODELS[model]["sequence"]
        table: dict[str, dict] = {}
        tables[model] = table
        print(f"model {model}, {num_tokens} tokens a step, {args.threads} threads, {args.rounds} rounds")
        print(f"{'':10} {'median ms':>9} {'tok/s':>6} {'x hf':>17} {'x hf+malloc':>17} {'RSS MiB':>8} {'/hf':>5}")
        for name, timing in timings.items():
            # Random weights predict uniformly, so any other first loss means that a different model was timed.
            if abs(timing.first_loss - math.log(VOCAB)) > 0.5:
                raise SystemExit(
                    f"{name}: first loss {timing.first_loss:.3f}, not close to ln V = {math.log(VOCAB):.3f}"
                )
            row = table[name] = {
                "median_ms": timing.median_ms,
                "tokens_per_second": round(num_tokens / timing.median),
                "faster_than_hf": ratio(timings["hf"].seconds, timing.seconds),
                "faster_than_hf_malloc": ratio(timings["hf+malloc"].seconds, timing.seconds),
                "peak_rss_mib": timing.peak_rss_mib,
                "peak_rss_over_hf": round(timing.memory_bytes[0] / timings["hf"].memory_bytes[0], 3),
                "first_loss": round(timing.first_loss, 4),
                "step_seconds": timing.step_seconds,
            }
            print(
                f"{name:10} {row['median_ms']:9.0f} {row['tokens_per_second']:6d} {text(row['faster_than_hf']):>17} "
                f"{text(row['faster_than_hf_malloc']):>17} {row['peak_rss_mib']:8d} {row['peak_rss_over_hf']:5.2f}"
            )
        reached = [step_flops(model) / seconds for seconds in timings["ours fp32"].seconds]
        table["ours fp32"]["share_of_product"] = ratio(reached, products)
        print(
            f"product of {PRODUCT} x {PRODUCT}: {statistics.median(products) / 1e9:.0f} GFLOP/s; ours fp32 reaches "
            f"{text(table['ours fp32']['share_of_product'])} of that"
        )
    if args.write:
        write("train_step", {"rounds": args.rounds, "threads": args.threads, "models": tables})


if __name__ == "__main__":
    main()
