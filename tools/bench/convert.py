"""Measure seconds and peak memory of `import` and `export` of model B, and of transformers loading and saving it.

Whole commands are timed, with the start of Python and its imports: the time that a user waits.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _common import REPOSITORY, arguments, rounded, transformers_llama, write

PEER = (
    "import sys; from transformers import AutoModelForCausalLM as M;"
    "M.from_pretrained(sys.argv[1], dtype='auto').save_pretrained(sys.argv[2])"
)


def run(command: list[str]) -> tuple[float, int]:
    """Return the seconds of a command and its peak memory in bytes."""
    started = time.perf_counter()
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        # wait4, not wait: it reports the peak of this one child.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command} ended with {process.returncode}")
    return time.perf_counter() - started, usage.ru_maxrss * 1024


def main() -> None:
    args = arguments(__doc__, rounds=3).parse_args()
    ours = [sys.executable, "-m", "igla_mega"]
    found: dict[str, list[tuple[float, int]]] = {}
    with tempfile.TemporaryDirectory(prefix="igla-bench-") as temporary:
        source = Path(temporary, "hf")
        transformers_llama("B").save_pretrained(source)
        for number in range(args.rounds):
            checkpoint, again, peer = (Path(temporary, f"{name}{number}") for name in ("native", "exported", "peer"))
            for name, command in {
                "import": [*ours, "import", str(source), str(checkpoint)],
                "export": [*ours, "export", str(checkpoint), str(again)],
                "transformers, load and save": [sys.executable, "-c", PEER, str(source), str(peer)],
            }.items():
                found.setdefault(name, []).append(run(command))
    table = {}
    for name, rows in found.items():
        table[name] = {
            "median_seconds": round(statistics.median(seconds for seconds, _ in rows), 2),
            "peak_rss_mib": max(size for _, size in rows) >> 20,
            "seconds": rounded([seconds for seconds, _ in rows], 2),
        }
        print(f"{name:30} {table[name]['median_seconds']:7.2f} s {table[name]['peak_rss_mib']:7} MiB")
    if args.write:
        write("convert", {"rounds": args.rounds, "measures": table})


if __name__ == "__main__":
    main()
