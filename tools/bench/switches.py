"""Measure the gain of each performance switch: a step with the switch on against one with it off, all else equal.

The two variants of a pair run alternately, in an order that is reversed every round. On CUDA the model is eight layers
of recipe 1's width. For a switch that this machine cannot try, the reason is reported; one that fails does not stop the
others.
"""

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from _common import (
    MODELS,
    NUM_HEADS,
    NUM_KV_HEADS,
    PLAIN,
    VOCAB,
    Variant,
    arguments,
    batch_of,
    lay_out,
    paired,
    random_tokens,
    ratio,
    text,
    write,
)

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
    """Recipe keys that turn a feature on and off, and what the machine needs for it."""

    on: dict = field(default_factory=dict)
    """Values by key of the recipe, `section.key`, with the switch on; empty if that is the default."""
    off: dict = field(default_factory=dict)
    """The same with the switch off."""
    devices: tuple[str, ...] = ("cpu", "cuda")
    num_ranks: int = 1
    transformer_engine: bool = False
    precision: str | None = None
    """Precision of both variants; None for FP32 on a CPU and BF16 on a GPU."""


def switches(device: str) -> dict[str, Switch]:
    """Return every switch by name."""
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
    """Build an engine on this rank with some recipe keys changed; return the function that takes a step."""
    from igla_mega.distributed import host
    from igla_mega.engine.build import build_engine
    from igla_mega.engine.step import train_step

    recipe, length = changed_recipe(device_name == "cuda", precision, changed)
    if recipe.distributed.keep_freed_memory:
        host.keep_freed_memory()
    layout, mesh, device = lay_out(recipe, device_name)
    built, _ = build_engine(recipe, layout, mesh, device)
    micro_batches = random_tokens(recipe.training.batch_size, length + 1).split(layout.micro_batch_size)

    def batches() -> Iterator:
        for tokens in micro_batches[mesh.data.rank :: layout.data]:
            yield batch_of(tokens.to(device))

    return lambda: train_step(built, batches(), step=0, seed=1, learning_rate=1e-4).loss


def changed_recipe(cuda: bool, precision: str, changed: dict) -> tuple:
    """Return a recipe with some keys changed, and its sequence length in tokens."""
    from igla_mega.config.schema import Recipe

    sizes = {**MODELS["A"], "num_heads": NUM_HEADS, "num_kv_heads": NUM_KV_HEADS}
    rows, length = sizes.pop("rows"), sizes.pop("sequence")
    if cuda:
        sizes, rows, length = GPU_MODEL, GPU_ROWS, GPU_LENGTH
    sections: dict[str, dict] = {
        "training": {"learning_rate": 1e-4, "batch_size": rows, "total_steps": 1000},
        "optimizer": {},
        "distributed": {
            **PLAIN,
            "precision": precision,
            "micro_batch_size": GPU_MICRO_BATCH if cuda else rows,
        },
    }
    for key, value in changed.items():
        section, name = key.split(".")
        sections[section][name] = value
    model = {**sizes, "vocab_size": VOCAB, "max_position": length}
    return Recipe.model_validate({"name": "switches", "model": model, **sections}), length


def reason_not(switch: Switch, device: str) -> str | None:
    """Return the reason if this machine cannot try a switch, else None."""
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
    """Return the times of a step with the switch on and off, and the difference of the first losses."""
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
        "on_peak_rss_mib": timings["on"].peak_rss_mib,
        "off_peak_rss_mib": timings["off"].peak_rss_mib,
    }


def benchmark(
    device: str,
    rounds: int,
    threads: int,
    only: list[str] | None = None,
    keep: Callable[[dict[str, dict]], None] = lambda table: None,
) -> dict[str, dict]:
    """Measure each switch whose name contains one of `only`.

    Args:
        keep: called after each switch with all rows so far, so that a killed benchmark loses only the current one.

    Returns:
        For each switch its times, the reason if it was not tried, or the error if it failed.
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
        outcome = f"{text(row['gain'])} x as fast" if "gain" in row else next(iter(row.values()))
        rss = f", RSS {row['on_peak_rss_mib']} against {row['off_peak_rss_mib']} MiB" if "gain" in row else ""
        print(f"{name:58} {outcome}{rss}", flush=True)
        keep(table)
    return table


def main() -> None:
    parser = arguments(__doc__, threads=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is a GPU")
    parser.add_argument("--only", nargs="*", help="parts of names; default: all")
    parser.add_argument("--json", type=Path, help="file to write the table to after each switch")
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
