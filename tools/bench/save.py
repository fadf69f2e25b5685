"""Measure how much an asynchronous save delays the steps during which it is written, and the seconds of saving and
loading the weights and moments of model B, next to torch's distributed checkpoint and safetensors."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from _common import Variant, arguments, engine_and_step, ratio, steps_of, text, write

from igla_mega.checkpoint.load import load_states

STEPS = 4
"""Number of steps timed without a save, and as many from a save on; enough for it to reach the disk."""


def saving(folder: str, distributed: dict) -> Callable[[], dict]:
    """Build a step that returns the seconds of steps without a save, and of as many from a save on, with its copy."""
    from igla_mega.checkpoint.progress import Progress, Retention
    from igla_mega.checkpoint.store import CheckpointWriter

    engine, step = engine_and_step("laptop", **distributed)
    writer = CheckpointWriter(Path(folder), engine.mesh, Retention(keep_last=1), asynchronous=True)
    number = 0

    def timed(save: bool) -> list[float]:
        seconds = []
        for index in range(STEPS):
            started = time.perf_counter()
            if save and index == 0:
                writer.save(engine.optimizer.states(), Progress(step=number), "")
            step()
            seconds.append(time.perf_counter() - started)
        return seconds

    def both() -> dict:
        nonlocal number
        number += 1
        taken, waited = {}, 0.0
        # The order alternates, so that neither always runs on the warmer machine.
        for save in (False, True) if number % 2 else (True, False):
            taken[save] = timed(save)
            started = time.perf_counter()
            writer.wait()
            waited = max(waited, time.perf_counter() - started)
        return {"without": taken[False], "with": taken[True], "waited": waited}

    return both


def store_and_peers(folder: str) -> Callable[[], dict]:
    """Build a step that saves and loads the same tensors with each library; it returns {library: [save, load]} in s."""
    import shutil

    import safetensors.torch
    import torch.distributed.checkpoint as dcp

    from igla_mega.checkpoint import store

    engine, step = engine_and_step("B")
    step()
    states = list(engine.states())
    tensors = {f"{state.shard.name}.{kind}": v for state in states for kind, v in state.values.items()}
    group = engine.mesh.host_group

    def dcp_load(path: Path) -> None:
        dcp.load(tensors, checkpoint_id=path)

    def safetensors_load(path: Path) -> None:
        for name, values in safetensors.torch.load_file(path / "model.safetensors").items():
            tensors[name].copy_(values)

    def safetensors_save(path: Path) -> None:
        path.mkdir()
        safetensors.torch.save_file(tensors, path / "model.safetensors")

    ways: dict[str, tuple[Callable[[Path], object], Callable[[Path], object]]] = {
        "ours": (lambda p: store.save_folder(p, states, {}, engine.mesh), lambda p: load_states(p, states, group)),
        "torch DCP": (lambda p: dcp.save(tensors, checkpoint_id=p), dcp_load),
        "safetensors": (safetensors_save, safetensors_load),
    }

    def all_ways() -> dict:
        found = {}
        for name, calls in ways.items():
            path, seconds = Path(folder, name.replace(" ", "_")), []
            for call in calls:
                started = time.perf_counter()
                call(path)
                seconds.append(time.perf_counter() - started)
            shutil.rmtree(path)
            found[name] = seconds
        found["bytes"] = sum(values.nbytes for values in tensors.values())
        return found

    return all_ways


def print_stores(rounds: list[dict]) -> dict:
    """Print and return the medians of saving and loading; `bytes` is the size of all tensors."""
    table: dict = {"bytes": rounds[0]["bytes"]}
    print(f"{rounds[0]['bytes'] / 2**20:.0f} MiB {'save ms':>20} {'load ms':>9}")
    for name in (name for name in rounds[0] if name != "bytes"):
        save, load = (sorted(r[name][which] for r in rounds)[len(rounds) // 2] for which in (0, 1))
        table[name] = {"save_ms": round(save * 1e3, 1), "load_ms": round(load * 1e3, 1)}
        print(f"{name:24} {save * 1e3:5.0f} {load * 1e3:9.0f}")
    return table


def main() -> None:
    args = arguments(__doc__).parse_args()
    table = {}
    print(
        f"{'':20} {'step ms':>8} {'step with the copy':>20} {f'{STEPS} steps from it on':>20} {'still writing ms':>17}"
    )
    with tempfile.TemporaryDirectory(prefix="igla-bench-") as folder:
        variants = {
            "one process": Variant(saving, (f"{folder}/1", {})),
            "TP2": Variant(saving, (f"{folder}/2", {"tensor_parallel": 2}), num_ranks=2, threads=1),
        }
        for name, variant in variants.items():
            rounds = [step.results[0] for step in steps_of(variant, args.rounds)]
            plain = [sum(r["without"]) / STEPS for r in rounds]
            first = ratio([r["with"][0] for r in rounds], plain)
            all_ = ratio([sum(r["with"]) / STEPS for r in rounds], plain)
            waited = sorted(r["waited"] for r in rounds)[len(rounds) // 2]
            step_ms = sorted(plain)[len(plain) // 2] * 1e3
            table[name] = {
                "median_step_ms": round(step_ms, 1),
                "first_step_over_plain": first,
                f"mean_of_{STEPS}_over_plain": all_,
                "still_writing_ms": round(waited * 1e3, 1),
                "rounds": rounds,
            }
            print(f"{name:20} {step_ms:8.0f} {text(first):>20} {text(all_):>20} {waited * 1e3:17.0f}")
        steps = steps_of(Variant(store_and_peers, (folder,)), args.rounds)
        stores = print_stores([step.results[0] for step in steps])
    if args.write:
        write("save", {"rounds": args.rounds, "variants": table, "stores": stores})


if __name__ == "__main__":
    main()
