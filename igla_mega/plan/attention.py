"""What context parallelism costs: work and bytes of one layer's attention on one rank."""

from dataclasses import dataclass

from igla_mega.config.schema import Model
from igla_mega.layout.layout import Layout

BACKWARD_WORK = 2.5
"""Matrix products of flash attention's backward pass, as a multiple of the forward's: 5 against 2."""


@dataclass(frozen=True)
class RingCost:
    """One layer, one sequence of each row, one rank. With one step there is one message, and nothing to hide it."""

    schedule: str
    num_steps: int
    """Blocks of compute, each beside one message."""
    forward_flops: float
    """Of one step, causal."""
    backward_flops: float
    forward_bytes: float
    """Sent by a rank beside one step."""
    backward_bytes: float

    def bandwidth_to_hide(self, peak_flops: float) -> tuple[float, float]:
        """Bytes per second of a link that keeps a step's message within its compute: (forward, backward)."""
        return (
            self.forward_bytes / (self.forward_flops / peak_flops),
            self.backward_bytes / (self.backward_flops / peak_flops),
        )


def ring_cost(model: Model, layout: Layout, schedule: str, *, bytes_per_value: int, inner_size: int = 1) -> RingCost:
    """Count one layer's attention over `layout.context` ranks.

    Args:
        schedule: a resolved one (p2p, allgather, a2a, a2a+p2p).
        bytes_per_value: of activations; gradients of keys and values travel in fp32.
        inner_size: ranks of an a2a group, for a2a+p2p.
    """
    size = layout.context
    inner = {"a2a": size, "a2a+p2p": inner_size}.get(schedule, 1)
    ring = size // inner
    tokens = layout.padded_length // size * layout.micro_batch_size
    head, heads, kv_heads = model.head_size, model.num_heads // layout.tensor, model.num_kv_heads // layout.tensor

    keys_and_values = 2 * tokens * kv_heads * head
    # Zig-zag: each of W steps has (S/W)^2 / 2 pairs of a query and a key, 4 D FLOP a pair and head.
    flops = 2 * (layout.padded_length // size) ** 2 * layout.micro_batch_size * heads * head * size
    num_steps = ring if schedule in ("p2p", "a2a+p2p") else 1
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
    """The lines that `train --verbose` prints at the start."""
    steps = f"{cost.num_steps} steps" if cost.num_steps > 1 else "1 step"
    lines = [
        f"context parallel: {cost.schedule} over {layout.context} ranks ({reason}); "
        f"{layout.padded_length // layout.context:,} tokens of each sequence on a rank",
        f"  a layer's attention: {steps} of {cost.forward_flops / 1e9:,.3g} GFLOP forward and "
        f"{cost.backward_flops / 1e9:,.3g} backward, beside {cost.forward_bytes / 2**20:,.3g} MiB sent forward and "
        f"{cost.backward_bytes / 2**20:,.3g} MiB backward",
    ]
    if peak_flops:
        forward, backward = (rate / 1e9 for rate in cost.bandwidth_to_hide(peak_flops))
        link = f"a link of {forward:,.3g} GB/s forward, {backward:,.3g} GB/s backward"
        hidden = f"hidden behind the compute from {link}" if cost.num_steps > 1 else f"as long as the compute on {link}"
        lines.append(f"  its messages are {hidden} (at {peak_flops / 1e12:,.3g} TFLOP/s a rank)")
    return lines
