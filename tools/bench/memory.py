"""Peak memory of a rank's step by the plan and by torch's allocator, over layouts and recomputation.

What is measured is exact to the byte: the most that is allocated at once within a step, beyond what the
engine holds before it. Each case runs in processes of its own, one a rank; the largest rank of each stage counts.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from _common import Processes, Variant, cases_of, write

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
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = {"lora": {"rank": 16, "alpha": 32, "dropout": 0.05, "target_modules": PROJECTIONS}}
NF4 = {**LORA, "quantization": {"bits": 4, "compute_dtype": "float32"}}
MOE = {"moe": {"num_experts": 4, "num_experts_per_tok": 2, "force_balanced": True}}
"""Balanced, as the plan takes them to be."""
FSDP = {"strategy": "FSDP", "micro_batch_size": 4}
BF16_FULL = {"precision": "BF16", "gradient_checkpointing": "full"}


@dataclass(frozen=True)
class Case:
    """An engine to measure."""

    ranks: int = 1
    distributed: dict = field(default_factory=dict)
    model: dict = field(default_factory=dict)
    sections: dict = field(default_factory=dict)
    """More of the recipe: `moe`, `lora`, ..."""


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
    """Most bytes that torch's CPU allocator has handed out at once during `step`, beyond those it had before.

    What was there before and is freed is not taken off (with FSDP the gradients of the step before).
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
    now = most = 0
    own: dict[int, int] = {}
    for _, address, size in sorted(found, key=lambda allocation: allocation[0]):
        # A block that another thread freed (gloo's) is not heard of again until its place is given out anew.
        now -= own.pop(address, 0)
        if size > 0:
            own[address] = size
            now += size
        most = max(most, now)
    return most


def recipe_of(case: Case):
    """The case as a recipe."""
    from igla_mega.config.schema import Recipe

    pairs = 2 if "dpo" in case.sections else 1
    return Recipe.model_validate(
        {
            "name": "memory",
            "model": {**MODEL, **case.model},
            "training": {"learning_rate": 1e-3, "batch_size": ROWS // pairs, "total_steps": 10},
            "distributed": {
                "strategy": "DDP",
                "precision": "FP32",
                "tensor_parallel": 1,
                "pipeline_parallel": 1,
                "micro_batch_size": ROWS,
                **case.distributed,
            },
            **({"base_model": "random"} if {"lora", "dpo"} & set(case.sections) else {}),
            **case.sections,
        }
    )


def measure(case: Case) -> dict:
    """Build this rank's engine, take a few steps, and compare the smallest of them with the plan.

    Returns:
        Pipeline rank; bytes that stay, bytes of weights, and bytes of the step's peak beyond what stays, measured and
        predicted; and when the peak is.
    """
    import torch
    import torch.distributed as dist
    from megatron.core.parallel_state import get_global_memory_buffer

    from igla_mega.distributed import host
    from igla_mega.distributed.mesh import build_mesh, init_process_groups
    from igla_mega.engine.build import build_engine, frozen_chunks
    from igla_mega.engine.step import train_step
    from igla_mega.objective.ewc import PER_TOKEN, Ewc, FisherMetadata
    from igla_mega.plan import activations, parameters
    from igla_mega.plan.choose import choose_layout
    from igla_mega.train import dpo_reference

    recipe = recipe_of(case)
    assert recipe.model is not None
    device = host.prepare()
    if not dist.is_initialized():
        init_process_groups(device)
    layout = choose_layout(recipe, dist.get_world_size(), "cpu")
    mesh = build_mesh(layout, 1)
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

    from igla_mega.data.micro_batch import MicroBatch

    def batches() -> Iterator[MicroBatch]:
        for _ in range(layout.num_microbatches):
            tokens = torch.randint(0, recipe.model.vocab_size, (rows, length + 1))  # type: ignore[union-attr]
            yield MicroBatch(
                tokens[:, :-1].contiguous(),
                tokens[:, 1:].contiguous(),
                torch.ones(rows, length),
                torch.arange(length).expand(rows, length),
                reference=torch.zeros(rows) if recipe.dpo is not None else None,
            )

    def step() -> float:
        return train_step(engine, batches(), step=0, seed=1, learning_rate=1e-3).loss

    step()
    # How long a message that was sent lingers is chance, and only adds; one rank sends none.
    peak = min(allocated_peak(step) for _ in range(3 if dist.get_world_size() > 1 else 1))
    if layout.sequence_parallel and layout.tensor > 1:
        # Kept from the first step on: what megatron-core gathers sequences into.
        peak += sum(t.nbytes for t in get_global_memory_buffer().buffer.values())
    stage = mesh.pipeline.rank
    planned = activations.peak(recipe, layout, stage, "cpu")
    held = parameters.held(recipe, layout, stage, device="cpu", data_rank=mesh.data_context.rank)
    return {
        "stage": stage,
        "held_bytes": held.weights
        + held.optimizer
        + held.memory
        + (0 if layout.strategy == "FSDP" else held.gradients),
        "weights_measured_bytes": _weight_bytes(engine.chunks),
        "weights_predicted_bytes": held.weights,
        "measured_bytes": peak,
        "predicted_bytes": planned.total,
        "moment": planned.moment,
    }


def _weight_bytes(chunks) -> int:
    """Of all parameters, and of the buffers that hold codes."""
    from igla_mega.model.nf4 import Nf4

    found = [getattr(p, "_local_tensor", p) for chunk in chunks for p in chunk.parameters()]
    found += [b for chunk in chunks for m in chunk.modules() if isinstance(m, Nf4) for b in m.buffers()]
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in found}
    return sum(storages.values())


def _saved_base(recipe, layout, mesh, device, folder: Path) -> Path:
    """A checkpoint of random weights, to be coded in 4 bits."""
    from igla_mega.checkpoint import store
    from igla_mega.engine.build import build_engine

    plain = recipe.model_copy(update={"lora": None, "quantization": None})
    engine, _ = build_engine(plain, layout, mesh, device)
    store.save_folder(folder / "base", engine.states(), {}, mesh)
    return folder / "base"


def largest(reports: list[dict]) -> list[dict]:
    """The rank of each pipeline stage that took most, with the plan's error."""
    found = []
    for stage in sorted({report["stage"] for report in reports}):
        one = max((r for r in reports if r["stage"] == stage), key=lambda r: r["measured_bytes"])
        found.append({**one, "error": round(one["predicted_bytes"] / one["measured_bytes"] - 1, 4)})
    return found


def _case(case: Case) -> Callable[[], dict]:
    report = measure(case)
    return lambda: report


class _EveryRank(Processes):
    def results(self) -> list[dict]:
        for pipe in self._pipes:
            pipe.send("step")
        return [pipe.recv()[1] for pipe in self._pipes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="beside what the same day's file has of other cases")
    parser.add_argument("--only", nargs="*", help="names of cases; default: all")
    args = parser.parse_args()
    table: dict[str, list[dict]] = {}
    print(f"{'':38} {'stage':>5} {'measured MiB':>12} {'plan MiB':>9} {'error':>7}  moment of the peak, by the plan")
    for name, case in CASES.items():
        if args.only and name not in args.only:
            continue
        processes = _EveryRank(Variant(_case, (case,), case.ranks, threads=1))
        table[name] = largest(processes.results())
        processes.stop()
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
