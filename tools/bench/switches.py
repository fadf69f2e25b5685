"""What each switch of the fast path gains: a step with it on against one with it off, all else as it stands.

Each pair lives side by side and takes turns, the order reversed every round. On CUDA the model is eight layers of
recipe 1's width. A switch that this machine cannot try says why; one that fails does not stop the others.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from _common import MODELS, NUM_HEADS, NUM_KV_HEADS, VOCAB, Variant, paired, random_tokens, ratio, text, write

GPU_MODEL = {
    "hidden_size": 4096,
    "num_layers": 8,
    "num_heads": 32,
    "num_kv_heads": 8,
    "intermediate_size": 11008,
}
GPU_ROWS, GPU_MICRO_BATCH, GPU_LENGTH = 8, 2, 4096


@dataclass(frozen=True)
class Switch:
    on: dict = field(default_factory=dict)
    off: dict = field(default_factory=dict)
    """Keys of the recipe, `section.key`."""
    devices: tuple[str, ...] = ("cpu", "cuda")
    num_ranks: int = 1
    transformer_engine: bool = False
    precision: str | None = None
    """Unset: FP32 on a CPU, BF16 on a GPU."""


def switches(device: str) -> dict[str, Switch]:
    """Every switch by name; what is off is what the recipe says without it."""
    whole = GPU_MICRO_BATCH * GPU_LENGTH if device == "cuda" else MODELS["A"]["rows"] * MODELS["A"]["sequence"]
    return {
        "distributed.fused_layers": Switch(off={"distributed.fused_layers": False}),
        "distributed.fused_layers, bf16": Switch(
            off={"distributed.fused_layers": False}, devices=("cpu",), precision="BF16"
        ),
        "optimizer.fused": Switch(off={"optimizer.fused": False}),
        "distributed.loss_chunk (auto against all tokens at once)": Switch(off={"distributed.loss_chunk": whole}),
        "distributed.keep_freed_memory": Switch(on={"distributed.keep_freed_memory": True}, devices=("cpu",)),
        "distributed.precision BF16 against FP32": Switch(
            on={"distributed.precision": "BF16"}, off={"distributed.precision": "FP32"}
        ),
        "distributed.attention cudnn against flash": Switch(
            on={"distributed.attention": "cudnn"}, off={"distributed.attention": "flash"}, devices=("cuda",)
        ),
        "distributed.cuda_graphs": Switch(on={"distributed.cuda_graphs": True}, devices=("cuda",)),
        "distributed.overlap_communication": Switch(
            off={"distributed.overlap_communication": False}, devices=("cuda",), num_ranks=2
        ),
        "distributed.kernels te against local": Switch(
            on={"distributed.kernels": "te"},
            off={"distributed.kernels": "local"},
            devices=("cuda",),
            transformer_engine=True,
        ),
        "distributed.precision FP8 against BF16": Switch(
            on={"distributed.precision": "FP8"},
            off={"distributed.precision": "BF16"},
            devices=("cuda",),
            transformer_engine=True,
        ),
    }


def engine(device_name: str, precision: str, changed: dict) -> Callable[[], float]:
    """Build an engine on this rank; returns the function that takes a step and gives its loss."""
    import torch
    import torch.distributed as dist

    from igla_mega.config.schema import Recipe
    from igla_mega.data.micro_batch import MicroBatch
    from igla_mega.distributed import host
    from igla_mega.distributed.mesh import build_mesh, init_process_groups
    from igla_mega.engine.build import build_engine
    from igla_mega.engine.step import train_step
    from igla_mega.plan.choose import choose_layout

    cuda = device_name == "cuda"
    sizes = {**MODELS["A"], "num_heads": NUM_HEADS, "num_kv_heads": NUM_KV_HEADS}
    rows, length = sizes.pop("rows"), sizes.pop("sequence")
    if cuda:
        sizes, rows, length = GPU_MODEL, GPU_ROWS, GPU_LENGTH
    sections: dict[str, dict] = {
        "training": {"learning_rate": 1e-4, "batch_size": rows, "total_steps": 1000},
        "optimizer": {},
        "distributed": {
            "strategy": "DDP",
            "precision": precision,
            "gradient_checkpointing": "none",
            "tensor_parallel": 1,
            "pipeline_parallel": 1,
            "micro_batch_size": GPU_MICRO_BATCH if cuda else rows,
        },
    }
    for key, value in changed.items():
        section, name = key.split(".")
        sections[section][name] = value
    model = {**sizes, "vocab_size": VOCAB, "max_position": length}
    recipe = Recipe.model_validate({"name": "switches", "model": model, **sections})
    device = host.prepare()
    if recipe.distributed.keep_freed_memory:
        host.keep_freed_memory()
    if not dist.is_initialized():
        init_process_groups(device)
    layout = choose_layout(recipe, dist.get_world_size(), device_name)
    mesh = build_mesh(layout, recipe.training.seed)
    built, _ = build_engine(recipe, layout, mesh, device)
    size = layout.micro_batch_size
    tokens = random_tokens(rows, length + 1).split(size)[mesh.data.rank :: layout.data]
    positions = torch.arange(length).expand(size, length)

    def batches() -> Iterator[MicroBatch]:
        for own in tokens:
            batch = MicroBatch(
                tokens=own[:, :-1].contiguous(),
                labels=own[:, 1:].contiguous(),
                loss_mask=torch.ones(size, length),
                position_ids=positions,
            )
            yield batch.map_tensors(lambda tensor: tensor.to(device))

    return lambda: train_step(built, batches(), step=0, seed=1, learning_rate=1e-4).loss


def reason_not(switch: Switch, device: str) -> str | None:
    """Why this machine cannot try a switch."""
    if device not in switch.devices:
        return f"only on {switch.devices[0]}"
    if switch.transformer_engine and importlib.util.find_spec("transformer_engine") is None:
        return "Transformer Engine is not installed"
    if switch.num_ranks > 1:
        import torch

        if (found := torch.cuda.device_count()) < switch.num_ranks:
            return f"needs {switch.num_ranks} GPUs, {found} found"
    return None


def measure(switch: Switch, device: str, rounds: int, threads: int) -> dict:
    """Times of a step on and off, and how far the losses are apart."""
    precision = switch.precision or ("BF16" if device == "cuda" else "FP32")
    pair = {
        name: Variant(engine, (device, precision, changed), switch.num_ranks, threads)
        for name, changed in (("on", switch.on), ("off", switch.off))
    }
    timings = paired(pair, rounds)
    return {
        "on_ms": round(timings["on"].median * 1e3, 2),
        "off_ms": round(timings["off"].median * 1e3, 2),
        "gain": ratio(timings["off"].seconds, timings["on"].seconds),
        "loss_difference": abs(timings["on"].first_loss - timings["off"].first_loss),
        "on_peak_rss_mib": timings["on"].memory_bytes[0] >> 20,
        "off_peak_rss_mib": timings["off"].memory_bytes[0] >> 20,
    }


def benchmark(
    device: str,
    rounds: int,
    threads: int,
    only: list[str] | None = None,
    keep: Callable[[dict[str, dict]], None] = lambda table: None,
) -> dict[str, dict]:
    """A row for each switch whose name holds one of `only`: its times, why it was not tried, or how it failed.

    Args:
        keep: called with all rows after each.
    """
    table: dict[str, dict] = {}
    for name, switch in switches(device).items():
        if only and not any(word in name for word in only):
            continue
        if reason := reason_not(switch, device):
            table[name] = {"not_tried": reason}
        else:
            try:
                table[name] = measure(switch, device, rounds, threads)
            except (RuntimeError, ValueError, EOFError, ConnectionError) as error:
                table[name] = {"failed": f"{type(error).__name__}: {error}"}
        row = table[name]
        said = f"{text(row['gain'])} x as fast" if "gain" in row else next(iter(row.values()))
        rss = f", RSS {row['on_peak_rss_mib']} against {row['off_peak_rss_mib']} MiB" if "gain" in row else ""
        print(f"{name:58} {said}{rss}", flush=True)
        keep(table)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU where there is one")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", help="parts of names; default: all")
    parser.add_argument("--json", type=Path, help="file for the table")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    if args.device is None:
        import torch

        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    about: dict = {"device": args.device, "rounds": args.rounds, "threads": args.threads}

    def keep(table: dict[str, dict]) -> None:
        about["switches"] = table
        if args.json:
            args.json.write_text(json.dumps(about, indent=1) + "\n")

    table = benchmark(args.device, args.rounds, args.threads, args.only, keep)
    if args.write:
        write("switches", about)
    if any("failed" in row for row in table.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
