"""Compare two ranks of one thread with one process of two threads: model A, same tokens, same two cores."""

from collections.abc import Callable

from _common import Variant, arguments, engine_step, paired, ratio, text, write


def ours(distributed: dict) -> Callable[[], float]:
    return engine_step("A", **distributed)


def main() -> None:
    args = arguments(__doc__).parse_args()
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
            "median_ms": timing.median_ms,
            "time_over_one_process": ratio(timing.seconds, timings["one process"].seconds),
            "peak_rss_mib": [size >> 20 for size in timing.memory_bytes],
            "first_loss": timing.first_loss,
            "step_seconds": timing.step_seconds,
        }
        if abs(timing.first_loss - timings["one process"].first_loss) > 1e-3:
            raise SystemExit(f"{name}: first loss {timing.first_loss} differs from that of one process")
        memory = ", ".join(map(str, row["peak_rss_mib"]))
        print(f"{name:28} {row['median_ms']:9.0f} {text(row['time_over_one_process']):>20} {memory:>17}")
    if args.write:
        write("ranks", {"rounds": args.rounds, "variants": table})


if __name__ == "__main__":
    main()
