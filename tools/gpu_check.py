"""Everything that needs a GPU, in one command: build the kernels, run the `gpu` tests, benchmark, calibrate the plan.

Each part is a process of its own with a time of its own: one that fails, hangs or runs out of memory hides no other.
Name parts to run only these. Prints a table and writes bench/results/<gpu>-<date>.json, and the plan's calibration.
Without a GPU: one sentence, exit code 2.
"""

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOTAL_SECONDS = 9 * 60
"""By then the whole ends: what has not begun is not begun."""


def build() -> dict:
    """Compile csrc/ for this GPU, without network."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-build-isolation", "--no-deps"]
    subprocess.run([*command, "-e", "."], cwd=ROOT, check=True, env={**os.environ, "IGLA_BUILD_CUDA": "1"})
    from igla_mega import ops

    ops.require_kernels("cuda")
    return {"kernels": ops.kernels()}


def tests() -> dict:
    """Every test marked `gpu`; no collected test counts as a failure."""
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu"], cwd=ROOT, check=False)
    if done.returncode:
        raise SystemExit(f"pytest ended with {done.returncode}")
    return {"exit_code": 0}


def loss() -> dict:
    """Gradient of the cross entropy against torch and Liger."""
    import gpu_kernels

    rows = gpu_kernels.benchmark()
    gpu_kernels.print_table(rows)
    return {"rows": rows}


def memory() -> dict:
    """Ops bound by memory against torch."""
    import gpu_kernels

    rows = gpu_kernels.benchmark_bandwidth()
    gpu_kernels.print_bandwidth(rows)
    return {"rows": rows}


def ring() -> dict:
    """One layer of recipe 2 over the ranks of a node, replayed on one GPU."""
    import ring_replay
    import torch

    found = ring_replay.measure("cuda", 131072, 8, 32, 8, 128, torch.bfloat16)
    print(json.dumps(found, indent=1))
    return found


def calibration() -> dict:
    """Shares of the peaks that the plan counts with."""
    import calibrate

    entry, found = calibrate.measure("cuda", "BF16", 9)
    path = calibrate.write(entry, found)
    print(f"written: {path.relative_to(ROOT)}")
    return found


def train() -> dict:
    """Recipe 1's model, a step at 4096 and at 8192 tokens, beside the plan's time and memory."""
    import gpu_train

    return {"rows": [gpu_train.measure(length) for length in (4096, 8192)]}


PARTS: dict[str, tuple[Callable[[], dict], int]] = {
    "build": (build, 240),
    "tests": (tests, 240),
    "calibration": (calibration, 90),
    "train": (train, 150),
    "loss": (loss, 90),
    "memory": (memory, 90),
    "ring": (ring, 60),
}
"""In order, each with its most seconds. The plan's calibration goes before the runs it is compared with."""


def run_part(name: str, limit: float) -> dict[str, Any]:
    """Run a part in a process of its own; never raises."""
    with tempfile.TemporaryDirectory(prefix="igla-gpu-check-") as folder:
        out = Path(folder, "result.json")
        started = time.perf_counter()
        command = [sys.executable, __file__, "--part", name, "--out", str(out)]
        try:
            code: int | None = subprocess.run(command, cwd=ROOT, check=False, timeout=limit).returncode
            reason = "" if code == 0 else f"ended with {code}"
        except subprocess.TimeoutExpired:
            code, reason = None, f"ended after {limit:.0f} s, its most"
        seconds = round(time.perf_counter() - started, 1)
        found = json.loads(out.read_text()) if out.exists() else {}
        if not reason and not found:
            reason = "gave no result"
        return {"seconds": seconds, "ok": not reason, "reason": reason, **found}


def run_parts(names: list[str], runner: Callable[[str, float], dict[str, Any]] = run_part) -> dict[str, dict]:
    """Run parts one after another, whatever becomes of each."""
    begun, results = time.perf_counter(), {}
    for name in names:
        left = TOTAL_SECONDS - (time.perf_counter() - begun)
        print(f"== {name}", flush=True)
        if left < 5:
            results[name] = {"seconds": 0.0, "ok": False, "reason": "no time was left"}
            continue
        results[name] = runner(name, min(PARTS[name][1], left))
    return results


def summary(results: dict[str, dict]) -> list[str]:
    """A line for each part."""
    return [
        f"{name:12} {'passed' if r['ok'] else 'FAILED':7} {r['seconds']:7.1f} s  {r['reason']}"
        for name, r in results.items()
    ]


def write(results: dict[str, dict]) -> Path:
    """Write what was found, beside what earlier calls of the same day found of other parts."""
    import torch

    device, date = torch.cuda.get_device_name(), datetime.date.today().isoformat()
    slug = re.sub(r"[^A-Za-z0-9]+", "-", device).lower()
    path = ROOT / "bench" / "results" / f"{slug}-{date}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(path.read_text())["parts"] if path.exists() else {}
    about = {"date": date, "device": device, "torch": torch.__version__, "cuda": torch.version.cuda}
    path.write_text(json.dumps({**about, "parts": {**before, **results}}, indent=1, default=str) + "\n")
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
    sys.path.append(str(ROOT / "tools" / "bench"))
    if unknown := [name for name in args.parts if name not in PARTS]:
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    import torch

    if not torch.cuda.is_available():
        print("gpu-check needs a CUDA device, and torch sees none on this machine.", file=sys.stderr)
        return 2
    if args.part:
        args.out.write_text(json.dumps(PARTS[args.part][0](), default=str))
        return 0
    results = run_parts(args.parts or list(PARTS))
    print("\n".join(summary(results)))
    print(f"written: {write(results).relative_to(ROOT)}")
    return 0 if all(result["ok"] for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
