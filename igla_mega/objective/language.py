"""Next-token prediction as a megatron-core forward step."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from igla_mega.data.micro_batch import MicroBatch
from igla_mega.model.spec import Documents


def forward_step(batches: Iterator[MicroBatch], model: nn.Module) -> tuple[Tensor, partial]:
    """Run one micro-batch through this rank's chunk.

    Returns:
        What the chunk gives (the summed loss in nats on the last stage, else hidden states), and the function that
        megatron-core calls on it there: (summed loss, number of targets, [2] both as fp64 for the report).
    """
    batch = next(batches)
    return run(batch, model), partial(_report, batch.loss_mask)


def run(batch: MicroBatch, model: nn.Module) -> Tensor:
    """What this rank's chunk gives of a micro-batch."""
    return model(
        batch.tokens,
        batch.position_ids,
        None,  # causal by construction
        labels=batch.labels,
        loss_mask=batch.loss_mask,
        packed_seq_params=Documents(rows=batch.documents) if batch.documents is not None else None,
        dropout_seed=batch.dropout_seed,
        routing=batch.routing,
    )


def _report(loss_mask: Tensor, loss_sum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    num_targets = loss_mask.sum()
    return loss_sum, num_targets.to(torch.int), torch.stack([loss_sum.detach().double(), num_targets.double()])
