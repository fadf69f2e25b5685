"""Measure the share of its peaks that this machine reaches with each class of kernels, for `igla-mega plan`.

Writes bench/results/calibration_<date>_<hardware>_<precision>.json, which plans for that hardware then use.
"""

import argparse
import datetime
import json
import multiprocessing as mp
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from igla_mega.layout import hardware
from igla_mega.layout.hardware import Hardware
from igla_mega.ops.linear_cross_entropy import linear_cross_entropy
from igla_mega.plan import calibration
from igla_mega.plan.time import ADAM_BYTES, NORM_BYTES, layer_values

SHAPES = {
    # Rows, inputs, outputs: layers of a laptop model; of a 7B model and its tensor-parallel shards.
    "cpu": [
        (512, 256, 384), (2048, 256, 384), (2048, 688, 256), (2048, 256, 1376), (2048, 512, 2752),
    ],
    "cuda": [
        (4096, 4096, 768), (4096, 4096, 1536), (4096, 4096, 6144), (4096, 11008, 4096), (4096, 4096, 22016),
        (8192, 4096, 22016),
    ],
}  # fmt: skip
ATTENTION = {"cpu": [(8, 8, 2, 256, 32), (4, 8, 2, 512, 64)], "cuda": [(1, 32, 8, 4096, 128), (1, 32, 8, 8192, 128)]}
"""Batch size, heads, key-value heads, tokens, head size."""
LAYER = {"cpu": (8, 256, 256, 8, 2, 32, 688), "cuda": (1, 8192, 4096, 32, 8, 128, 11008)}
"""Batch size, tokens, hidden size, heads, key-value heads, head size, intermediate size."""
HEAD = {"cpu": (2048, 256, 32000), "cuda": (8192, 4096, 32000)}
ELEMENTS = {"cpu": 2**22, "cuda": 2**27}
MESSAGE_BYTES = 2**21


class Stopwatch:
    """Median seconds of a call, after one that is not counted.

    With `cpu_time` it measures the CPU time of all threads divided by their number, which other programs disturb less.
    """

    def __init__(self, device: str, rounds: int, *, cpu_time: bool = False):
        self.device, self.rounds, self.cpu_time = device, rounds, cpu_time

    def __call__(self, call: Callable[[], object]) -> float:
        call()
        found = []
        for _ in range(self.rounds):
            started = self._now()
            call()
            found.append(self._now() - started)
        return statistics.median(found)

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.process_time() / torch.get_num_threads() if self.cpu_time else time.perf_counter()


def gemm_sizes(clock: Stopwatch, dtype: torch.dtype, peak: float) -> list[tuple[float, float]]:
    """Return the FLOPs of each product, and the share of the peak over its forward and its two backward products."""
    found = []
    for rows, inputs, outputs in SHAPES[clock.device]:
        x = torch.randn(rows, inputs, device=clock.device, dtype=dtype)
        weight = torch.randn(outputs, inputs, device=clock.device, dtype=dtype)
        grad = torch.randn(rows, outputs, device=clock.device, dtype=dtype)

        def three(x: Tensor = x, weight: Tensor = weight, grad: Tensor = grad) -> None:
            x @ weight.t()
            grad @ weight
            grad.t() @ x

        flops = 2.0 * rows * inputs * outputs
        found.append((flops, 3 * flops / clock(three) / peak))
    return sorted(found)


def attention_shares(clock: Stopwatch, dtype: torch.dtype, peak: float) -> tuple[float, float]:
    """Return the shares of the peak of attention's forward and backward pass, counting causal FLOPs."""
    forward, backward = [], []
    for rows, heads, kv_heads, tokens, channels in ATTENTION[clock.device]:
        q, k, v = (
            torch.randn(rows, n, tokens, channels, device=clock.device, dtype=dtype).requires_grad_()
            for n in (heads, kv_heads, kv_heads)
        )

        def attend(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        grad = torch.randn_like(attend())
        flops = 2.0 * rows * heads * tokens**2 * channels
        alone = clock(lambda: attend().detach())
        both = clock(lambda: torch.autograd.grad(attend(), (q, k, v), grad))  # noqa: B023
        forward.append(flops / alone / peak)
        backward.append(2.5 * flops / max(both - alone, 1e-9) / peak)
    return statistics.mean(forward), statistics.mean(backward)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Apply rotary embeddings as megatron-core does without a fused kernel."""
    first, second = x.chunk(2, -1)
    return x * angles.cos().to(x.dtype) + torch.cat((-second, first), -1) * angles.sin().to(x.dtype)


def memory_share(clock: Stopwatch, dtype: torch.dtype, bandwidth: float) -> float:
    """Return the share of the bandwidth that the element-wise operations of a layer reach, as the engine runs them."""
    rows, tokens, hidden, heads, kv_heads, channels, width = LAYER[clock.device]
    on_cpu = clock.device == "cpu"

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, device=clock.device, dtype=dtype).requires_grad_()

    x, weight = made(tokens, rows, hidden), made(hidden)
    stacked, width_in = made(tokens, rows, (heads + 2 * kv_heads) * channels), made(tokens, rows, 2 * width)
    angles = torch.randn(tokens, 1, 1, channels, device=clock.device)
    if on_cpu:

        def activation(both: Tensor) -> Tensor:
            gate, up = both.chunk(2, -1)
            return F.silu(gate) * (up + 0.0)

    else:
        from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl

        def activation(both: Tensor) -> Tensor:
            return bias_swiglu_impl(both, None)

    def layer() -> list[Tensor]:
        outputs = []
        for _ in range(2):
            outputs.append(F.rms_norm(x, (hidden,), weight, 1e-5) + x)
        parts = torch.split(
            stacked.view(tokens, rows, kv_heads, -1), [heads // kv_heads * channels, channels, channels], -1
        )
        outputs.append(rotate(parts[0].reshape(tokens, rows, -1, channels), angles))
        outputs.append(rotate(parts[1], angles))
        outputs.append(activation(width_in))
        return outputs

    grads = [torch.randn_like(output) for output in layer()]
    seconds = clock(lambda: torch.autograd.grad(layer(), (x, weight, stacked, width_in), grads))
    count = rows * tokens
    values = sum(
        layer_values(
            count * hidden,
            count * (heads + kv_heads) * channels,
            count * (heads + 2 * kv_heads) * channels,
            count * width,
            on_cpu=on_cpu,
            backward=backward,
        )
        for backward in (False, True)
    )
    return values * dtype.itemsize / seconds / bandwidth


PASSES_OF_LOSS = 0.1
"""Share of the loss's time that its passes over the logits take next to its products: 6 % to 13 % in profiles."""


def loss_shares(clock: Stopwatch, dtype: torch.dtype, entry: Hardware, peak: float) -> tuple[float, float, float]:
    """Return the FLOPs of one of the loss's products, their share of the peak, and its passes' share of the bandwidth.

    The loss is timed as a whole, since its chunked products run differently from a layer's.
    """
    tokens, hidden, vocabulary = HEAD[clock.device]
    x = torch.randn(tokens, hidden, device=clock.device, dtype=dtype).requires_grad_()
    weight = (torch.randn(vocabulary, hidden, device=clock.device) * 0.02).to(dtype).requires_grad_()
    labels = torch.randint(0, vocabulary, (tokens,), device=clock.device)
    mask = torch.ones(tokens, device=clock.device)
    seconds = clock(lambda: linear_cross_entropy(x, weight, labels, mask, vocab_size=vocabulary))
    chunk = min(tokens, 256 if clock.device == "cpu" else 4096)
    flops = 2.0 * chunk * hidden * vocabulary
    moved = 3.0 * tokens * vocabulary * dtype.itemsize
    moved += tokens / chunk * vocabulary * hidden * (8 + (0 if dtype == torch.float32 else 4))
    products = 3 * tokens / chunk * flops / ((1 - PASSES_OF_LOSS) * seconds) / peak
    return flops, products, moved / (PASSES_OF_LOSS * seconds) / entry.bandwidth


def optimizer_share(clock: Stopwatch, bandwidth: float) -> float:
    """Return the share of the bandwidth that AdamW reaches, with gradient norm and clipping."""
    count = ELEMENTS[clock.device]
    params = [torch.randn(count // 8, device=clock.device).requires_grad_() for _ in range(8)]
    for param in params:
        param.grad = torch.randn_like(param)
    adam = torch.optim.AdamW(params, lr=1e-4, fused=True)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        adam.step()

    return (ADAM_BYTES + NORM_BYTES) * count / clock(step) / bandwidth


def op_seconds(clock: Stopwatch) -> float:
    """Return the seconds of one small op: the overhead of a launch, averaged over forward and backward."""
    count = 200
    x = torch.zeros(8, device=clock.device, requires_grad=True)

    def chain() -> None:
        y = x
        for _ in range(count):
            y = y * 1.0
        y.sum().backward()

    return clock(chain) / (2 * count)


def link_share(entry: Hardware, rounds: int) -> float | None:
    """Return the share of the link that an all-reduce of two processes reaches; None on a GPU."""
    if not entry.is_cpu:
        return None
    context, pipes = mp.get_context("spawn"), []
    with tempfile.TemporaryDirectory(prefix="igla-calibrate-") as folder:
        processes = []
        for rank in range(2):
            near, far = context.Pipe()
            processes.append(context.Process(target=_reduce, args=(rank, folder, rounds, far)))
            processes[-1].start()
            pipes.append(near)
        seconds = max(pipe.recv() for pipe in pipes)
        for process in processes:
            process.join()
    return MESSAGE_BYTES / seconds / entry.link


def _reduce(rank: int, folder: str, rounds: int, pipe) -> None:
    """Time an all-reduce as one of two ranks with one thread each."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    values = torch.zeros(MESSAGE_BYTES // 4)
    pipe.send(Stopwatch("cpu", rounds)(lambda: dist.all_reduce(values)))
    dist.destroy_process_group()


def measure(device: str, precision: str, rounds: int, *, cpu_time: bool = False) -> tuple[Hardware, dict]:
    """Return the hardware and the content of its calibration file."""
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    entry = hardware.cpu() if device == "cpu" else hardware.of_cuda_name(name)
    if entry is None:
        raise SystemExit(f"{name} is not in the hardware table. Add it to igla_mega/layout/hardware.py.")
    dtype = torch.float32 if precision == "FP32" else torch.bfloat16
    peak, clock = entry.peak(precision), Stopwatch(device, rounds, cpu_time=cpu_time)
    sizes = gemm_sizes(clock, dtype, peak)
    head_flops, head_share, loss = loss_shares(clock, dtype, entry, peak)
    sizes = sorted([*sizes, (head_flops, head_share)])
    forward, backward = attention_shares(clock, dtype, peak)
    optimizer = optimizer_share(clock, entry.bandwidth)
    rates = {
        "gemm": max(share for _, share in sizes),
        "attention_forward": forward,
        "attention_backward": backward,
        "memory": memory_share(clock, dtype, entry.bandwidth),
        "loss": loss,
        "optimizer": optimizer,
        "op_seconds": op_seconds(clock),
    }
    if (link := link_share(entry, rounds)) is not None:
        rates["link"] = link
    return entry, {
        "format": calibration.FORMAT,
        "hardware": entry.name,
        "machine": _machine() if device == "cpu" else name,
        "precision": precision,
        "torch": torch.__version__,
        "peak_flops": peak,
        "cpu_time": cpu_time,
        "rates": rates,
        "gemm_sizes": sizes,
    }


def _machine() -> str:
    sys.path.insert(0, str(Path(__file__).parent / "bench"))
    from _common import machine

    return machine()


def write(entry: Hardware, found: dict) -> Path:
    """Write the calibration to the folder in which the plan looks for it."""
    date = datetime.date.today().isoformat()
    path = calibration.RESULTS / f"calibration_{date}_{entry.name}_{found['precision'].lower()}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"date": date, **found}, indent=1) + "\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--precision", choices=["BF16", "FP32"], action="append", help="default: both on a CPU, BF16 on a GPU"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cpu-time", action="store_true", help="measure CPU time, for a shared machine")
    parser.add_argument("--out", type=Path, help="file to write instead; one precision only")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        from igla_mega.distributed import host

        host.keep_freed_memory()
    for precision in args.precision or (["FP32", "BF16"] if device == "cpu" else ["BF16"]):
        entry, found = measure(device, precision, args.rounds, cpu_time=args.cpu_time)
        for name, value in found["rates"].items():
            print(f"{precision} {name:20} {value:.3g}")
        if args.out:
            args.out.write_text(json.dumps(found, indent=1) + "\n")
        print(f"written: {args.out or write(entry, found)}")


if __name__ == "__main__":
    main()
