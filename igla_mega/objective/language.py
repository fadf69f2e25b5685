"""Next-token prediction as a megatron-core forward step."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from igla_mega.model.spec import Documents

Batch = dict[str, Any]
"""One micro-batch: tokens, labels, position_ids [B, S] int64; loss_mask [B, S] fp32. Where rows are packed documents,
also `documents`: for each row, where they begin in the whole sequence and where the last one ends."""

TOKENS = ("tokens", "labels", "loss_mask", "position_ids")
"""What of a batch lies along the sequence."""


def forward_step(batches: Iterator[Batch], model: nn.Module) -> tuple[Tensor, partial]:
    """Run one micro-batch through this rank's chunk.

    Returns:
        What the chunk gives (the summed loss in nats on the last stage, else hidden states), and the function that
        megatron-core calls on it there: (summed loss, number of targets, [2] both as fp64 for the report).
    """
    batch = next(batches)
    return run(batch, model), partial(_report, batch["loss_mask"])


def run(batch: Batch, model: nn.Module) -> Tensor:
    """What this rank's chunk gives of a micro-batch."""
    return model(
        batch["tokens"],
        batch["position_ids"],
        None,  # causal by construction
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        packed_seq_params=Documents(rows=batch["documents"]) if "documents" in batch else None,
    )


def _report(loss_mask: Tensor, loss_sum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    num_targets = loss_mask.sum()
    return loss_sum, num_targets.to(torch.int), torch.stack([loss_sum.detach().double(), num_targets.double()])
