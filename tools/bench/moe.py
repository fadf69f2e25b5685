"""Measure a training step of a mixture of 8 experts, 2 per token, against Hugging Face transformers' Mixtral.

Both have the same tokens and threads, start with balanced routers (random weights), clip the gradient to 1, and add the
balancing loss. `forced` assigns the tokens to the experts in turn instead of by the router. `+malloc`: freed pages stay
in the process.
"""

import math
from collections.abc import Callable
from typing import Any

from _common import (
    MODELS,
    VOCAB,
    Variant,
    arguments,
    batch_of,
    engine_and_step,
    lay_out,
    paired,
    random_tokens,
    ratio,
    text,
    transformers_sizes,
    transformers_step,
    transformers_tokens,
    write,
)

MOE: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.01}


def hugging_face(keep: bool) -> Callable[[], float]:
    """Build the step of a stock MixtralForCausalLM in fp32 with torch's default AdamW."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    from igla_mega.distributed import host

    if keep:
        host.keep_freed_memory()
    torch.manual_seed(1)
    tokens = transformers_tokens("M")
    config = MixtralConfig(
        **transformers_sizes("M"),
        sliding_window=None,
        num_local_experts=MOE["num_experts"],
        num_experts_per_tok=MOE["num_experts_per_tok"],
        router_aux_loss_coef=MOE["router_aux_loss_coef"],
        output_router_logits=True,  # adds the balancing loss
    )
    return transformers_step(MixtralForCausalLM(config), tokens, tokens)


def ours(precision: str, forced: bool) -> Callable[[], float]:
    return engine_and_step("M", {"moe": {**MOE, "force_balanced": forced}}, precision=precision)[1]


def on_gpu(rounds: int) -> dict[str, dict]:
    """Measure the model FLOP/s utilization of two layers of 8x7B on one GPU in bf16, with real and forced routing.

    All eight experts are on the GPU. A rank of expert parallelism 8 has one expert and the tokens of eight ranks for
    it, which are products of the same size.
    """
    import torch

    from igla_mega.config.load import load_recipe
    from igla_mega.engine.build import build_engine
    from igla_mega.layout.hardware import dense_peak_flops

    num_rows, sequence = 4, 4096
    recipe = load_recipe(
        "moe_8x7b",
        overrides=[
            "model.num_layers=2",
            f"training.batch_size={num_rows}",
            f"training.sequence_length={sequence}",
            "training.expert_capacity_factor=null",
            f"distributed.micro_batch_size={num_rows}",
        ],
    )
    layout, mesh, device = lay_out(recipe, "cuda")
    assert recipe.model is not None and recipe.moe is not None, "recipe 7"
    attention = 6 * recipe.model.num_layers * recipe.model.num_heads * recipe.model.head_size * sequence
    flops = (6 * recipe.model.matmul_parameters(recipe.moe) + attention) * num_rows * sequence
    peak = dense_peak_flops(torch.cuda.get_device_name(device), "bfloat16")
    batch = batch_of(random_tokens(num_rows, sequence + 1).to(device))
    table = {}
    for name, forced in (("real routing", False), ("forced balanced", True)):
        moe = recipe.moe.model_copy(update={"force_balanced": forced})
        engine, _ = build_engine(recipe.model_copy(update={"moe": moe}), layout, mesh, device)
        seconds, report = gpu_steps(engine, batch, rounds + 3)
        median = sorted(seconds[3:])[rounds // 2]  # the first steps compile kernels and allocate
        assert report.load is not None, "the model has experts"
        row = table[name] = {
            "median_ms": round(median * 1e3, 1),
            "mfu": round(flops / median / peak, 4) if peak else None,
            "max_violation": max(report.load.max_violation),
        }
        print(f"{name:16} {row['median_ms']:8.1f} ms  MFU {row['mfu']}  busiest expert {row['max_violation']:+.0%}")
        del engine
        torch.cuda.empty_cache()
    return table


def gpu_steps(engine, batch, num_steps: int) -> tuple[list[float], Any]:
    """Take steps on one batch; return the seconds of each on the GPU's own clock, and the report of the last one."""
    import torch

    from igla_mega.engine.step import train_step

    seconds = []
    for step in range(num_steps):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        report = train_step(engine, iter([batch]), step=step, seed=1, learning_rate=1e-5)
        end.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return seconds, report


def main() -> None:
    parser = arguments(__doc__, rounds=5, threads=True)
    parser.add_argument("--gpu", action="store_true", help="measure only two layers of recipe 7 on one GPU")
    args = parser.parse_args()
    if args.gpu:
        table = on_gpu(max(args.rounds, 10))
        if args.write:
            write("moe_gpu", {"rounds": args.rounds, **table})
        return
    variants = {
        "hf": Variant(hugging_face, (False,), threads=args.threads),
        "hf+malloc": Variant(hugging_face, (True,), threads=args.threads),
        "ours": Variant(ours, ("FP32", False), threads=args.threads),
        "ours, forced": Variant(ours, ("FP32", True), threads=args.threads),
    }
    timings = paired(variants, args.rounds)
    num_tokens = MODELS["M"]["rows"] * MODELS["M"]["sequence"]
    table = {}
    print(f"{num_tokens} tokens a step, {args.threads} threads, {args.rounds} rounds")
    print(f"{'':14} {'median ms':>9} {'tok/s':>6} {'time / hf':>17} {'time / hf+malloc':>17} {'RSS MiB':>8}")
    for name, timing in timings.items():
        # Fresh weights know nothing: any other first loss means that not the same model is timed.
        if abs(timing.first_loss - math.log(VOCAB)) > 0.5:
            raise SystemExit(f"{name}: first loss {timing.first_loss:.3f}, not about ln V = {math.log(VOCAB):.3f}")
        row = table[name] = {
            "median_ms": timing.median_ms,
            "tokens_per_second": round(num_tokens / timing.median),
            "time_over_hf": ratio(timing.seconds, timings["hf"].seconds),
            "time_over_hf_malloc": ratio(timing.seconds, timings["hf+malloc"].seconds),
            "peak_rss_mib": timing.peak_rss_mib,
            "first_loss": round(timing.first_loss, 4),
            "step_seconds": timing.step_seconds,
        }
        print(
            f"{name:14} {row['median_ms']:9.0f} {row['tokens_per_second']:6d} {text(row['time_over_hf']):>17} "
            f"{text(row['time_over_hf_malloc']):>17} {row['peak_rss_mib']:8d}"
        )
    if args.write:
        write("moe", {"rounds": args.rounds, "threads": args.threads, "routing": "real, but for `forced`", **table})


if __name__ == "__main__":
    main()
