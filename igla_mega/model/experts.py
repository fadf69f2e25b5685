"""Configure megatron-core's expert layer: this package's router and, on CUDA, grouped products of the experts."""

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
from igla_mega.distributed import megatron_patches
from igla_mega.model.router import Router, RouterContext, routers_of


class GroupedExperts(SequentialMLP):
    """Experts of this rank as two grouped products (`torch._grouped_mm`, bf16 on CUDA) instead of two per expert."""

    def forward(self, tokens: Tensor, tokens_per_expert: Tensor, weights: Tensor) -> tuple[Tensor, None]:
        """Apply each expert to its tokens, as `SequentialMLP.forward` does.

        Args:
            tokens: [T, H], sorted by expert.
            tokens_per_expert: [E] number of tokens of each local expert.
            weights: [T] fp32, routing weight of each token's output.

        Returns:
            [T, H] and None in place of a bias.
        """
        # Frozen experts may carry adapters or 4-bit codes, which hook into the forward pass of each linear.
        if not self.local_experts[0].linear_fc1.weight.requires_grad:
            return super().forward(tokens, tokens_per_expert, weights)
        linears = [(expert.linear_fc1, expert.linear_fc2) for expert in self.local_experts]
        ends = tokens_per_expert.to(tokens.device).cumsum(0, dtype=torch.int32)
        # Stacked in every call: the experts stay separate parameters, by the names that checkpoints and adapters use.
        up = torch.stack([first.weight for first, _ in linears]).transpose(1, 2)  # [E, H, 2F]
        down = torch.stack([second.weight for _, second in linears]).transpose(1, 2)  # [E, F, H]
        gate, hidden = torch._grouped_mm(tokens, up, offs=ends).chunk(2, -1)  # [T, F] each
        hidden = (F.silu(gate) * hidden * weights.unsqueeze(-1)).to(tokens.dtype)
        return torch._grouped_mm(hidden, down, offs=ends), None


def use_experts(layer: Any, moe: Moe, *, grouped: bool) -> None:
    """Set this package's router and, if grouped, its expert layer in a layer's spec.

    Args:
        layer: spec of a transformer layer whose MLP is a `MoELayer`.
        moe: the recipe's `moe` section.
        grouped: True to compute the experts of a `SequentialMLP` with `torch._grouped_mm`.

    Raises:
        ConfigError: the configured dispatcher needs a package that is not installed.
    """
    if moe.dispatcher == "flex" and importlib.util.find_spec("deep_ep") is None:
        raise ConfigError(
            "moe.dispatcher: flex needs DeepEP (the package deep_ep), which is not installed.\n"
            "  Install it, or use alltoall."
        )
    # On a GPU without Transformer Engine too, where no patch of the host applies: the router would raise NameError.
    megatron_patches.define_te_general_gemm()
    layer.submodules.mlp.submodules.router = partial(Router, moe=moe)
    if grouped:
        layer.submodules.mlp.submodules.experts.module = GroupedExperts


def connect(chunk: nn.Module) -> None:
    """Share one context between all routers of a model chunk, and pad expert inputs to capacity only in training."""
    shared = RouterContext()
    for router in routers_of([chunk]):
        router.shared = shared
    for module in chunk.modules():
        if isinstance(module, MoELayer) and module.config.moe_pad_expert_input_to_capacity:
            module.register_forward_pre_hook(_pad_in_training)


def _pad_in_training(layer: Any, _: tuple) -> None:
    """Forward pre-hook: the router limits experts to their capacity only in training, so only then is padding valid."""
    layer.token_dispatcher.drop_and_pad = layer.training
