"""Seconds of a training step of a mixture of 8 experts, 2 a token, against Hugging Face transformers' Mixtral on the
same tokens and threads.

Both start from balanced routers (fresh weights), clip the gradient to 1, and add the balancing loss. `forced` sends the
tokens to experts in turn instead of where the router would. `+malloc`: freed pages stay in the process.
"""

import argparse
import math
from collections.abc import Callable
from typing import Any

from _common import (
    MODELS,
    VOCAB,
    Variant,
    engine_and_step,
    paired,
    random_tokens,
    ratio,
    text,
    transformers_sizes,
    transformers_step,
    write,
)

MOE: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.01}


def hugging_face(keep: bool) -> Callable[[], float]:
    """Stock MixtralForCausalLM in fp32 with torch's default AdamW."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    from igla_mega.distributed import host

    if keep:
        host.keep_freed_memory()
    torch.manual_seed(1)
    tokens = random_tokens(MODELS["M"]["rows"], MODELS["M"]["sequence"])
    config = MixtralConfig(
        **transformers_sizes("M"),
        sliding_window=None,
        num_local_experts=MOE["num_experts"],
        num_experts_per_tok=MOE["num_experts_per_tok"],
        router_aux_loss_coef=MOE["router_aux_loss_coef"],
        output_router_logits=True,  # which adds the balancing loss
    )
    return transformers_step(MixtralForCausalLM(config), tokens, tokens)


def ours(precision: str, forced: bool) -> Callable[[], float]:
    return engine_and_step("M", {"moe": {**MOE, "force_balanced": forced}}, precision=precision)[1]


def on_gpu(rounds: int) -> dict[str, dict]:
    """Model FLOP/s utilization of two layers of 8x7B, all eight experts, on one GPU, in bf16: real routing and forced.

    A rank of eight that share the experts has one of them and the tokens of eight ranks for it: the same products.
    """
    import torch

    from igla_mega.config.load import load_recipe
    from igla_mega.data.micro_batch import MicroBatch
    from igla_mega.distributed import host
    from igla_mega.distributed.mesh import build_mesh, init_process_groups
    from igla_mega.engine.build import build_engine
    from igla_mega.engine.step import train_step
    from igla_mega.layout.hardware import dense_peak_flops
    from igla_mega.plan.choose import choose_layout

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
    device = host.prepare()
    init_process_groups(device)
    layout = choose_layout(recipe, 1, "cuda")
    mesh = build_mesh(layout, recipe.training.seed)
    assert recipe.model is not None and recipe.moe is not None, "recipe 7"
    attention = 6 * recipe.model.num_layers * recipe.model.num_heads * recipe.model.head_size * sequence
    flops = (6 * recipe.model.matmul_parameters(recipe.moe) + attention) * num_rows * sequence
    peak = dense_peak_flops(torch.cuda.get_device_name(device), "bfloat16")
    tokens = random_tokens(num_rows, sequence + 1).to(device)
    batch = MicroBatch(
        tokens=tokens[:, :-1].contiguous(),
        labels=tokens[:, 1:].contiguous(),
        loss_mask=torch.ones(num_rows, sequence, device=device),
        position_ids=torch.arange(sequence, device=device).expand(num_rows, sequence),
    )
    table = {}
    for name, forced in (("real routing", False), ("forced balanced", True)):
        moe = recipe.moe.model_copy(update={"force_balanced": forced})
        engine, _ = build_engine(recipe.model_copy(update={"moe": moe}), layout, mesh, device)
        seconds = []
        for step in range(rounds + 3):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            report = train_step(engine, iter([batch]), step=step, seed=1, learning_rate=1e-5)
            end.record()
            torch.cuda.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3)
        median = sorted(seconds[3:])[rounds // 2]
        assert report.load is not None, "it has experts"
        row = table[name] = {
            "median_ms": round(median * 1e3, 1),
            "mfu": round(flops / median / peak, 4) if peak else None,
            "max_violation": max(report.load.max_violation),
        }
        print(f"{name:16} {row['median_ms']:8.1f} ms  MFU {row['mfu']}  busiest expert {row['max_violation']:+.0%}")
        del engine
        torch.cuda.empty_cache()
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--gpu", action="store_true", help="two layers of recipe 7 on one GPU, by themselves")
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
            "median_ms": round(timing.median * 1e3, 1),
            "tokens_per_second": round(num_tokens / timing.median),
            "time_over_hf": ratio(timing.seconds, timings["hf"].seconds),
            "time_over_hf_malloc": ratio(timing.seconds, timings["hf+malloc"].seconds),
            "peak_rss_mib": timing.memory_bytes[0] >> 20,
            "first_loss": round(timing.first_loss, 4),
            "step_seconds": [round(s, 4) for s in timing.seconds],
        }
        print(
            f"{name:14} {row['median_ms']:9.0f} {row['tokens_per_second']:6d} {text(row['time_over_hf']):>17} "
            f"{text(row['time_over_hf_malloc']):>17} {row['peak_rss_mib']:8d}"
        )
    if args.write:
        write("moe", {"rounds": args.rounds, "threads": args.threads, "routing": "real, but for `forced`", **table})


if __name__ == "__main__":
    main()
