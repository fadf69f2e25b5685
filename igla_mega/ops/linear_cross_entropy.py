"""Compute output projection and cross-entropy over chunks of tokens, without ever holding all logits.

At vocabulary 32000 the logits and their gradient are the largest tensors of a training step. Here only one chunk of
them is in memory at a time, and the gradient is computed in the forward pass, while the chunk is still in cache
(the idea of Hsu et al. 2024, "Liger Kernel", arXiv:2410.10989, section 3.2), with the vocabulary split over ranks.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from igla_mega.ops.accumulate import accumulate_
from igla_mega.ops.categorical import draw_labels
from igla_mega.ops.cross_entropy import softmax_gradient_, softmax_statistics

CHUNK_TOKENS = {"cpu": 256, "cuda": 4096}
"""Tokens per chunk of logits, by device type. On CPU 256 x 32000 fp32 is 32 MB: about the last-level cache."""


def project(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return hidden [..., H] times weight [V, H] transposed, [..., V]."""
    # For fp32 on CPU torch calls MKL, which is slow for matrices with few rows or columns; oneDNN is not.
    if hidden.device.type == "cpu" and hidden.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(hidden, weight, None, "none", [], "")
    return hidden @ weight.t()


class _LinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy whose forward pass computes both gradients; the backward pass only scales them."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, loss_mask, vocab_size, group, draw, chunk, into):
        """Return the summed loss, and save both gradients for a loss gradient of 1."""
        needs_grad = any(ctx.needs_input_grad[:2])
        num_ranks = 1 if group is None else group.size()
        vocab_start = 0 if group is None else group.rank() * weight.size(0)
        grad_hidden = torch.empty_like(hidden if needs_grad else hidden[:0])
        # Summed over chunks in fp32 for every type of the weight.
        trains_weight = ctx.needs_input_grad[1]
        if into is not None and trains_weight:
            grad_weight = into
        else:
            grad_weight = torch.zeros_like(weight if trains_weight else weight[:0], dtype=torch.float32)
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)

        chunk = chunk or CHUNK_TOKENS[hidden.device.type]
        for rows in (slice(at, at + chunk) for at in range(0, len(hidden), chunk)):
            logits = project(hidden[rows], weight)  # [chunk, V]
            targets = draw_labels(logits, labels[rows], vocab_start, vocab_size, group) if draw else labels[rows]
            row_max, sum_exp, target = softmax_statistics(logits, targets, vocab_start, vocab_size)
            # Log-sum-exp over the whole vocabulary: rescale each rank's sum to the common maximum before adding.
            if num_ranks > 1:
                local_max = row_max.clone()
                dist.all_reduce(row_max, op=dist.ReduceOp.MAX, group=group)
                sums = torch.stack([sum_exp * torch.exp(local_max - row_max), target])
                dist.all_reduce(sums, group=group)
                sum_exp, target = sums
            lse = row_max + sum_exp.log()
            losses[rows] = (lse - target) * loss_mask[rows]
            # The gradient overwrites the logits: the chunk's memory is used twice.
            if needs_grad:
                softmax_gradient_(logits, lse, targets, loss_mask[rows], vocab_start, vocab_size)
                grad_hidden[rows] = project(logits, weight.t())
                if trains_weight and weight.dtype == torch.float32:
                    grad_weight.addmm_(logits.t(), hidden[rows])
                elif trains_weight:
                    accumulate_([grad_weight], [logits.t() @ hidden[rows]])
            del logits  # frees the chunk before the next one is allocated
        if needs_grad:
            ctx.added = grad_weight is into
            ctx.save_for_backward(grad_hidden, grad_weight[:0] if ctx.added else grad_weight.to(weight.dtype))
        return losses.sum()

    @staticmethod
    def backward(ctx, grad_output):
        """Return the saved gradients times that of the loss."""
        grad_hidden, grad_weight = ctx.saved_tensors
        # Reading the value is free on CPU and saves a pass over the largest gradient of the model; on CUDA it would
        # wait for the device.
        if grad_output.device.type != "cpu" or grad_output.item() != 1.0:
            if ctx.added:
                raise RuntimeError(f"the loss is scaled by {grad_output.item():g}, but its gradient was added unscaled")
            grad_hidden, grad_weight = grad_hidden * grad_output, grad_weight * grad_output
        returns_weight = ctx.needs_input_grad[1] and not ctx.added
        return grad_hidden, grad_weight if returns_weight else None, None, None, None, None, None, None, None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_mask: Tensor,
    *,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    draw: bool = False,
    chunk: int | None = None,
    into: Tensor | None = None,
) -> Tensor:
    """Return the summed cross-entropy of `hidden @ weight.T` against `labels`, weighted by `loss_mask`.

    Args:
        hidden: [N, H]; the same on every rank of `group`.
        weight: [V, H], this rank's rows of the output projection. Rows beyond `vocab_size` are padding: they are
            excluded from the softmax and get no gradient.
        labels: [N] int64, ids in the whole vocabulary.
        loss_mask: [N] fp32 weight of each token's loss; 0 excludes the token.
        vocab_size: size of the whole vocabulary, without padding.
        group: ranks that share the vocabulary; None if this rank holds all of it.
        draw: True to draw the labels from the softmax itself; `labels` are then the keys of the draws (`token_keys`).
        chunk: tokens per chunk of logits; `CHUNK_TOKENS` by default.
        into: [V, H] fp32 on CPU, to which the gradient of `weight` is added in the forward pass. Autograd then returns
            none for `weight`, and the loss must not be scaled. Saves a tensor of that size.

    Returns:
        0-d fp32, nats. The gradient of `hidden` is this rank's share: sum it over `group`.
    """
    # Inside autograd.Function `needs_input_grad` ignores no_grad, so gradients would be computed and discarded.
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()
    return _LinearCrossEntropy.apply(hidden, weight, labels, loss_mask, vocab_size, group, draw, chunk, into)
