"""Measure seconds until the command line answers, and until a two-rank run of the laptop model took its first step."""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _common import REPOSITORY, arguments, rounded, write

COMMAND = [str(Path(sys.executable).with_name("igla-mega"))]


def answer_seconds(*words: str) -> float:
    """Return the seconds of one command."""
    started = time.perf_counter()
    subprocess.run([*COMMAND, *words], check=True, stdout=subprocess.DEVNULL, cwd=REPOSITORY)
    return time.perf_counter() - started


def first_step_seconds() -> float:
    """Return the seconds from the command to the first line of metrics.jsonl that has a loss."""
    with tempfile.TemporaryDirectory(prefix="igla-bench-") as folder:
        words = ["train", "pretrain_7b", "--scale", "laptop", "--nproc", "2", "--set", "training.total_steps=1"]
        metrics = Path(folder, "metrics.jsonl")
        started = time.perf_counter()
        command = [*COMMAND, *words, "--run", folder]
        with (
            open(Path(folder, "log"), "w+") as log,
            subprocess.Popen(command, stdout=log, stderr=log, cwd=REPOSITORY) as train,
        ):
            while not (metrics.exists() and '"loss"' in metrics.read_text()):
                if train.poll() is not None:
                    log.seek(0)
                    raise SystemExit(f"train ended with {train.returncode} before its first step:\n{log.read()}")
                time.sleep(0.01)
            seconds = time.perf_counter() - started
        return seconds


def main() -> None:
    args = arguments(__doc__).parse_args()
    first_step_seconds()  # not counted: creates the corpus if necessary, and fills the page cache
    measures = {
        "igla-mega --help": lambda: answer_seconds("--help"),
        "igla-mega check pretrain_7b": lambda: answer_seconds("check", "pretrain_7b"),
        "first step, laptop, 2 ranks": first_step_seconds,
    }
    table = {}
    for name, measure in measures.items():
        seconds = [measure() for _ in range(args.rounds)]
        table[name] = {
            "median_seconds": round(statistics.median(seconds), 3),
            "seconds": rounded(seconds, 3),
        }
        print(f"{name:28} {table[name]['median_seconds']:7.2f} s  ({min(seconds):.2f} to {max(seconds):.2f})")
    if args.write:
        write("startup", {"rounds": args.rounds, "measures": table})


if __name__ == "__main__":
    main()
