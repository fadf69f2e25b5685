"""Presets of `koshey.tier` as recipe keys. Keys given in a recipe take precedence over them."""

from typing import Any

from igla_mega.config.merging import merge

_FROM_TIER: list[tuple[int, dict[str, Any]]] = [
    (
        1,
        {
            "koshey": {"flash_attention": True},
            "distributed": {"precision": "BF16", "gradient_checkpointing": "full"},
        },
    ),
    (
        4,
        {
            "koshey": {"ring_attention": True, "ewc_enabled": True, "ewc_lambda": 5000.0, "fisher_samples": 1000},
            "distributed": {"sequence_parallel": True},
        },
    ),
    (
        7,
        {
            "koshey": {"dynamic_batching": True},
            "moe": {"num_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.01},
            "continual": {"method": "ewc"},
        },
    ),
]


def preset(tier: int) -> dict[str, Any]:
    """Return the recipe keys of a tier, including those of lower tiers."""
    keys: dict[str, Any] = {}
    for first_tier, more in _FROM_TIER:
        if tier >= first_tier:
            keys = merge(keys, more)
    return keys
