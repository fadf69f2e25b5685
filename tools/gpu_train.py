"""A training step of recipe 1's model (5.93B) on one GPU, beside what the plan says of its time and its memory.

bf16 with fp32 main weights: about 110 GiB before activations, so an H200 or more.
"""

import json
import statistics
import sys
import time
from collections.abc import Iterator

import torch

from igla_mega import host, parallel
from igla_mega.assemble import build_engine
from igla_mega.config.load import load_recipe
from igla_mega.plan import calibration, hardware, search
from igla_mega.plan.search import fixed_sizes
from igla_mega.plan.time import model_flops_per_token
from igla_mega.train.step import train_step

STEPS, MICRO_BATCHES = 5, 4


def measure(length: int) -> dict:
    """Seconds of a step and most bytes allocated, measured and planned.

    Args:
        length: tokens of a row.
    """
    device = host.prepare()
    entry = hardware.of_cuda_name(torch.cuda.get_device_name())
    if entry is None:
        raise SystemExit(f"{torch.cuda.get_device_name()} is not in the hardware table.")
    rows = MICRO_BATCHES * (8192 // length)
    recipe = load_recipe(
        "pretrain_7b",
        overrides=[
            f"training.sequence_length={length}",
            f"training.batch_size={rows}",
            "distributed.strategy=DDP",
            "distributed.gradient_checkpointing=null",
        ],
    )
    used, _ = calibration.of(entry, "BF16")
    planned = search.search(recipe, 1, entry, used.rates).winner
    where = recipe.distributed.model_copy(update=fixed_sizes(planned.layout))
    recipe = recipe.model_copy(update={"distributed": where})
    if not torch.distributed.is_initialized():
        parallel.start(device)
    mesh = parallel.build(planned.layout, 1) if not _built else _built[0]
    _built[:] = [mesh]
    engine, _ = build_engine(recipe, planned.layout, mesh, device)
    size = planned.layout.micro_batch_size

    def batches() -> Iterator[dict]:
        for _ in range(planned.layout.num_microbatches):
            tokens = torch.randint(0, 32000, (size, length + 1), device=device)
            yield {
                "tokens": tokens[:, :-1].contiguous(),
                "labels": tokens[:, 1:].contiguous(),
                "loss_mask": torch.ones(size, length, device=device),
                "position_ids": torch.arange(length, device=device).expand(size, length),
            }

    seconds = []
    for step in range(STEPS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        train_step(engine, batches(), step=step, seed=1, learning_rate=1e-4)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    taken = statistics.median(seconds[1:])
    tokens_per_second = rows * length / taken
    allocated = torch.cuda.max_memory_allocated()
    needs = planned.memory
    found = {
        "sequence_length": length,
        "layout": search.name_of(planned.layout),
        "step_seconds": taken,
        "all_seconds": seconds,
        "tokens_per_second": tokens_per_second,
        "planned_tokens_per_second": 1 / planned.seconds_per_token if planned.step else None,
        "mfu": tokens_per_second * model_flops_per_token(recipe, length) / entry.bf16_flops,
        "allocated_bytes": allocated,
        "reserved_bytes": torch.cuda.max_memory_reserved(),
        "planned_bytes": needs.total - needs.slack - needs.reserved,
        "calibration": str(used.path) if used.path else None,
    }
    print(json.dumps(found, indent=1))
    del engine
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return found


_built: list = []
"""The mesh, which one process builds once."""


if __name__ == "__main__":
    for argument in sys.argv[1:] or ["4096", "8192"]:
        measure(int(argument))
