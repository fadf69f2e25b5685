"""Everything that needs a GPU, in one command: build the kernels, run the `gpu` tests, time them against their peers.

Prints a table and writes bench/results/gpu_<date>_<device>.json. Without a GPU: one sentence, exit code 2.
"""

import datetime
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 15
# Tokens x vocabulary of one call: the chunk of a Llama-2 and of a Llama-3 head, whole and split over 8 tensor ranks.
SHAPES = [(4096, 32000), (2048, 128256), (8192, 16032)]

Gradient = Callable[[Tensor, Tensor, Tensor], Tensor]


def build() -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "-e", "."]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "IGLA_BUILD_CUDA": "1"})


def run_gpu_tests() -> int:
    """Exit code of pytest; no collected test counts as a failure."""
    return subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu"], cwd=ROOT, check=False).returncode


def igla(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """Gradient of the mean loss, written over `logits`."""
    vocabulary = logits.shape[1]
    row_max, sum_exp, _ = torch.ops.igla.softmax_statistics(logits, labels, 0, vocabulary)
    torch.ops.igla.softmax_gradient_(logits, row_max + sum_exp.log(), labels, weight, 0, vocabulary)
    return logits


def torch_cross_entropy(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    logits = logits.detach().requires_grad_()
    torch.nn.functional.cross_entropy(logits, labels).backward()
    assert logits.grad is not None
    return logits.grad


def peers() -> dict[str, Gradient]:
    found: dict[str, Gradient] = {
        "igla": igla,
        "torch eager": torch_cross_entropy,
        "torch compiled": torch.compile(torch_cross_entropy),
    }
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerCrossEntropyLoss

        def liger(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
            logits = logits.detach().requires_grad_()
            LigerCrossEntropyLoss()(logits, labels).backward()
            assert logits.grad is not None
            return logits.grad

        found["liger"] = liger
    return found


def milliseconds(call: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def benchmark() -> list[dict]:
    """One row for each shape, type and peer: the median of ROUNDS, the peers taking turns within every round."""
    rows = []
    for num_tokens, vocabulary in SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            original = torch.randn(num_tokens, vocabulary, device="cuda", dtype=dtype)
            labels = torch.randint(0, vocabulary, (num_tokens,), device="cuda")
            weight = torch.full((num_tokens,), 1 / num_tokens, device="cuda")
            exact = original.double().softmax(1)
            exact[torch.arange(num_tokens, device="cuda"), labels] -= 1
            exact /= num_tokens

            variants = peers()
            errors = {}
            times: dict[str, list[float]] = {name: [] for name in variants}
            for name, gradient in variants.items():
                errors[name] = (gradient(original.clone(), labels, weight).double() - exact).norm() / exact.norm()
            del exact
            for _ in range(ROUNDS):
                for name, gradient in variants.items():
                    logits = original.clone()  # some peers write over it
                    times[name].append(milliseconds(lambda: gradient(logits, labels, weight)))  # noqa: B023
            for name in variants:
                median = sorted(times[name])[ROUNDS // 2]
                # The least that must move: the logits read for the statistics, read and written for the gradient.
                moved_bytes = 3 * original.numel() * original.element_size()
                rows.append(
                    {
                        "tokens": num_tokens,
                        "vocabulary": vocabulary,
                        "dtype": str(dtype).removeprefix("torch."),
                        "peer": name,
                        "milliseconds": median,
                        "all_milliseconds": times[name],
                        "gigabytes_per_second": moved_bytes / median / 1e6,
                        "relative_error": errors[name].item(),
                    }
                )
    return rows


def print_table(rows: list[dict]) -> None:
    columns = ("tokens", "vocabulary", "dtype", "peer", "ms", "x igla", "GB/s", "relative error")
    table = Table(*columns, title="gradient of the cross-entropy, from logits")
    igla_ms = {(r["tokens"], r["vocabulary"], r["dtype"]): r["milliseconds"] for r in rows if r["peer"] == "igla"}
    for row in rows:
        ratio = row["milliseconds"] / igla_ms[row["tokens"], row["vocabulary"], row["dtype"]]
        cells = (
            row["tokens"],
            row["vocabulary"],
            row["dtype"],
            row["peer"],
            f"{row['milliseconds']:.3f}",
            f"{ratio:.2f}",
        )
        table.add_row(*map(str, cells), f"{row['gigabytes_per_second']:.0f}", f"{row['relative_error']:.1e}")
    Console().print(table)


def main() -> int:
    if not torch.cuda.is_available():
        print("gpu-check needs a CUDA device, and torch sees none on this machine.", file=sys.stderr)
        return 2
    build()
    tests = run_gpu_tests()

    from igla_mega import ops

    ops.require_kernels("cuda")
    rows = benchmark()
    print_table(rows)
    device = torch.cuda.get_device_name()
    result = {
        "date": datetime.date.today().isoformat(),
        "device": device,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "gpu_tests_exit_code": tests,
        "cross_entropy": rows,
    }
    name = f"gpu_{result['date']}_{re.sub(r'[^A-Za-z0-9]+', '-', device).lower()}.json"
    path = ROOT / "bench" / "results" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {path.relative_to(ROOT)}")
    return tests


if __name__ == "__main__":
    sys.exit(main())
