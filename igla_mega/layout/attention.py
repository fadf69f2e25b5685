"""Cost of context parallelism: compute and bytes of the attention of one layer on one rank."""

from dataclasses import dataclass

from igla_mega.config.schema import Model
from igla_mega.layout.layout import Layout

BACKWARD_WORK = 2.5
"""Work of the backward pass of flash attention relative to the forward pass: 5 matrix products against 2."""


@dataclass(frozen=True)
class RingCost:
    """Cost of one layer on one rank for a micro-batch. With a single step the message does not overlap with compute."""

    schedule: str
    num_steps: int
    """Number of compute blocks, each concurrent with one message."""
    forward_flops: float
    """FLOP of one step, causal."""
    backward_flops: float
    forward_bytes: float
    """Bytes sent by a rank during one step."""
    backward_bytes: float

    def bandwidth_to_hide(self, peak_flops: float) -> tuple[float, float]:
        """Return the bandwidth that hides a message behind its step, in bytes per second: (forward, backward)."""
        return (
            self.forward_bytes / (self.forward_flops / peak_flops),
            self.backward_bytes / (self.backward_flops / peak_flops),
        )


def ring_cost(model: Model, layout: Layout, schedule: str, *, bytes_per_value: int, inner_size: int = 1) -> RingCost:
    """Return the cost of the attention of one layer over `layout.context` ranks.

    Args:
        schedule: p2p, allgather, a2a or a2a+p2p.
        bytes_per_value: size of an activation; gradients of keys and values are sent in fp32.
        inner_size: number of ranks of an a2a group, for a2a+p2p.
    """
    size = layout.context
    inner = {"a2a": size, "a2a+p2p": inner_size}.get(schedule, 1)
    ring = size // inner
    tokens = layout.padded_length // size * layout.micro_batch_size
    head, heads, kv_heads = model.head_size, model.num_heads // layout.tensor, model.num_kv_heads // layout.tensor

    keys_and_values = 2 * tokens * kv_heads * head
    # Zig-zag: each of W steps has (S/W)^2 / 2 query-key pairs, with 4 D FLOP per pair and head.
    flops = 2 * (layout.padded_length // size) ** 2 * layout.micro_batch_size * heads * head * size
    num_steps = ring if schedule in ("p2p", "a2a+p2p") else 1
    # An a2a sends queries, keys, values and the result, of which each rank keeps 1 / inner.
    exchanged = 2 * tokens * (heads + kv_heads) * head * (inner - 1) / inner * bytes_per_value
    if schedule == "allgather":
        forward = float(keys_and_values * (size - 1) * bytes_per_value)
        backward = forward + keys_and_values * (size - 1) * 4
    else:
        hop = keys_and_values if ring > 1 else 0
        forward = hop * bytes_per_value + exchanged / num_steps
        backward = hop * (bytes_per_value + 4) + 2 * exchanged / num_steps
    return RingCost(schedule, num_steps, flops / num_steps, BACKWARD_WORK * flops / num_steps, forward, backward)


def describe(cost: RingCost, layout: Layout, reason: str, peak_flops: float | None) -> list[str]:
    """Return the lines that `train --verbose` prints at the start."""
    steps = f"{cost.num_steps} steps" if cost.num_steps > 1 else "1 step"
    lines = [
        f"context parallel: {cost.schedule} over {layout.context} ranks ({reason}); "
        f"{layout.padded_length // layout.context:,} tokens of each sequence per rank",
        f"  attention of a layer: {steps} of {cost.forward_flops / 1e9:,.3g} GFLOP forward and "
        f"{cost.backward_flops / 1e9:,.3g} backward, with {cost.forward_bytes / 2**20:,.3g} MiB sent forward and "
        f"{cost.backward_bytes / 2**20:,.3g} MiB backward",
    ]
    if peak_flops:
        forward, backward = (rate / 1e9 for rate in cost.bandwidth_to_hide(peak_flops))
        link = f"a link of {forward:,.3g} GB/s forward, {backward:,.3g} GB/s backward"
        hidden = f"hidden by compute from {link}" if cost.num_steps > 1 else f"as long as the compute on {link}"
        lines.append(f"  messages are {hidden} (at {peak_flops / 1e12:,.3g} TFLOP/s per rank)")
    return lines
