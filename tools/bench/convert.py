"""Seconds and peak memory of `import` and `export` of model B, beside loading and saving it with transformers.

Whole commands, Python and imports included: what a user waits for. transformers reads a folder and writes another one.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _common import REPOSITORY, transformers_sizes, write

PEER = (
    "import sys; from transformers import AutoModelForCausalLM as M;"
    "M.from_pretrained(sys.argv[1], dtype='auto').save_pretrained(sys.argv[2])"
)


def made(folder: Path) -> Path:
    """Model B of random weights, as transformers saves it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(**transformers_sizes("B"), tie_word_embeddings=False)).save_pretrained(folder)
    return folder


def run(command: list[str]) -> tuple[float, int]:
    """Seconds of a command, and the most memory that it held, bytes."""
    started = time.perf_counter()
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command} ended with {process.returncode}")
    return time.perf_counter() - started, usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    ours = [sys.executable, "-m", "igla_mega"]
    found: dict[str, list[tuple[float, int]]] = {}
    with tempfile.TemporaryDirectory(prefix="igla-bench-") as temporary:
        source = made(Path(temporary, "hf"))
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
            "seconds": [round(seconds, 2) for seconds, _ in rows],
        }
        print(f"{name:30} {table[name]['median_seconds']:7.2f} s {table[name]['peak_rss_mib']:7} MiB")
    if args.write:
        write("convert", {"rounds": args.rounds, "measures": table})


if __name__ == "__main__":
    main()
