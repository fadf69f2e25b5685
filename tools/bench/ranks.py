"""Two ranks of one thread against one process of two threads: model A, the same tokens, the same two cores."""

import argparse
from collections.abc import Callable

from _common import Variant, engine_step, paired, ratio, text, write


def ours(distributed: dict) -> Callable[[], float]:
    return engine_step("A", **distributed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    timings = paired(
        {
            "one process": Variant(ours, ({},)),
            "TP2": Variant(ours, ({"tensor_parallel": 2},), num_ranks=2, threads=1),
            "DP2 + distributed optimizer": Variant(ours, ({"micro_batch_size": 4},), num_ranks=2, threads=1),
        },
        args.rounds,
    )
    table = {}
    print(f"{'':28} {'median ms':>9} {'time / one process':>20} {'RSS MiB per rank':>17}")
    for name, timing in timings.items():
        row = table[name] = {
            "median_ms": round(timing.median * 1e3, 1),
            "time_over_one_process": ratio(timing.seconds, timings["one process"].seconds),
            "peak_rss_mib": [size >> 20 for size in timing.memory_bytes],
            "first_loss": timing.first_loss,
            "step_seconds": [round(s, 4) for s in timing.seconds],
        }
        if abs(timing.first_loss - timings["one process"].first_loss) > 1e-3:
            raise SystemExit(f"{name}: first loss {timing.first_loss}, not one process's")
        memory = ", ".join(map(str, row["peak_rss_mib"]))
        print(f"{name:28} {row['median_ms']:9.0f} {text(row['time_over_one_process']):>20} {memory:>17}")
    if args.write:
        write("ranks", {"rounds": args.rounds, "variants": table})


if __name__ == "__main__":
    main()
