"""How much an asynchronous save of the laptop model delays the steps that run while it is written."""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from _common import Processes, Variant, engine_and_step, ratio, text, write

STEPS = 4
"""Steps timed without a save, and as many after one was asked for: it is on disk before they end."""


def saving(folder: str, distributed: dict) -> Callable[[], dict]:
    """Each call returns seconds of steps without a save, and of as many from a save on, its copy included."""
    from igla_mega.checkpoint.store import CheckpointWriter, Progress, Retention

    engine, step = engine_and_step("laptop", **distributed)
    writer = CheckpointWriter(Path(folder), engine.mesh, Retention(keep_last=1), asynchronous=True)
    number = 0

    def timed(save: bool) -> list[float]:
        seconds = []
        for index in range(STEPS):
            started = time.perf_counter()
            if save and index == 0:
                writer.save(engine.optimizer.slots(), Progress(step=number), "")
            step()
            seconds.append(time.perf_counter() - started)
        return seconds

    def both() -> dict:
        nonlocal number
        number += 1
        taken, waited = {}, 0.0
        for save in (False, True) if number % 2 else (True, False):
            taken[save] = timed(save)
            started = time.perf_counter()
            writer.wait()
            waited = max(waited, time.perf_counter() - started)
        return {"without": taken[False], "with": taken[True], "waited": waited}

    return both


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
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
            processes = Processes(variant)
            processes.step()
            rounds = [processes.step()[1] for _ in range(args.rounds)]
            processes.stop()
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
    if args.write:
        write("save", {"rounds": args.rounds, "variants": table})


if __name__ == "__main__":
    main()
