"""Compare the planned peak memory of a step with that of torch's allocator, over layouts and recomputation.

The measurement is exact to the byte: the maximum allocated at once within a step, in addition to what the engine holds
before it. Each case runs in new processes, one per rank; the largest rank of each pipeline stage counts. `--write`
keeps the other cases in today's file of results.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from _common import PLAIN, PROJECTIONS, Variant, arguments, batch_of, cases_of, lay_out, steps_of, write

MODEL = {
    "hidden_size": 256,
    "num_layers": 4,
    "num_heads": 8,
    "num_kv_heads": 2,
    "intermediate_size": 688,
    "vocab_size": 4096,
    "max_position": 256,
}
ROWS = 8
LORA = {"lora": {"rank": 16, "alpha": 32, "dropout": 0.05, "target_modules": PROJECTIONS}}
NF4 = {**LORA, "quantization": {"bits": 4, "compute_dtype": "float32"}}
MOE = {"moe": {"num_experts": 4, "num_experts_per_tok": 2, "force_balanced": True}}
"""Mixture of experts with forced balance, which the plan assumes."""
FSDP = {"strategy": "FSDP", "micro_batch_size": 4}
BF16_FULL = {"precision": "BF16", "gradient_checkpointing": "full"}


@dataclass(frozen=True)
class Case:
    """Layout, model and training method of one measurement."""

    ranks: int = 1
    distributed: dict = field(default_factory=dict)
    model: dict = field(default_factory=dict)
    sections: dict = field(default_factory=dict)
    """Further sections of the recipe: `moe`, `lora`, ..."""


CASES: dict[str, Case] = {
    "one process": Case(),
    "recompute full": Case(1, {"gradient_checkpointing": "full"}),
    "recompute selective": Case(1, {"gradient_checkpointing": "selective"}),
    "bf16": Case(1, {"precision": "BF16"}),
    "bf16, recompute full": Case(1, BF16_FULL),
    "8 narrow layers": Case(1, {}, {"num_layers": 8, "hidden_size": 128, "intermediate_size": 512}),
    "micro-batches of 2": Case(1, {"micro_batch_size": 2}),
    "micro-batches of 2, 8 layers, full": Case(
        1, {"micro_batch_size": 2, "gradient_checkpointing": "full"}, {"num_layers": 8}
    ),
    "vocabulary 32000": Case(1, {}, {"vocab_size": 32000}),
    "vocabulary 32000, bf16": Case(1, {"precision": "BF16"}, {"vocab_size": 32000}),
    "tensor 2": Case(2, {"tensor_parallel": 2}),
    "tensor 2, sequence parallel": Case(2, {"tensor_parallel": 2, "sequence_parallel": True}),
    "tensor 2, sequence parallel, full": Case(
        2, {"tensor_parallel": 2, "sequence_parallel": True, "gradient_checkpointing": "full"}
    ),
    "pipeline 2": Case(2, {"pipeline_parallel": 2, "micro_batch_size": 2}),
    "pipeline 2, 2 virtual stages": Case(2, {"pipeline_parallel": 2, "virtual_pipeline": 2, "micro_batch_size": 1}),
    "context 2": Case(2, {"context_parallel": 2}),
    "context 2, full": Case(2, {"context_parallel": 2, "gradient_checkpointing": "full"}),
    "data 2, distributed optimizer": Case(2, {"micro_batch_size": 4}),
    "FSDP 2": Case(2, FSDP),
    "FSDP 2, bf16, full": Case(2, {**FSDP, **BF16_FULL}),
    "FSDP 2, bf16, full, wide": Case(
        2, {**FSDP, **BF16_FULL, "micro_batch_size": 2}, {"hidden_size": 512, "intermediate_size": 1376}
    ),
    "FSDP 2, selective, two micro-batches": Case(
        2, {**FSDP, "micro_batch_size": 2, "gradient_checkpointing": "selective"}
    ),
    "tensor 2 x pipeline 2, selective": Case(
        4,
        {
            "tensor_parallel": 2,
            "pipeline_parallel": 2,
            "sequence_parallel": True,
            "micro_batch_size": 2,
            "gradient_checkpointing": "selective",
        },
    ),
    "experts": Case(1, {}, {}, MOE),
    "experts, bf16, full": Case(1, BF16_FULL, {}, MOE),
    "experts, expert 2": Case(2, {"expert_parallel": 2, "micro_batch_size": 4}, {}, MOE),
    "experts, FSDP 2": Case(2, {**FSDP, "expert_parallel": 1}, {}, MOE),
    "LoRA": Case(1, {}, {}, LORA),
    "LoRA, bf16, full": Case(1, BF16_FULL, {}, LORA),
    "LoRA, tensor 2": Case(2, {"tensor_parallel": 2}, {}, LORA),
    "LoRA, FSDP 2": Case(2, FSDP, {}, LORA),
    "4 bits, LoRA": Case(1, {}, {}, NF4),
    "4 bits, LoRA, bf16, full": Case(
        1, BF16_FULL, {}, {**LORA, "quantization": {"bits": 4, "compute_dtype": "bfloat16"}}
    ),
    "DPO, cached": Case(1, {"micro_batch_size": 4}, {}, {"dpo": {}}),
    "DPO, a second model": Case(1, {"micro_batch_size": 4}, {}, {"dpo": {"reference": "model"}}),
    "DPO, LoRA": Case(1, {"micro_batch_size": 4}, {}, {"dpo": {}, **LORA}),
    "held back by a Fisher": Case(1, {}, {}, {"continual": {"ewc_lambda": 10.0}}),
    "held back by a Fisher, FSDP 2": Case(2, FSDP, {}, {"continual": {"ewc_lambda": 10.0}}),
}


def allocated_peak(step: Callable[[], object]) -> int:
    """Return the peak of bytes allocated by torch's CPU allocator during `step`.

    Only blocks that `step` allocates count. Freeing an older block (with FSDP, the gradients of the previous step) does
    not reduce the sum.
    """
    import torch
    from torch._C._profiler import _EventType

    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    found, waiting = [], list(profile.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        if event.tag == _EventType.Allocation:
            found.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
        waiting.extend(event.children)
    now = peak = 0
    blocks: dict[int, int] = {}
    for _, address, size in sorted(found, key=lambda allocation: allocation[0]):
        # The profiler does not see a block being freed by another thread (gloo's). It is counted as freed when its
        # address is allocated again.
        now -= blocks.pop(address, 0)
        if size > 0:
            blocks[address] = size
            now += size
        peak = max(peak, now)
    return peak


def recipe_of(case: Case):
    """Return the recipe of a case."""
    from igla_mega.config.schema import Recipe

    pairs = 2 if "dpo" in case.sections else 1
    return Recipe.model_validate(
        {
            "name": "memory",
            "model": {**MODEL, **case.model},
            "training": {"learning_rate": 1e-3, "batch_size": ROWS // pairs, "total_steps": 10},
            "distributed": {
                **PLAIN,
                "micro_batch_size": ROWS,
                **case.distributed,
            },
            **({"base_model": "random"} if {"lora", "dpo"} & set(case.sections) else {}),
            **case.sections,
        }
    )


def measure(case: Case) -> dict:
    """Build this rank's engine, take a few steps, and compare the smallest peak with the plan.

    Returns:
        Pipeline rank; predicted bytes held between steps; bytes of weights and of the step's peak in addition to what
        is held, measured and predicted; and the moment of the predicted peak.
    """
    from megatron.core.parallel_state import get_global_memory_buffer

    from igla_mega.plan import activations, parameters

    recipe = recipe_of(case)
    layout, mesh, device = lay_out(recipe, seed=1)
    engine, step = _engine_and_step(recipe, layout, mesh, device)
    step()
    # A message that was sent stays allocated for a random time, which can only add to the peak. One rank sends none.
    peak = min(allocated_peak(step) for _ in range(3 if layout.world_size > 1 else 1))
    if layout.sequence_parallel and layout.tensor > 1:
        # megatron-core gathers sequences into buffers that it allocates in the first step and keeps.
        peak += sum(t.nbytes for t in get_global_memory_buffer().buffer.values())
    stage = mesh.pipeline.rank
    planned = activations.peak(recipe, layout, stage, "cpu")
    held = parameters.held(recipe, layout, stage, device="cpu", data_rank=mesh.data_context.rank)
    gradients = 0 if layout.strategy == "FSDP" else held.gradients
    return {
        "stage": stage,
        "held_bytes": held.weights + held.optimizer + held.memory + gradients,
        "weights_measured_bytes": _weight_bytes(engine.chunks),
        "weights_predicted_bytes": held.weights,
        "measured_bytes": peak,
        "predicted_bytes": planned.total,
        "moment": planned.moment,
    }


def _engine_and_step(recipe, layout, mesh, device) -> tuple:
    """Build the engine of a recipe, with its reference model and Fisher, and the function that takes a step."""
    import torch

    from igla_mega.engine.build import build_engine, frozen_chunks
    from igla_mega.engine.step import train_step
    from igla_mega.objective.ewc import PER_TOKEN, Ewc, FisherMetadata
    from igla_mega.train import dpo_reference

    with tempfile.TemporaryDirectory(prefix="igla-bench-") as folder:
        base = _saved_base(recipe, layout, mesh, device, Path(folder)) if recipe.quantization is not None else None
        engine, _ = build_engine(recipe, layout, mesh, device, base=base)
    if recipe.dpo is not None:
        mode = dpo_reference.mode_of(recipe.dpo, adapters=recipe.lora is not None)
        frozen = frozen_chunks(recipe, layout, mesh, device, None) if mode == "model" else ()
        engine = replace(engine, objective=dpo_reference.objective(recipe.dpo, mode, engine, frozen))
    if recipe.memory is not None:
        ewc = Ewc(mesh, recipe.memory.ewc_lambda)
        states = list(engine.states())
        ewc.hold(states, ewc.allocate(states), FisherMetadata(PER_TOKEN, "model", 1, 1, 1, 1, (), ""))
        engine = replace(engine, ewc=ewc)
    length, rows = recipe.model.max_position, layout.micro_batch_size * layout.rows_per_sample

    def batches() -> Iterator:
        for _ in range(layout.num_microbatches):
            tokens = torch.randint(0, recipe.model.vocab_size, (rows, length + 1))
            batch = batch_of(tokens)
            yield batch._replace(reference=torch.zeros(rows)) if recipe.dpo is not None else batch

    return engine, lambda: train_step(engine, batches(), step=0, seed=1, learning_rate=1e-3).loss


def _weight_bytes(chunks) -> int:
    """Return the bytes of all parameters and of the buffers with 4-bit weights; shared storage counts once."""
    from igla_mega.model.nf4 import Nf4

    found = [getattr(p, "_local_tensor", p) for chunk in chunks for p in chunk.parameters()]
    found += [b for chunk in chunks for m in chunk.modules() if isinstance(m, Nf4) for b in m.buffers()]
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in found}
    return sum(storages.values())


def _saved_base(recipe, layout, mesh, device, folder: Path) -> Path:
    """Save a checkpoint of random weights, to be quantized to 4 bits."""
    from igla_mega.checkpoint import store
    from igla_mega.engine.build import build_engine

    plain = recipe.model_copy(update={"lora": None, "quantization": None})
    engine, _ = build_engine(plain, layout, mesh, device)
    store.save_folder(folder / "base", engine.states(), {}, mesh)
    return folder / "base"


def largest(reports: list[dict]) -> list[dict]:
    """Return the rank with the highest peak of each pipeline stage, with the error of the plan."""
    found = []
    for stage in sorted({report["stage"] for report in reports}):
        one = max((r for r in reports if r["stage"] == stage), key=lambda r: r["measured_bytes"])
        found.append({**one, "error": round(one["predicted_bytes"] / one["measured_bytes"] - 1, 4)})
    return found


def _case(case: Case) -> Callable[[], dict]:
    """Build a variant whose steps return the measurement."""
    report = measure(case)
    return lambda: report


def main() -> None:
    parser = arguments(__doc__, rounds=None)
    parser.add_argument("--only", nargs="*", help="names of cases; default: all")
    args = parser.parse_args()
    table: dict[str, list[dict]] = {}
    print(f"{'':38} {'stage':>5} {'measured MiB':>12} {'plan MiB':>9} {'error':>7}  moment of the peak, by the plan")
    for name, case in CASES.items():
        if args.only and name not in args.only:
            continue
        [step] = steps_of(Variant(_case, (case,), case.ranks, threads=1), 1, warm_up=0)
        table[name] = largest(list(step.results))
        for row in table[name]:
            print(
                f"{name:38} {row['stage']:5} {row['measured_bytes'] / 2**20:12.1f} "
                f"{row['predicted_bytes'] / 2**20:9.1f} {row['error']:+7.1%}  {row['moment']}",
                flush=True,
            )
    if args.write:
        write("memory", {"model": MODEL, "rows": ROWS, "cases": {**cases_of("memory"), **table}})


if __name__ == "__main__":
    main()
