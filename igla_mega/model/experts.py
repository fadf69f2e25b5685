"""The layer of experts: megatron-core's, with our router and, on CUDA, its experts' products taken together."""

import importlib.util
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor, nn
from torch.nn import functional as F

from igla_mega.config.errors import ConfigError
from igla_mega.config.features import Moe
from igla_mega.model.router import Router, RouterContext, routers_of


class GroupedExperts(SequentialMLP):
    """The experts of this rank in two grouped products (`torch._grouped_mm`, bf16 on CUDA) instead of two each."""

    def forward(self, tokens: Tensor, tokens_per_expert: Tensor, weights: Tensor) -> tuple[Tensor, None]:
        """As `SequentialMLP.forward`: tokens [T, H], expert by expert; weights [T] fp32 of their outputs."""
        if not self.local_experts[0].linear_fc1.weight.requires_grad:
            return super().forward(tokens, tokens_per_expert, weights)  # which may carry adapters, or codes of 4 bits
        linears = [(expert.linear_fc1, expert.linear_fc2) for expert in self.local_experts]
        ends = tokens_per_expert.to(tokens.device).cumsum(0, dtype=torch.int32)
        up = torch.stack([first.weight for first, _ in linears]).transpose(1, 2)
        down = torch.stack([second.weight for _, second in linears]).transpose(1, 2)
        gate, hidden = torch._grouped_mm(tokens, up, offs=ends).chunk(2, -1)
        hidden = (F.silu(gate) * hidden * weights.unsqueeze(-1)).to(tokens.dtype)
        return torch._grouped_mm(hidden, down, offs=ends), None


def use_experts(layer: Any, moe: Moe, *, grouped: bool) -> None:
    """Give a layer's spec our router and expert layer.

    Args:
        grouped: its experts are `SequentialMLP`, and `torch._grouped_mm` takes their products.

    Raises:
        ConfigError: the dispatcher asked for is not there.
    """
    if moe.dispatcher == "flex" and importlib.util.find_spec("deep_ep") is None:
        raise ConfigError(
            "moe.dispatcher: flex needs DeepEP (the package deep_ep), and it is not installed.\n"
            "  Install it, or use alltoall."
        )
    layer.submodules.mlp.submodules.router = partial(Router, moe=moe)
    if grouped:
        layer.submodules.mlp.submodules.experts.module = GroupedExperts


def connect(chunk: nn.Module) -> None:
    """Have the routers of a model chunk know of one another, and its experts be filled up in training alone."""
    shared = RouterContext()
    for router in routers_of([chunk]):
        router.shared = shared
    for module in chunk.modules():
        if isinstance(module, MoELayer) and module.config.moe_pad_expert_input_to_capacity:
            module.register_forward_pre_hook(_fill_in_training)


def _fill_in_training(layer: Any, _: tuple) -> None:
    layer.token_dispatcher.drop_and_pad = layer.training
