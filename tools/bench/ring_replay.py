"""Measure ring attention without communication: the work of W ranks, replayed in turn on one device, against one call.

A ring loses time to its messages and to the division of attention into blocks that are merged. This measures the second
part: the blocks, merges and sums of every rank, with keys passed in memory, against attention in one piece, which does
the same work. `make gpu-check` runs it on a GPU with 131,072 tokens.

    python tools/bench/ring_replay.py [--device cpu|cuda] [--tokens N] [--ranks W]
"""

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # also without an installation

from igla_mega.ops import ring_attention as ring
from igla_mega.ops.zigzag import zigzag_join, zigzag_split

ROUNDS = 5


class Place:
    """Stand-in for a process group: a rank of a ring without any other process."""

    def __init__(self, rank: int, size: int):
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


def replay(q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor | None, size: int) -> tuple[Tensor, ...]:
    """Run all `size` ranks in turn; return the output, and with `grad_out` also dq, dk, dv, all whole [S, B, H, D]."""
    queries, keys, values = (zigzag_split(t, size, 0) for t in (q, k, v))
    kv = [torch.stack(pair) for pair in zip(keys, values, strict=True)]
    gradients = [torch.zeros_like(pair, dtype=torch.float32) for pair in kv]
    forward, grad_q = [], []
    for rank in range(size):
        task = ring._Task(
            inner=None,
            ring=Place(rank, size),  # type: ignore[arg-type]
            gather=False,
            offsets=((0, q.size(0)),),
            causal=True,
            scale=1 / math.sqrt(q.size(3)),
            deterministic=False,
        )
        shards = queries[rank], keys[rank], values[rank]
        with mock.patch.object(ring, "_pass_on", _Handed(rank, size, kv, gradients)):
            forward.append(ring._ring_forward(*shards, task))
        if grad_out is not None:
            with mock.patch.object(ring, "_pass_on", _Handed(rank, size, kv, gradients)):
                grad_shard = zigzag_split(grad_out, size, 0)[rank]
                grad_q.append(ring._ring_backward(grad_shard, *shards, *forward[-1], task)[0])
    out = zigzag_join([out for out, _ in forward], 0)
    if grad_out is None:
        return (out,)
    grad_k, grad_v = (zigzag_join([sums[which].to(q.dtype) for sums in gradients], 0) for which in (0, 1))
    return out, zigzag_join(grad_q, 0), grad_k, grad_v


class _Handed:
    """Stand-in for the ring's exchange: returns the previous rank's keys, or zeros for the sums of their gradients."""

    def __init__(self, rank: int, size: int, kv: list[Tensor], gradients: list[Tensor]):
        self.rank, self.size, self.kv, self.gradients = rank, size, kv, gradients
        self.step = self.added = 0

    def __call__(self, message: Tensor, group, tag: int, free: Tensor | None = None) -> "_Message":
        if tag == ring._KV_TAG:
            self.step += 1
            return _Message(self.kv[(self.rank - self.step) % self.size])
        # Ranks run one after the other and cannot pass partial sums on: each adds its part to the sum of the chunk's
        # owner, which gives the same total.
        self.gradients[(self.rank - self.added) % self.size] += message
        self.added += 1
        return _Message(torch.zeros_like(message))


class _Message:
    """Message that has already arrived."""

    def __init__(self, message: Tensor):
        self.message = message

    def wait(self) -> tuple[Tensor, None]:
        return self.message, None


def whole(q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor | None) -> tuple[Tensor, ...]:
    """Compute the same as `replay` in one call."""
    if grad_out is None:
        with torch.no_grad():
            return (ring.ring_attention(q, k, v, None),)  # type: ignore[return-value]
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    out = ring.ring_attention(q, k, v, None)
    assert isinstance(out, Tensor), "called without return_lse"
    return out.detach(), *torch.autograd.grad(out, (q, k, v), grad_out)


def seconds(call, device: str) -> float:
    """Return the seconds of a call, with everything it started on the device."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def inputs(
    tokens: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return q, k, v and the gradient of the output, [S, B, H, D]."""
    generator = torch.Generator(device).manual_seed(1)

    def normal(count: int) -> Tensor:
        return torch.randn(tokens, 1, count, dim, generator=generator, device=device).to(dtype)

    return normal(heads), normal(kv_heads), normal(kv_heads), normal(heads)


def measure(device: str, tokens: int, size: int, heads: tuple[int, int, int], dtype: torch.dtype) -> dict:
    """Return the medians of the paired time ratios, and the errors of both variants against fp64 on fewer tokens.

    Args:
        size: number of ranks of the ring.
        heads: number of query heads, number of key-value heads, head size.
    """
    q, k, v, grad_out = inputs(tokens, *heads, dtype, device)
    ratios: dict[str, list[float]] = {"forward": [], "forward and backward": []}
    for _ in range(ROUNDS + 1):
        for name, gradient in (("forward", None), ("forward and backward", grad_out)):
            one = seconds(lambda: whole(q, k, v, gradient), device)  # noqa: B023
            ratios[name].append(one / seconds(lambda: replay(q, k, v, gradient, size), device))  # noqa: B023
    small = inputs(min(tokens, 4096), 4, 2, heads[2], dtype, device)
    exact = whole(small[0].double(), small[1].double(), small[2].double(), small[3].double())
    errors = {
        name: [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]
        for name, found in (("one piece", whole(*small)), ("ring", replay(*small, size)))
    }
    return {
        "device": device,
        "tokens": tokens,
        "ranks": size,
        "heads": list(heads),
        "dtype": str(dtype).removeprefix("torch."),
        "one piece / ring, time": {name: round(statistics.median(found[1:]), 4) for name, found in ratios.items()},
        "error against fp64 (out, dq, dk, dv)": errors,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--ranks", type=int, default=8)
    options = parser.parse_args()
    cuda = options.device == "cuda"
    heads, dtype = ((32, 8, 128), torch.bfloat16) if cuda else ((4, 1, 64), torch.float32)
    tokens = options.tokens or (131072 if cuda else 8192)
    print(json.dumps(measure(options.device, tokens, options.ranks, heads, dtype), indent=1))


if __name__ == "__main__":
    main()
