"""Everything that needs a GPU, in one command: build the kernels, run the `gpu` tests, benchmark, calibrate the plan.

Each part is a process of its own with a time of its own: one that fails, hangs or runs out of memory hides no other.
Name parts to run only these. Prints a table and writes bench/results/<gpu>-<date>.json, and the plan's calibration.
Without a GPU: one sentence, exit code 2.
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
"""By then the whole ends: what has not begun is not begun."""


def build() -> dict:
    """Compile csrc/ for this GPU, without network."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-build-isolation", "--no-deps"]
    subprocess.run([*command, "-e", "."], cwd=ROOT, check=True, env={**os.environ, "IGLA_BUILD_CUDA": "1"})
    from igla_mega import ops

    ops.require_kernels("cuda")
    return {"kernels": ops.kernels()}


def gpu_tests() -> list[Path]:
    """The files with tests for a GPU: others may import what a machine without a network lacks."""
    marks = ("mark.gpu", "import DEVICES", "from devices import")
    return [
        path for path in sorted((ROOT / "tests").rglob("test_*.py")) if any(mark in path.read_text() for mark in marks)
    ]


def tests() -> dict:
    """Every test marked `gpu`; no collected test counts as a failure."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *map(str, gpu_tests())]
    done = subprocess.run(command, cwd=ROOT, check=False)
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

    found = ring_replay.measure("cuda", 131072, 8, (32, 8, 128), torch.bfloat16)
    print(json.dumps(found, indent=1))
    return found


def calibration() -> dict:
    """Shares of the peaks that the plan counts with."""
    import calibrate

    entry, found = calibrate.measure("cuda", "BF16", 9)
    path = calibrate.write(entry, found)
    print(f"written: {path.relative_to(ROOT)}")
    return found


def moe() -> dict:
    """Two layers of recipe 7 with all eight experts: real routing and forced."""
    import moe as bench

    return {"rows": bench.on_gpu(10)}


def train() -> dict:
    """Recipe 1's model, a step at 4096 and at 8192 tokens, beside the plan's time and memory."""
    return _each("gpu_train.py", "4096", "8192")


def peers() -> dict:
    """The same model by transformers, plain and compiled; torchtitan is named if it is here."""
    found = _each("gpu_train.py", "transformers", "transformers-compiled")
    installed = importlib.util.find_spec("torchtitan") is not None
    found["torchtitan"] = "installed; not run, its trainer is its own" if installed else "not installed"
    print(f"torchtitan: {found['torchtitan']}")
    return found


def tuning() -> dict:
    """Recipe 3's adapters on a base in bf16 and in 4 bits, against PEFT's."""
    return _each("gpu_train.py", "lora", "lora-peft", "qlora", "qlora-peft")


def shard() -> dict:
    """A context-parallel shard of 131,072 tokens: a step of 16,384, its attention replaced by the ring's."""
    return _each("gpu_train.py", "shard")


def switches() -> dict:
    """Every switch of the fast path, off and on."""
    with tempfile.TemporaryDirectory(prefix="igla-gpu-check-") as folder:
        # It writes a row at a time: those before a failure, or the part's last second, are not lost.
        out = Path(os.environ.get("IGLA_GPU_CHECK_OUT") or Path(folder, "table.json"))
        command = [sys.executable, "tools/bench/switches.py", "--device", "cuda", "--json", str(out)]
        if code := subprocess.run(command, cwd=ROOT, check=False).returncode:
            raise SystemExit(f"switches ended with {code}")
        return json.loads(out.read_text())


def _each(program: str, *cases: str) -> dict:
    """Rows of cases that each need a GPU for themselves; one that fails leaves its reason, and the others."""
    rows = {}
    for case in cases:
        with tempfile.TemporaryDirectory(prefix="igla-gpu-check-") as folder:
            out = Path(folder, "row.json")
            command = [sys.executable, f"tools/{program}", case, "--out", str(out)]
            done = subprocess.run(command, cwd=ROOT, check=False, stderr=subprocess.PIPE, text=True)
            last = (done.stderr.strip().splitlines() or ["nothing said"])[-1]
            rows[case] = json.loads(out.read_text()) if out.exists() else {"failed": f"{done.returncode}: {last}"}
            print(f"{case}: {json.dumps(rows[case])}", flush=True)
            _keep({"rows": rows})
    if broken := [case for case, row in rows.items() if "failed" in row]:
        raise SystemExit(f"{', '.join(broken)} failed")
    return {"rows": rows}


def _keep(found: dict) -> None:
    """Leave what a part has found so far, in case it does not come to its end."""
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
"""In order, each with its most seconds; all have TOTAL_SECONDS. The plan's calibration goes before what it is compared
with."""


def run_part(name: str, limit: float) -> dict[str, Any]:
    """Run a part in a process of its own; never raises."""
    with tempfile.TemporaryDirectory(prefix="igla-gpu-check-") as folder:
        out = Path(folder, "result.json")
        started = time.perf_counter()
        command = [sys.executable, __file__, "--part", name, "--out", str(out)]
        try:
            code: int | None = _within(command, limit, {**os.environ, "IGLA_GPU_CHECK_OUT": str(out)})
            reason = "" if code == 0 else f"ended with {code}"
        except subprocess.TimeoutExpired:
            code, reason = None, f"ended after {limit:.0f} s, its most"
        seconds = round(time.perf_counter() - started, 1)
        found = json.loads(out.read_text()) if out.exists() else {}
        if not reason and not found:
            reason = "gave no result"
        return {"seconds": seconds, "ok": not reason, "reason": reason, **found}


def _within(command: list[str], limit: float, environment: dict[str, str]) -> int:
    """Run a program and all that it starts for so long at most: a child that is left would keep the GPU's memory."""
    with subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True) as process:
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise


def run_parts(
    names: list[str], runner: Callable[[str, float], dict[str, Any]] = run_part, *, begun: float | None = None
) -> dict[str, dict]:
    """Run parts one after another, whatever becomes of each.

    Args:
        begun: when the time that all have began, in seconds since 1970; None: now.
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
    parser.add_argument("--begun", type=float, help="when the nine minutes began, seconds since 1970; default: now")
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
    results = run_parts(args.parts or list(PARTS), begun=args.begun)
    print("\n".join(summary(results)))
    print(f"written: {write(results).relative_to(ROOT)}")
    return 0 if all(result["ok"] for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
