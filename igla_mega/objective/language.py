"""Implement next-token prediction as a megatron-core forward step."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from igla_mega.data.micro_batch import MicroBatch
from igla_mega.model.spec import Documents


def forward_step(batches: Iterator[MicroBatch], model: nn.Module) -> tuple[Tensor, partial]:
    """Run one micro-batch through this rank's chunk.

    Returns:
        The chunk's output (summed loss in nats on the last stage, hidden states [S, B, H] on others), and the function
        that megatron-core calls with it on the last stage: (summed loss, number of targets, fp64 [2] of both).
    """
    batch = next(batches)
    return run(batch, model), partial(_report, batch.loss_mask)


def run(batch: MicroBatch, model: nn.Module) -> Tensor:
    """Return the output of this rank's chunk for a micro-batch."""
    return model(
        batch.tokens,
        batch.position_ids,
        None,  # no mask: attention is always causal
        labels=batch.labels,
        loss_mask=batch.loss_mask,
        packed_seq_params=Documents(rows=batch.documents) if batch.documents is not None else None,
        dropout_seed=batch.dropout_seed,
        routing=batch.routing,
    )


def _report(loss_mask: Tensor, loss_sum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the summed loss, the number of targets that it is divided by, and both for the metrics."""
    # A sum and a count, not a mean: `finalize` divides by the targets of the global batch, which ranks share unevenly.
    num_targets = loss_mask.sum()
    return loss_sum, num_targets.to(torch.int), torch.stack([loss_sum.detach().double(), num_targets.double()])
