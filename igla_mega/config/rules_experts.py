"""Rules about `moe:`: sizes that must divide, and combinations of experts with other features."""

import math
from collections.abc import Iterator

from igla_mega.config.features import Moe
from igla_mega.config.near import near_divisors
from igla_mega.config.schema import Recipe


def experts_add_up(recipe: Recipe) -> Iterator[str]:
    """Require sizes of the experts that divide, and no keys for experts without `moe:`.

    A base model that has not been read yet may have experts: the rules are applied again to its shape.
    """
    moe, parallel = recipe.moe, recipe.distributed.expert_parallel
    split, factor = recipe.distributed.expert_tensor_parallel, recipe.training.expert_capacity_factor
    if moe is None:
        if recipe.model is None and recipe.base_model is not None:
            return
        if recipe.training.expert_capacity_factor is not None:
            yield "training.expert_capacity_factor: given without `moe:`. Remove it, or give `moe.num_experts`."
        if parallel not in ("auto", 1):
            yield f"distributed.expert_parallel: {parallel} without `moe:`, so there are no experts. Use 1 or auto."
        if split > 1:
            yield f"distributed.expert_tensor_parallel: {split} without `moe:`, so there are no experts. Use 1."
        return
    if moe.num_experts_per_tok > moe.num_experts:
        yield (
            f"moe.num_experts_per_tok: {moe.num_experts_per_tok} is more than moe.num_experts {moe.num_experts}. "
            f"Use at most {moe.num_experts}."
        )
    if parallel != "auto" and moe.num_experts % parallel:
        yield (
            f"distributed.expert_parallel: {parallel} does not divide moe.num_experts {moe.num_experts}. "
            f"Use {near_divisors(moe.num_experts, parallel)}."
        )
    if recipe.model is not None and recipe.model.intermediate_size % split:
        size = recipe.model.intermediate_size
        yield (
            f"distributed.expert_tensor_parallel: {split} does not divide model.intermediate_size {size}. "
            f"Use {near_divisors(size, split)}."
        )
    if moe.pad_to_capacity:
        if factor is None:
            yield "moe.pad_to_capacity: true without training.expert_capacity_factor, which sets the size. Give it."
        if moe.capacity_over != "rank":
            yield (
                f"moe.pad_to_capacity: true with moe.capacity_over {moe.capacity_over}, whose shares differ "
                "between ranks. Use moe.capacity_over=rank, or pad_to_capacity=false."
            )
        if moe.dispatcher != "alltoall":
            yield f"moe.pad_to_capacity: true with moe.dispatcher {moe.dispatcher}. Use alltoall."


def experts_fit_the_rest(recipe: Recipe) -> Iterator[str]:
    """Refuse combinations of experts with other features that are wrong or not verified."""
    if (moe := recipe.moe) is None:
        return
    where = recipe.distributed
    if where.sequence_parallel is False and where.tensor_parallel not in ("auto", 1):
        yield (
            f"distributed.sequence_parallel: false with `moe:` and tensor_parallel {where.tensor_parallel}, whose "
            "ranks would each send the same tokens to the experts. Use true or auto."
        )
    if where.expert_tensor_parallel > 1:
        for key in ("lora", "quantization"):
            if getattr(recipe, key) is not None:
                yield f"distributed.expert_tensor_parallel: {where.expert_tensor_parallel} with `{key}:`. Use 1."
        if where.strategy == "FSDP":
            yield (
                f"distributed.expert_tensor_parallel: {where.expert_tensor_parallel} with strategy FSDP is not "
                "verified to train exactly, so it is refused. Use 1, or strategy DDP."
            )
    if recipe.uses_ewc and moe.capacity_over == "global" and recipe.training.expert_capacity_factor is not None:
        yield (
            "moe.capacity_over: global with EWC, whose Fisher pass takes one sequence at a time. Use sequence, or omit "
            "training.expert_capacity_factor."
        )
    for key in ("expert_parallel", "tensor_parallel"):
        size = getattr(where, key)
        if where.strategy == "FSDP" and recipe.uses_ewc and size not in ("auto", 1):
            yield (
                f"distributed.{key}: {size} with strategy FSDP, `moe:` and EWC, whose Fisher is not verified there. "
                "Use 1, or strategy DDP."
            )


def differs_by_layout(recipe: Recipe) -> list[str]:
    """Return a sentence if layouts with different micro-batches train with different balancing losses."""
    moe, size = recipe.moe, recipe.distributed.micro_batch_size
    if moe is None or not moe.router_aux_loss_coef or moe.balance_over != "micro_batch" or size == 1:
        return []
    chosen = "chosen by the layout" if size == "auto" else f"here {size}"
    return [
        "moe.balance_over: micro_batch balances the tokens of a micro-batch together, so layouts that differ in "
        f"distributed.micro_batch_size ({chosen}) differ in their losses. Use sequence for the same loss in every "
        "layout."
    ]


def expected_drop_rate(moe: Moe, capacity_factor: float, num_tokens: int) -> float:
    """Return the expected share of dropped token-expert assignments under uniform random routing.

    The load of an expert is binomial; its normal approximation gives E[max(load - capacity, 0)] in closed form.

    Args:
        num_tokens: number of tokens over which the fair share is computed.
    """
    share = moe.num_experts_per_tok / moe.num_experts
    fair, room = num_tokens * share, math.ceil(num_tokens * share * capacity_factor)
    deviation = math.sqrt(num_tokens * share * (1 - share)) or 1e-9
    # E[max(X - room, 0)] of a normal X: deviation * (density(z) - z * P(Z > z)).
    z = (room - fair) / deviation
    density, beyond = math.exp(-z * z / 2) / math.sqrt(2 * math.pi), math.erfc(z / math.sqrt(2)) / 2
    return deviation * (density - z * beyond) / fair
