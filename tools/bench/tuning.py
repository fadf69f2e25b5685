"""Seconds of a LoRA step against PEFT on transformers, and the peak memory of preference optimization against SFT.

Recipe 3's adapters (rank 64 on all seven projections, dropout 0.05) on a frozen base of random weights; the second half
of each row are targets. All keep freed pages (`distributed.keep_freed_memory`), as glibc would give them back.
"""

import argparse
from collections.abc import Callable

from _common import (
    MODELS,
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

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, ALPHA, DROPOUT = 64, 128, 0.05
LORA = {"rank": RANK, "alpha": ALPHA, "dropout": DROPOUT, "target_modules": PROJECTIONS}
TARGET_SHARE = 0.5
RECIPES: dict[str, dict] = {
    "lora": {"lora": LORA, "sft": {}},
    "lora, dpo, adapters off": {"lora": LORA, "dpo": {}},
    "sft": {"sft": {}},
    "dpo, cached": {"dpo": {}},
}


def ours(model: str, name: str) -> Callable[[], float]:
    return engine_and_step(model, {"base_model": "random", **RECIPES[name]}, TARGET_SHARE)[1]


def peft_step(model: str) -> Callable[[], float]:
    """LlamaForCausalLM in fp32 under PEFT's adapters, with torch's default AdamW."""
    import peft
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from igla_mega.distributed import host

    host.keep_freed_memory()
    torch.manual_seed(1)
    length = MODELS[model]["sequence"]
    tokens = random_tokens(MODELS[model]["rows"], length)
    labels = tokens.clone()
    labels[:, : round((1 - TARGET_SHARE) * length)] = -100
    llama = LlamaForCausalLM(LlamaConfig(**transformers_sizes(model), tie_word_embeddings=False))
    section = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules=PROJECTIONS, task_type="CAUSAL_LM"
    )
    return transformers_step(peft.get_peft_model(llama, section).train(), tokens, labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["A", "B"], help="default: both")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    tables: dict[str, dict] = {}
    for model in [args.model] if args.model else ["A", "B"]:
        variants = {"peft": Variant(peft_step, (model,), threads=args.threads)}
        variants |= {name: Variant(ours, (model, name), threads=args.threads) for name in RECIPES}
        timings = paired(variants, args.rounds)
        tables[model] = table = {}
        print(f"model {model}, {MODELS[model]['rows']} x {MODELS[model]['sequence']} tokens, {args.rounds} rounds")
        for name, timing in timings.items():
            table[name] = {
                "median_ms": round(timing.median * 1e3, 1),
                "time_over_peft": ratio(timing.seconds, timings["peft"].seconds),
                "peak_rss_mib": timing.memory_bytes[0] >> 20,
                "first_loss": round(timing.first_loss, 4),
                "step_seconds": [round(s, 4) for s in timing.seconds],
            }
            row = table[name]
            times = text(row["time_over_peft"])
            print(f"{name:24} {row['median_ms']:8.0f} ms {times:>17} x peft {row['peak_rss_mib']} MiB")
        for dpo, sft in (("lora, dpo, adapters off", "lora"), ("dpo, cached", "sft")):
            table[dpo]["memory_over_sft"] = round(timings[dpo].memory_bytes[0] / timings[sft].memory_bytes[0], 3)
            print(f"peak memory of {dpo} / {sft}: {table[dpo]['memory_over_sft']:.3f}")
    if args.write:
        write("tuning", {"rounds": args.rounds, "threads": args.threads, "models": tables})


if __name__ == "__main__":
    main()
