"""Run everything that needs a GPU: build the kernels, run the `gpu` tests, benchmark, calibrate the plan.

Each part is a separate process with its own time limit, so that one that fails, hangs or runs out of memory does not
hide the others. Name parts to run only these. Prints a table and writes bench/results/<gpu>-<date>.json and the
calibration of the plan. Without a GPU it prints one sentence and exits with 2.
"""

import argparse
import datetime
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOTAL_SECONDS = 9 * 60
"""Time limit of all parts together; parts that have not started by then are skipped."""


def build() -> dict:
    """Compile csrc/ for this GPU, without a network."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-build-isolation", "--no-deps"]
    subprocess.run([*command, "-e", "."], cwd=ROOT, check=True, env={**os.environ, "IGLA_BUILD_CUDA": "1"})
    from igla_mega import ops

    ops.require_kernels("cuda")
    return {"kernels": ops.kernels()}


def gpu_tests() -> list[Path]:
    """Return the files with tests for a GPU; others may import packages that a machine without a network lacks."""
    marks = ("mark.gpu", "import DEVICES", "from devices import")
    return [
        path for path in sorted((ROOT / "tests").rglob("test_*.py")) if any(mark in path.read_text() for mark in marks)
    ]


def tests() -> dict:
    """Run every test marked `gpu`; it is a failure if pytest collects none."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *map(str, gpu_tests())]
    done = subprocess.run(command, cwd=ROOT, check=False)
    if done.returncode:
        raise SystemExit(f"pytest ended with {done.returncode}")
    return {"exit_code": 0}


def loss() -> dict:
    """Benchmark the gradient of the cross-entropy against torch and Liger."""
    import gpu_kernels

    rows = gpu_kernels.benchmark()
    gpu_kernels.print_table(rows)
    return {"rows": rows}


def memory() -> dict:
    """Benchmark the memory-bound ops against torch."""
    import gpu_kernels

    rows = gpu_kernels.benchmark_bandwidth()
    gpu_kernels.print_bandwidth(rows)
    return {"rows": rows}


def ring() -> dict:
    """Measure the attention of one layer of recipe 2 over the ranks of a node, replayed on one GPU."""
    import ring_replay
    import torch

    found = ring_replay.measure("cuda", 131072, 8, (32, 8, 128), torch.bfloat16)
    print(json.dumps(found, indent=1))
    return found


def calibration() -> dict:
    """Measure the shares of the peaks that the plan calculates with."""
    import calibrate

    entry, found = calibrate.measure("cuda", "BF16", 9)
    path = calibrate.write(entry, found)
    print(f"written: {path.relative_to(ROOT)}")
    return found


def moe() -> dict:
    """Measure two layers of recipe 7 with all eight experts, with real and forced routing."""
    import moe as bench

    return {"rows": bench.on_gpu(10)}


def train() -> dict:
    """Measure a step of recipe 1's model at 4096 and 8192 tokens, next to the planned time and memory."""
    return _each("gpu_train.py", "4096", "8192")


def peers() -> dict:
    """Measure the same model in transformers, eager and compiled, and report whether torchtitan is installed."""
    found = _each("gpu_train.py", "transformers", "transformers-compiled")
    installed = importlib.util.find_spec("torchtitan") is not None
    found["torchtitan"] = "installed; not run, since it has a separate trainer" if installed else "not installed"
    print(f"torchtitan: {found['torchtitan']}")
    return found


def tuning() -> dict:
    """Measure recipe 3's adapters on a base in bf16 and in 4 bits, against PEFT's."""
    return _each("gpu_train.py", "lora", "lora-peft", "qlora", "qlora-peft")


def shard() -> dict:
    """Measure a context-parallel shard of 131,072 tokens: a step of 16,384 tokens with the attention of the ring."""
    return _each("gpu_train.py", "shard")


def switches() -> dict:
    """Measure every performance switch, off and on."""
    with tempfile.TemporaryDirectory(prefix="igla-gpu-check-") as folder:
        # The benchmark writes after each row, so that a failure or the time limit does not lose earlier rows.
        out = Path(os.environ.get("IGLA_GPU_CHECK_OUT") or Path(folder, "table.json"))
        command = [sys.executable, "tools/bench/switches.py", "--device", "cuda", "--json", str(out)]
        if code := subprocess.run(command, cwd=ROOT, check=False).returncode:
            raise SystemExit(f"switches ended with {code}")
        return json.loads(out.read_text())


def _each(program: str, *cases: str) -> dict:
    """Run cases one after another, each in a process with the whole GPU; a failed case has its reason as its row."""
    rows = {}
    for case in cases:
        with tempfile.TemporaryDirectory(prefix="igla-gpu-check-") as folder:
            out = Path(folder, "row.json")
            command = [sys.executable, f"tools/{program}", case, "--out", str(out)]
            done = subprocess.run(command, cwd=ROOT, check=False, stderr=subprocess.PIPE, text=True)
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            rows[case] = json.loads(out.read_text()) if out.exists() else {"failed": f"{done.returncode}: {last}"}
            print(f"{case}: {json.dumps(rows[case])}", flush=True)
            _keep({"rows": rows})
    if broken := [case for case, row in rows.items() if "failed" in row]:
        raise SystemExit(f"{', '.join(broken)} failed")
    return {"rows": rows}


def _keep(found: dict) -> None:
    """Save the results of a part so far, in case it is killed."""
    if path := os.environ.get("IGLA_GPU_CHECK_OUT"):
        Path(path).write_text(json.dumps(found, default=str))


PARTS: dict[str, tuple[Callable[[], dict], int]] = {
    "build": (build, 150),
    "tests": (tests, 90),
    "calibration": (calibration, 60),
    "train": (train, 120),
    "peers": (peers, 120),
    "tuning": (tuning, 120),
    "loss": (loss, 60),
    "memory": (memory, 60),
    "ring": (ring, 40),
    "shard": (shard, 60),
    "moe": (moe, 60),
    "switches": (switches, 90),
}
"""Function and time limit in seconds of each part, in order. The calibration precedes the parts that compare with the
plan."""


def run_part(name: str, limit: float) -> dict[str, Any]:
    """Run a part in a separate process; never raises."""
    with tempfile.TemporaryDirectory(prefix="igla-gpu-check-") as folder:
        out = Path(folder, "result.json")
        started = time.perf_counter()
        command = [sys.executable, __file__, "--part", name, "--out", str(out)]
        try:
            code: int | None = _within(command, limit, {**os.environ, "IGLA_GPU_CHECK_OUT": str(out)})
            reason = "" if code == 0 else f"ended with {code}"
        except subprocess.TimeoutExpired:
            code, reason = None, f"killed after {limit:.0f} s, its limit"
        seconds = round(time.perf_counter() - started, 1)
        found = json.loads(out.read_text()) if out.exists() else {}
        if not reason and not found:
            reason = "wrote no result"
        return {"seconds": seconds, "ok": not reason, "reason": reason, **found}


def _within(command: list[str], limit: float, environment: dict[str, str]) -> int:
    """Run a program for at most `limit` seconds, then kill its session: a child left running would keep GPU memory."""
    with subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True) as process:
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise


def run_parts(
    names: list[str], runner: Callable[[str, float], dict[str, Any]] = run_part, *, begun: float | None = None
) -> dict[str, dict]:
    """Run parts one after another, also after a failure.

    Args:
        begun: Unix time in seconds from which TOTAL_SECONDS counts; None for now.
    """
    begun, results = begun or time.time(), {}
    for name in names:
        left = TOTAL_SECONDS - (time.time() - begun)
        print(f"== {name}", flush=True)
        if left < 5:
            results[name] = {"seconds": 0.0, "ok": False, "reason": "no time was left"}
            continue
        results[name] = runner(name, min(PARTS[name][1], left))
    return results


def summary(results: dict[str, dict]) -> list[str]:
    """Return a line for each part."""
    return [
        f"{name:12} {'passed' if r['ok'] else 'FAILED':7} {r['seconds']:7.1f} s  {r['reason']}"
        for name, r in results.items()
    ]


def write(results: dict[str, dict]) -> Path:
    """Write the results, and keep those of other parts from earlier calls on the same day."""
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
    """Run the named parts; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"one of {', '.join(PARTS)}; default: all")
    parser.add_argument("--begun", type=float, help="Unix time from which the nine minutes count; default: now")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
    sys.path.append(str(ROOT / "tools" / "bench"))
    if unknown := [name for name in args.parts if name not in PARTS]:
        parser.error(f"no such part: {', '.join(unknown)}; the parts are {', '.join(PARTS)}")
    import torch

    if not torch.cuda.is_available():
        print("gpu-check needs a CUDA device, and torch sees none on this machine.", file=sys.stderr)
        return 2
    if args.part:
        args.out.write_text(json.dumps(PARTS[args.part][0](), default=str))
        return 0
    results = run_parts(args.parts or list(PARTS), begun=args.begun)
    print("\n".join(summary(results)))
    print(f"written: {write(results).relative_to(ROOT)}")
    return 0 if all(result["ok"] for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
