"""Measure a training step of recipe 1's model (5.93B) on one GPU, and compare it with the plan and with peers.

    python tools/gpu_train.py CASE [--out FILE] [--tiny]

CASE is a number of tokens per row (4096, 8192); `shard`, one of eight context-parallel ranks of 131,072 tokens;
`transformers` or `transformers-compiled`, the same model there; or `lora`, `qlora`, `lora-peft`, `qlora-peft`: the
adapters of recipes 3 and 4 on a quarter of the layers. All compute in bf16, with fp32 main weights of the trained
parameters: about 110 GiB for 5.93B before activations. A case that does not fit is repeated with the next stronger
recomputation. Model FLOPs count causal attention once, and four of six products of a frozen weight. --tiny tries the
program on any machine.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parent / "bench"))

from igla_mega.checkpoint import store
from igla_mega.config.load import load_recipe
from igla_mega.config.schema import Recipe
from igla_mega.distributed import host
from igla_mega.distributed.mesh import build_mesh, init_process_groups
from igla_mega.engine.build import build_engine
from igla_mega.engine.step import train_step
from igla_mega.layout import hardware
from igla_mega.layout.layout import Layout
from igla_mega.plan import calibration, search
from igla_mega.plan.choose import choose_layout
from igla_mega.plan.memory import of_stage
from igla_mega.plan.search import fixed_sizes
from igla_mega.plan.time import model_flops_per_token

STEPS = 5
TOKENS_OF_A_STEP = 32768
STRONGER = {"none": "selective", "selective": "full"}
SHARD_TOKENS, SHARD_RANKS = 131072, 8
TINY = ["model.hidden_size=128", "model.num_heads=4", "model.num_kv_heads=2", "model.intermediate_size=256",
        "model.num_layers=4", "model.vocab_size=512", "model.max_position=16384"]  # fmt: skip
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def shape(length: int, tiny: bool, *more: str) -> Recipe:
    """Return recipe 1 with rows of `length` tokens, on one device."""
    rows = max(1, (256 if tiny else TOKENS_OF_A_STEP) // length)
    return load_recipe(
        "pretrain_7b",
        overrides=[
            *(TINY if tiny else ["model.max_position=131072"]),
            f"training.sequence_length={length}",
            f"training.batch_size={rows}",
            "distributed.strategy=DDP",
            "distributed.gradient_checkpointing=null",
            *more,
        ],
    )


def timed(step: Callable[[], object], device: torch.device) -> list[float]:
    """Return the seconds of steps after the first one, which allocates and compiles."""
    seconds = []
    for _ in range(STEPS + 1):
        _finish(device)
        started = time.perf_counter()
        step()
        _finish(device)
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def table_entry(device: torch.device) -> hardware.Hardware:
    """Return the entry of this device in the hardware table."""
    if device.type == "cpu":
        return hardware.cpu()
    entry = hardware.of_cuda_name(torch.cuda.get_device_name())
    if entry is None:
        raise SystemExit(f"{torch.cuda.get_device_name()} is not in the hardware table (igla_mega/layout/hardware.py).")
    return entry


def report(recipe: Recipe, seconds: list[float], tokens: int, device: torch.device) -> dict[str, Any]:
    """Return the measurements that every case has."""
    length, entry = recipe.sequence_length, table_entry(device)
    assert length is not None
    rate = tokens / statistics.median(seconds)
    return {
        "step_seconds": statistics.median(seconds),
        "all_seconds": seconds,
        "tokens_per_second": rate,
        "mfu": rate * model_flops_per_token(recipe, length) / entry.bf16_flops,
        "allocated_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        "reserved_bytes": torch.cuda.max_memory_reserved() if device.type == "cuda" else None,
    }


def ours(recipe: Recipe, device: torch.device, base: Path | None = None) -> dict[str, Any]:
    """Measure a step of this engine in the fastest layout that fits, by the plan and in fact, next to that plan."""
    entry = table_entry(device)
    used, _ = calibration.of(entry, "BF16")
    layout, failed = search.search(recipe, 1, entry, used.rates).winner.layout, []
    while True:
        try:
            seconds = _steps(recipe, layout, device, base)
            break
        except torch.OutOfMemoryError:
            failed.append(layout.recompute)
            if layout.recompute not in STRONGER:
                raise
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        layout = replace(layout, recompute=STRONGER[layout.recompute])
    tokens = layout.global_batch * layout.sequence_length
    needs, planned = of_stage(recipe, layout, 0, entry), search.Clock(recipe, layout, entry, used.rates).step()
    return {
        "layout": search.name_of(layout),
        "did_not_fit": failed,
        **report(recipe, seconds, tokens, device),
        "planned_tokens_per_second": tokens / planned.seconds,
        "planned_bytes": needs.total - needs.slack - needs.reserved,
        "calibration": str(used.path) if used.path else None,
    }


def _steps(recipe: Recipe, layout: Layout, device: torch.device, base: Path | None) -> list[float]:
    """Build the engine of a recipe in a layout, and return the seconds of its steps."""
    fixed = recipe.model_copy(update={"distributed": recipe.distributed.model_copy(update=fixed_sizes(layout))})
    engine, _ = build_engine(fixed, layout, parallel_mesh(layout, device), device, base=base)
    assert recipe.model is not None
    from _common import batch_of

    size, length, vocabulary = layout.micro_batch_size, layout.sequence_length, recipe.model.vocab_size

    def batches() -> Iterator:
        for _ in range(layout.num_microbatches):
            tokens = torch.randint(0, vocabulary, (size, length + 1), device=device)
            yield batch_of(tokens)

    return timed(lambda: train_step(engine, batches(), step=0, seed=1, learning_rate=1e-4), device)


_meshes: list = []


def parallel_mesh(layout: Layout, device: torch.device):
    """Return the mesh, which is built once in a process: the process groups cannot be created twice."""
    if not _meshes:
        init_process_groups(device)
        _meshes.append(build_mesh(layout, 1))
    return _meshes[0]


def shard(tiny: bool, device: torch.device) -> dict[str, Any]:
    """Estimate one of eight ranks that share 131,072 tokens.

    A step of one rank's tokens is measured, and its attention within them is replaced by an eighth of the time of all
    ranks' blocks of the ring. Communication is not included.
    """
    import ring_replay

    total = 1024 if tiny else SHARD_TOKENS
    local = total // SHARD_RANKS
    recipe = shape(local, tiny, f"training.batch_size={1 if tiny else 2}", "distributed.gradient_checkpointing=full")
    model, found = recipe.model, ours(recipe, device)
    assert model is not None
    heads, dtype = (model.num_heads, model.num_kv_heads, model.head_size), torch.bfloat16

    def fastest(tokens: int, call: Callable) -> float:
        q, k, v, grad = ring_replay.inputs(tokens, *heads, dtype, device.type)
        call(q, k, v, grad)
        return min(ring_replay.seconds(lambda: call(q, k, v, grad), device.type) for _ in range(3))

    # With full recomputation, attention within the tokens runs forward twice; the ring keeps its result instead.
    within = fastest(local, ring_replay.whole)
    within += fastest(local, lambda q, k, v, grad: ring_replay.whole(q, k, v, None))
    ring = fastest(total, lambda *tensors: ring_replay.replay(*tensors, SHARD_RANKS)) / SHARD_RANKS
    rows = recipe.training.batch_size
    seconds = found["step_seconds"] + int(rows) * model.num_layers * (ring - within)
    rate = int(rows) * local / seconds
    flops = model_flops_per_token(recipe, total)
    return {
        "tokens": total,
        "ranks": SHARD_RANKS,
        "step_seconds": seconds,
        "tokens_per_second_per_gpu": rate,
        "mfu": rate * flops / table_entry(device).bf16_flops,
        "attention_seconds_within": within,
        "attention_seconds_of_the_ring": ring,
        "step_of_its_tokens_alone": found,
    }


def llama(recipe: Recipe, device: torch.device, dtype: torch.dtype):
    """Return the recipe's model in transformers with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = recipe.model
    assert model is not None
    sizes: dict[str, Any] = dict(
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        vocab_size=model.vocab_size,
        max_position_embeddings=model.max_position,
        tie_word_embeddings=model.tie_embeddings,
        use_cache=False,
        attn_implementation="sdpa",
    )
    config = LlamaConfig(**sizes)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return LlamaForCausalLM(config).train()
    finally:
        torch.set_default_dtype(before)


def peer_steps(recipe: Recipe, network, device: torch.device) -> dict[str, Any]:
    """Measure a step of a network of transformers: bf16 by autocast, torch's fused AdamW, clipping to 1."""
    trained = [param for param in network.parameters() if param.requires_grad]
    adam = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    length, rows = recipe.sequence_length, int(recipe.training.batch_size)
    assert length is not None and recipe.model is not None
    tokens = torch.randint(0, recipe.model.vocab_size, (rows, length), device=device)

    def step() -> None:
        adam.zero_grad()
        for row in tokens.split(1):
            with torch.autocast(device.type, torch.bfloat16):
                loss = network(input_ids=row, labels=row).loss / rows
            loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        adam.step()

    return report(recipe, timed(step, device), rows * length, device)


def transformers(recipe: Recipe, device: torch.device, compiled: bool) -> dict[str, Any]:
    """Measure recipe 1's model in transformers, with recomputation if it does not fit without."""
    for recompute in (False, True):
        network = llama(recipe, device, torch.float32)
        if recompute:
            network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        try:
            found = peer_steps(recipe, torch.compile(network) if compiled else network, device)
            return {"recompute": recompute, "compiled": compiled, **found}
        except torch.OutOfMemoryError:
            del network
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    raise SystemExit("transformers: does not fit on this GPU, not even with recomputation")


def tuned(tiny: bool, *, quantized: bool) -> Recipe:
    """Return recipe 3's adapters (recipe 4's with a base in 4 bits) on a quarter of recipe 1's layers."""
    lora = {"rank": 64, "alpha": 128, "dropout": 0.05, "target_modules": PROJECTIONS}
    more = ["base_model=random", f"lora={json.dumps(lora)}", f"model.num_layers={2 if tiny else 8}"]
    if quantized:
        more.append('quantization={"bits": 4}')
    return shape(64 if tiny else 2048, tiny, *more)


def adapters(recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """Measure a step of this engine's adapters."""
    with tempfile.TemporaryDirectory(prefix="igla-bench-") as folder:
        base = saved_base(recipe, device, Path(folder, "base")) if recipe.quantization is not None else None
        return ours(recipe, device, base)


def saved_base(recipe: Recipe, device: torch.device, folder: Path) -> Path:
    """Save a checkpoint of random weights, to be quantized to 4 bits."""
    plain = recipe.model_copy(update={"lora": None, "quantization": None})
    layout = choose_layout(plain, 1, device.type)
    mesh = parallel_mesh(layout, device)
    engine, _ = build_engine(plain, layout, mesh, device)
    states = [state._replace(values={"master": state.values["master"]}) for state in engine.states()]
    store.save_folder(folder, states, {}, mesh)
    return folder


def peft_adapters(recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """Measure the same adapters in PEFT on transformers, with bitsandbytes' layers for a base in 4 bits."""
    import peft

    network = llama(recipe, device, torch.bfloat16)
    if recipe.quantization is not None:
        import bitsandbytes

        for layer in network.model.layers:
            for parent in (layer.self_attn, layer.mlp):
                for name, linear in list(parent.named_children()):
                    if not isinstance(linear, torch.nn.Linear):
                        continue
                    quantized = bitsandbytes.nn.Linear4bit(
                        linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16,
                        quant_type="nf4", compress_statistics=True,
                    )  # fmt: skip
                    quantized.weight = bitsandbytes.nn.Params4bit(
                        linear.weight.data.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True
                    )
                    setattr(parent, name, quantized.to(device))
    lora = recipe.lora
    assert lora is not None
    section = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=int(lora.alpha),
        lora_dropout=lora.dropout,
        target_modules=PROJECTIONS,
        task_type="CAUSAL_LM",
    )
    network = peft.get_peft_model(network, section)  # keeps the adapters in fp32
    return peer_steps(recipe, network.train(), device)


def run(case: str, tiny: bool) -> dict[str, Any]:
    """Measure a case."""
    device = host.prepare()
    if case.isdigit():
        return ours(shape(int(case), tiny), device)
    if case == "shard":
        return shard(tiny, device)
    if case.startswith("transformers"):
        return transformers(shape(64 if tiny else 4096, tiny), device, case.endswith("compiled"))
    recipe = tuned(tiny, quantized=case.startswith("q"))
    return peft_adapters(recipe, device) if case.endswith("peft") else adapters(recipe, device)


CASES = ["4096", "8192", "shard", "transformers", "transformers-compiled", "lora", "qlora", "lora-peft", "qlora-peft"]


def main() -> None:
    """Measure one case, in a process that has the whole GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=[*CASES, "64"], metavar="CASE")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    found = run(args.case, args.tiny)
    print(json.dumps(found, indent=1))
    if args.out:
        args.out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
