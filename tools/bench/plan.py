"""Compare tokens per second of real training steps with the plan, on a machine that is calibrated in the same run.

Each case is the engine of a model of `_common.MODELS` in one layout; ranks share the cores, as they do in training.
Calibration and steps are both measured in CPU time (of all threads of all ranks, divided by the cores), which other
programs disturb less. The cores of a shared machine may be half as fast a minute later: calibration and cases therefore
take turns, and the median of each counts.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from _common import MODELS, REPOSITORY, Variant, arguments, engine_step, recipe_of, rounded, steps_of, write

CORES = 2
CASES: dict[str, tuple[str, int, dict]] = {
    "A, fp32": ("A", 1, {}),
    "A, fp32, recompute full": ("A", 1, {"gradient_checkpointing": "full"}),
    "A, bf16": ("A", 1, {"precision": "BF16"}),
    "A, fp32, tensor 2": ("A", 2, {"tensor_parallel": 2}),
    "A, fp32, data 2": ("A", 2, {"micro_batch_size": 4}),
    "B, fp32": ("B", 1, {}),
    "B, bf16": ("B", 1, {"precision": "BF16"}),
    "laptop, fp32": ("laptop", 1, {}),
    "laptop, fp32, tensor 2": ("laptop", 2, {"tensor_parallel": 2}),
    "laptop, fp32, micro-batches of 2": ("laptop", 1, {"micro_batch_size": 2}),
}


def engine(model: str, distributed: dict) -> Callable[[], float]:
    """Build a step that returns the CPU seconds it took."""
    step = engine_step(model, **distributed)

    def timed() -> float:
        started = time.process_time()
        step()
        return time.process_time() - started

    return timed


def planned(model: str, num_ranks: int, distributed: dict, path: Path) -> float:
    """Return the planned tokens per second, and print the parts of the planned step."""
    from igla_mega.layout import hardware
    from igla_mega.plan import calibration
    from igla_mega.plan.choose import choose_layout
    from igla_mega.plan.time import Clock

    recipe = recipe_of(model, **distributed)
    cpu = hardware.cpu()
    used, _ = calibration.of(cpu, recipe.distributed.precision, path)
    step = Clock(recipe, choose_layout(recipe, num_ranks, "cpu"), cpu, used.rates).step()
    print("    " + ", ".join(f"{name} {value * 1e3:.0f}" for name, value in step.parts().items() if value > 5e-4), "ms")
    return MODELS[model]["rows"] * MODELS[model]["sequence"] / step.seconds


def calibrate(precision: str, folder: str) -> dict:
    """Calibrate this machine in a separate process."""
    # A thread that spins while it waits for another would count as work in CPU time.
    passive = {**os.environ, "OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}
    command = [sys.executable, str(REPOSITORY / "tools" / "calibrate.py"), "--cpu-time", "--precision", precision]
    path = Path(folder) / "turn.json"
    subprocess.run([*command, "--out", str(path)], check=True, stdout=subprocess.DEVNULL, env=passive)
    return json.loads(path.read_text())


def middle(calibrations: list[dict]) -> dict:
    """Return a calibration with the median of each rate."""
    rates = {name: statistics.median(one["rates"][name] for one in calibrations) for name in calibrations[0]["rates"]}
    sizes = zip(*(one["gemm_sizes"] for one in calibrations), strict=True)
    shares = [[size[0][0], statistics.median(share for _, share in size)] for size in sizes]
    return {**calibrations[0], "rates": rates, "gemm_sizes": shares}


def measure(case: tuple[str, int, dict], rounds: int) -> dict:
    """Return the seconds of a case's steps: CPU time divided by the cores, and wall time."""
    model, num_ranks, distributed = case
    variant = Variant(engine, (model, distributed), num_ranks, threads=CORES // num_ranks)
    steps = steps_of(variant, rounds, warm_up=2)
    return {
        # The CPU time of rank 0 stands for all ranks, which do equal work.
        "cpu_seconds_over_cores": rounded([step.results[0] * num_ranks / CORES for step in steps]),
        "wall_seconds": rounded([step.seconds for step in steps]),
        "peak_rss_mib": [size >> 20 for size in steps[-1].memory_bytes],
    }


def main() -> None:
    parser = arguments(__doc__, rounds=2)
    parser.add_argument("--turns", type=int, default=5, help="turns of a calibration and `rounds` steps of every case")
    parser.add_argument("--only", nargs="*", help="names of cases; default: all")
    args = parser.parse_args()
    cases = {name: case for name, case in CASES.items() if not args.only or name in args.only}
    table: dict[str, dict] = {name: {} for name in cases}
    with tempfile.TemporaryDirectory(prefix="igla-bench-") as folder:
        turns: dict[str, list[dict]] = {"FP32": [], "BF16": []}
        for turn in range(args.turns):
            for precision, found in turns.items():
                found.append(calibrate(precision, folder))
            for name, case in cases.items():
                print(f"turn {turn + 1} of {args.turns}: {name}", file=sys.stderr, flush=True)
                for key, values in measure(case, args.rounds).items():
                    table[name].setdefault(key, []).extend(values)
        calibrations = {precision: middle(found) for precision, found in turns.items()}
        paths = {precision: Path(folder) / f"{precision}.json" for precision in calibrations}
        for precision, path in paths.items():
            path.write_text(json.dumps(calibrations[precision]))
        print(f"{'':34} {'measured tok/s':>14} {'plan':>7} {'error':>7} {'wall tok/s':>10} {'peak RSS MiB':>12}")
        for name, (model, num_ranks, distributed) in cases.items():
            row = table[name]
            tokens = MODELS[model]["rows"] * MODELS[model]["sequence"]
            measured = tokens / statistics.median(row["cpu_seconds_over_cores"])
            rate = planned(model, num_ranks, distributed, paths[distributed.get("precision", "FP32")])
            row |= {
                "measured_tokens_per_second": round(measured),
                "planned_tokens_per_second": round(rate),
                "error": round(rate / measured - 1, 4),
                "wall_tokens_per_second": round(tokens / statistics.median(row["wall_seconds"])),
            }
            print(
                f"{name:34} {measured:14,.0f} {rate:7,.0f} {row['error']:+7.1%} {row['wall_tokens_per_second']:10,} "
                f"{max(row['peak_rss_mib']):12}",
                flush=True,
            )
    if args.write:
        write("plan", {"turns": args.turns, "rounds": args.rounds, "cases": table, "calibrations": calibrations})


if __name__ == "__main__":
    main()
