"""Measure a LoRA step against PEFT on transformers, and the peak memory of preference optimization against SFT.

Adapters of recipe 3 (rank 64 on all seven projections, dropout 0.05) on a frozen base of random weights; the second
half of each row are targets. All variants keep freed pages (`distributed.keep_freed_memory`), which glibc would return
to the system.
"""

from collections.abc import Callable

from _common import (
    MODELS,
    PROJECTIONS,
    Variant,
    arguments,
    engine_and_step,
    paired,
    ratio,
    text,
    transformers_llama,
    transformers_step,
    transformers_tokens,
    write,
)

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
    """Build the step of LlamaForCausalLM in fp32 with PEFT's adapters and torch's default AdamW."""
    import peft

    from igla_mega.distributed import host

    host.keep_freed_memory()
    tokens = transformers_tokens(model)
    labels = tokens.clone()
    labels[:, : round((1 - TARGET_SHARE) * MODELS[model]["sequence"])] = -100  # ignored by transformers' loss
    llama = transformers_llama(model)
    section = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules=PROJECTIONS, task_type="CAUSAL_LM"
    )
    return transformers_step(peft.get_peft_model(llama, section).train(), tokens, labels)


def main() -> None:
    args = arguments(__doc__, threads=True, models=True).parse_args()
    tables: dict[str, dict] = {}
    for model in [args.model] if args.model else ["A", "B"]:
        variants = {"peft": Variant(peft_step, (model,), threads=args.threads)}
        variants |= {name: Variant(ours, (model, name), threads=args.threads) for name in RECIPES}
        timings = paired(variants, args.rounds)
        tables[model] = table = {}
        print(f"model {model}, {MODELS[model]['rows']} x {MODELS[model]['sequence']} tokens, {args.rounds} rounds")
        for name, timing in timings.items():
            table[name] = {
                "median_ms": timing.median_ms,
                "time_over_peft": ratio(timing.seconds, timings["peft"].seconds),
                "peak_rss_mib": timing.peak_rss_mib,
                "first_loss": round(timing.first_loss, 4),
                "step_seconds": timing.step_seconds,
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
