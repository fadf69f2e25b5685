"""Identify the tokens that reach an expert, for dropout that is the same in every layout.

An expert sees tokens of several ranks in an order that depends on the layout and on the dispatcher. So the keys of a
rank's tokens take the way of the tokens themselves: the dispatcher moves them to the experts first.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from igla_mega.ops.categorical import token_keys
from igla_mega.ops.zigzag import zigzag_intervals

_KEY_BYTES = 8


def identify(layer: Any, context: tuple[int, int], is_wanted: Callable[[], bool]) -> None:
    """Give the linears of a layer's routed experts, in every forward pass, the keys of their tokens: `token_keys`, [T].

    Args:
        layer: megatron-core's `MoELayer`; the experts of this rank are separate modules.
        context: this rank's index on the context axis, and the size of the axis.
        is_wanted: True if the current pass needs the keys; the same on all ranks.
    """
    preprocess = layer.preprocess

    def with_keys(hidden: Tensor, probs: Tensor, routing_map: Tensor) -> tuple[Tensor, Tensor]:
        if is_wanted():
            _send_keys(layer, _keys(layer, context, hidden), hidden, probs, routing_map)
        return preprocess(hidden, probs, routing_map)

    layer.preprocess = with_keys


def _keys(layer: Any, context: tuple[int, int], hidden: Tensor) -> Tensor:
    """Return a key for each token of this rank, int64 [S, B]: a function of (seed, sample, position)."""
    group = layer.tp_group
    size = group.size() if layer.config.sequence_parallel else 1
    length = hidden.size(0) * size * context[1]
    intervals = zigzag_intervals(length, *context)
    positions = torch.cat([torch.arange(*interval, device=hidden.device) for interval in intervals])
    positions = positions.chunk(size)[group.rank() if size > 1 else 0]
    # `lora.seed_dropout` has set the generator's seed to the run's seed and the number of the first sample.
    first = torch.initial_seed()
    return torch.stack([token_keys(0, first + row, positions) for row in range(hidden.size(1))], 1)


@torch.no_grad()
def _send_keys(layer: Any, keys: Tensor, hidden: Tensor, probs: Tensor, routing_map: Tensor) -> None:
    """Dispatch the keys as the tokens will be, and store them at the linears of the experts of this rank."""
    dispatcher = layer.token_dispatcher
    # As bytes, which every type of activations represents exactly.
    columns = keys.unsqueeze(-1).view(torch.uint8).to(hidden.dtype)
    if layer.config.moe_token_dispatcher_type == "flex":  # DeepEP moves rows of the hidden size
        columns = torch.nn.functional.pad(columns, (0, hidden.size(-1) - _KEY_BYTES))
    # Its computation overlaps with the dispatch of the tokens, not with this one.
    shared, dispatcher.shared_experts = dispatcher.shared_experts, None
    try:
        sent, probs = dispatcher.dispatch_preprocess(columns, routing_map, probs)
        received, probs = dispatcher.token_dispatch(sent, probs)
        received, counts, _ = dispatcher.dispatch_postprocess(received, probs)
    finally:
        dispatcher.shared_experts = shared
    arrived = received[:, :_KEY_BYTES].to(torch.uint8).contiguous().view(torch.int64).squeeze(-1)  # [T]
    experts = layer.experts.local_experts
    for expert, own in zip(experts, arrived.split([int(count) for count in counts]), strict=True):
        expert.linear_fc1.token_keys = expert.linear_fc2.token_keys = own
