"""Peak memory of a rank's step by the plan and by torch's allocator, over layouts and recomputation.

What is measured is exact to the byte: the most that is allocated at once within a step, beyond what the
engine holds before it. Each case runs in processes of its own, one a rank; the largest rank of each stage counts.
"""

import argparse
from collections.abc import Callable

from _common import Processes, Variant, write

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
CASES: dict[str, tuple[int, dict, dict]] = {
    "one process": (1, {}, {}),
    "recompute full": (1, {"gradient_checkpointing": "full"}, {}),
    "recompute selective": (1, {"gradient_checkpointing": "selective"}, {}),
    "bf16": (1, {"precision": "BF16"}, {}),
    "bf16, recompute full": (1, {"precision": "BF16", "gradient_checkpointing": "full"}, {}),
    "8 narrow layers": (1, {}, {"num_layers": 8, "hidden_size": 128, "intermediate_size": 512}),
    "micro-batches of 2": (1, {"micro_batch_size": 2}, {}),
    "micro-batches of 2, 8 layers, full": (
        1,
        {"micro_batch_size": 2, "gradient_checkpointing": "full"},
        {"num_layers": 8},
    ),
    "vocabulary 32000": (1, {}, {"vocab_size": 32000}),
    "vocabulary 32000, bf16": (1, {"precision": "BF16"}, {"vocab_size": 32000}),
    "tensor 2": (2, {"tensor_parallel": 2}, {}),
    "tensor 2, sequence parallel": (2, {"tensor_parallel": 2, "sequence_parallel": True}, {}),
    "tensor 2, sequence parallel, full": (
        2,
        {"tensor_parallel": 2, "sequence_parallel": True, "gradient_checkpointing": "full"},
        {},
    ),
    "pipeline 2": (2, {"pipeline_parallel": 2, "micro_batch_size": 2}, {}),
    "pipeline 2, 2 virtual stages": (
        2,
        {"pipeline_parallel": 2, "virtual_pipeline": 2, "micro_batch_size": 1},
        {},
    ),
    "context 2": (2, {"context_parallel": 2}, {}),
    "context 2, full": (2, {"context_parallel": 2, "gradient_checkpointing": "full"}, {}),
    "data 2, distributed optimizer": (2, {"micro_batch_size": 4}, {}),
    "FSDP 2": (2, {"micro_batch_size": 4, "strategy": "FSDP"}, {}),
    "FSDP 2, bf16, full": (
        2,
        {"micro_batch_size": 4, "strategy": "FSDP", "gradient_checkpointing": "full", "precision": "BF16"},
        {},
    ),
    "tensor 2 x pipeline 2, selective": (
        4,
        {
            "tensor_parallel": 2,
            "pipeline_parallel": 2,
            "sequence_parallel": True,
            "micro_batch_size": 2,
            "gradient_checkpointing": "selective",
        },
        {},
    ),
}


def allocated_peak(step: Callable[[], object]) -> int:
    """Most bytes that torch's CPU allocator has handed out at once during `step`, beyond those it had before."""
    import torch
    from torch._C._profiler import _EventType

    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    found, waiting = [], list(profile.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        if event.tag == _EventType.Allocation:
            found.append((event.start_time_ns, event.extra_fields.alloc_size))
        waiting.extend(event.children)
    now = most = 0
    for _, size in sorted(found, key=lambda allocation: allocation[0]):
        now += size
        most = max(most, now)
    return most


def measure(distributed: dict, model: dict) -> dict:
    """Build this rank's engine, take a few steps, and compare the smallest of them with the plan.

    Returns:
        Pipeline rank, bytes held, bytes of the step's peak beyond these, measured and predicted, and when that is.
    """
    import torch
    import torch.distributed as dist

    from igla_mega import host, parallel
    from igla_mega.assemble import build_engine
    from igla_mega.config.schema import Recipe
    from igla_mega.plan import activations, parameters
    from igla_mega.plan.layout import choose_layout
    from igla_mega.train.step import train_step

    sizes = {**MODEL, **model}
    recipe = Recipe.model_validate(
        {
            "name": "memory",
            "model": sizes,
            "training": {"learning_rate": 1e-3, "batch_size": ROWS, "total_steps": 10},
            "distributed": {
                "strategy": "DDP",
                "precision": "FP32",
                "tensor_parallel": 1,
                "pipeline_parallel": 1,
                "micro_batch_size": ROWS,
                **distributed,
            },
        }
    )
    device = host.prepare()
    if not dist.is_initialized():
        parallel.start(device)
    layout = choose_layout(recipe, dist.get_world_size(), "cpu")
    mesh = parallel.build(layout, 1)
    engine, _ = build_engine(recipe, layout, mesh, device)
    length, rows = sizes["max_position"], layout.micro_batch_size

    def batches():
        for _ in range(layout.num_microbatches):
            tokens = torch.randint(0, sizes["vocab_size"], (rows, length + 1))
            yield {
                "tokens": tokens[:, :-1].contiguous(),
                "labels": tokens[:, 1:].contiguous(),
                "loss_mask": torch.ones(rows, length),
                "position_ids": torch.arange(length).expand(rows, length),
            }

    def step() -> float:
        return train_step(engine, batches(), step=0, seed=1, learning_rate=1e-3).loss

    step()
    # How long a message that was sent lingers is chance, and only adds.
    peak = min(allocated_peak(step) for _ in range(3))
    stage = mesh.pipeline.rank
    planned = activations.peak(recipe, layout, stage, "cpu")
    held = parameters.held(recipe, layout, stage, device="cpu", data_rank=mesh.data_context.rank)
    return {
        "stage": stage,
        "held_bytes": held.weights + held.optimizer + (0 if layout.strategy == "FSDP" else held.gradients),
        "measured_bytes": peak,
        "predicted_bytes": planned.total,
        "moment": planned.moment,
    }


def largest(reports: list[dict]) -> list[dict]:
    """The rank of each pipeline stage that took most, with the plan's error."""
    found = []
    for stage in sorted({report["stage"] for report in reports}):
        one = max((r for r in reports if r["stage"] == stage), key=lambda r: r["measured_bytes"])
        found.append({**one, "error": round(one["predicted_bytes"] / one["measured_bytes"] - 1, 4)})
    return found


def _case(distributed: dict, model: dict) -> Callable[[], dict]:
    report = measure(distributed, model)
    return lambda: report


class _EveryRank(Processes):
    def results(self) -> list[dict]:
        for pipe in self._pipes:
            pipe.send("step")
        return [pipe.recv()[1] for pipe in self._pipes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--only", nargs="*", help="names of cases; default: all")
    args = parser.parse_args()
    table: dict[str, list[dict]] = {}
    print(f"{'':38} {'stage':>5} {'measured MiB':>12} {'plan MiB':>9} {'error':>7}  moment of the peak, by the plan")
    for name, (num_ranks, distributed, model) in CASES.items():
        if args.only and name not in args.only:
            continue
        processes = _EveryRank(Variant(_case, (distributed, model), num_ranks, threads=1))
        table[name] = largest(processes.results())
        processes.stop()
        for row in table[name]:
            print(
                f"{name:38} {row['stage']:5} {row['measured_bytes'] / 2**20:12.1f} "
                f"{row['predicted_bytes'] / 2**20:9.1f} {row['error']:+7.1%}  {row['moment']}",
                flush=True,
            )
    if args.write:
        write("memory", {"model": MODEL, "rows": ROWS, "cases": table})


if __name__ == "__main__":
    main()
