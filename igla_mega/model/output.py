"""What the last pipeline stage returns when labels are given: a summed loss, or the log-probability of each token.

Megatron-core's GPTModel would hold the logits of all tokens at once: 131,072 tokens of a vocabulary of 32,000 take
16 GiB in fp32. Each output here computes them for a bounded number of tokens at a time.
"""

from dataclasses import dataclass
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from igla_mega.ops.linear_cross_entropy import linear_cross_entropy
from igla_mega.ops.linear_log_probs import linear_log_probs


class Output(Protocol):
    """Maps the last hidden states and the output projection to what a chunk returns."""

    def __call__(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        loss_mask: Tensor,
        *,
        group: dist.ProcessGroup | None,
        vocab_size: int,
    ) -> Tensor:
        """Compute the output.

        Args:
            hidden: [S, B, H], complete on every tensor-parallel rank.
            weight: [V / tensor ranks, H], this rank's rows of the output projection.
            labels, loss_mask: [B, S].
            group: tensor-parallel ranks; None for one.
            vocab_size: size of the vocabulary without the rows that pad it.
        """


@dataclass(frozen=True)
class SummedLoss:
    """Cross-entropy in nats, summed over the targets: a scalar."""

    chunk: int | None = None
    """Number of tokens whose logits exist at once; None: chosen for the device."""
    sparse_loss_mask: bool = False
    """True to skip the projection of tokens that are no target. Finding them waits for the device, so this pays only
    where most tokens are none, as in conversations."""
    into_main_grad: bool = True
    """True to add the weight's gradient to data parallelism's fp32 buffer directly, where there is one. On a CPU this
    saves one pass over the largest weight. Must be False where autograd's hooks start the reduction of that buffer
    (`overlap_communication`): no hook fires for a gradient that autograd does not see."""
    draws_labels: bool = False
    """True to sample labels from the model; those given are the keys of the draws (`ops.categorical.token_keys`)."""

    def __call__(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        loss_mask: Tensor,
        *,
        group: dist.ProcessGroup | None,
        vocab_size: int,
    ) -> Tensor:
        # [S, B, H] -> [S * B, H]; labels and mask follow the same order.
        flat, labels, loss_mask = hidden.flatten(0, 1), labels.t().reshape(-1), loss_mask.t().reshape(-1)
        if self.sparse_loss_mask:
            targets = loss_mask.nonzero().squeeze(1)
            flat, labels, loss_mask = (part.index_select(0, targets) for part in (flat, labels, loss_mask))
        direct = self.into_main_grad and weight.device.type == "cpu" and weight.requires_grad
        return linear_cross_entropy(
            flat,
            weight,
            labels,
            loss_mask,
            vocab_size=vocab_size,
            group=group,
            draw=self.draws_labels,
            chunk=self.chunk,
            into=getattr(weight, "main_grad", None) if direct else None,
        )


@dataclass(frozen=True)
class TokenLogProbs:
    """Log-probability of each label in nats, [S, B]; 0 where `loss_mask` is 0."""

    def __call__(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        loss_mask: Tensor,
        *,
        group: dist.ProcessGroup | None,
        vocab_size: int,
    ) -> Tensor:
        flat, labels, loss_mask = hidden.flatten(0, 1), labels.t().reshape(-1), loss_mask.t().reshape(-1)
        chosen = linear_log_probs(flat, weight, labels, loss_mask, vocab_size=vocab_size, group=group)
        return chosen.view(hidden.shape[:2])
