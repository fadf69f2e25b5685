"""Output projection and cross entropy in one pass over chunks of tokens: the logits never exist as a whole.

At vocabulary 32000 the logits and their gradient are the largest tensors of a training step. Here a chunk of them
lives at a time; the gradient is formed in the forward pass, while the chunk is still in cache
(the idea of Hsu et al. 2024, "Liger Kernel", arXiv:2410.10989, section 3.2), with the vocabulary split over ranks.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from igla_mega.ops.accumulate import accumulate_
from igla_mega.ops.categorical import draw_labels
from igla_mega.ops.cross_entropy import softmax_gradient_, softmax_statistics

CHUNK_TOKENS = {"cpu": 256, "cuda": 4096}
"""Tokens whose logits are held at once. On CPU 256 x 32000 fp32 is 32 MB: about the last-level cache."""


def project(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden [..., H] times weight [V, H] transposed: [..., V]."""
    # For fp32 on CPU torch takes MKL, which is slow where rows or columns are few; oneDNN is not.
    if hidden.device.type == "cpu" and hidden.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(hidden, weight, None, "none", [], "")
    return hidden @ weight.t()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, loss_mask, vocab_size, group, draw, chunk, into):
        needs_grad = any(ctx.needs_input_grad[:2])
        num_ranks = 1 if group is None else group.size()
        vocab_start = 0 if group is None else group.rank() * weight.size(0)
        grad_hidden = torch.empty_like(hidden if needs_grad else hidden[:0])
        # Chunks add up in fp32, whatever the weights are.
        trains_weight = ctx.needs_input_grad[1]
        if into is not None and trains_weight:
            grad_weight = into
        else:
            grad_weight = torch.zeros_like(weight if trains_weight else weight[:0], dtype=torch.float32)
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)

        chunk = chunk or CHUNK_TOKENS[hidden.device.type]
        for rows in (slice(at, at + chunk) for at in range(0, len(hidden), chunk)):
            logits = project(hidden[rows], weight)
            targets = draw_labels(logits, labels[rows], vocab_start, vocab_size, group) if draw else labels[rows]
            row_max, sum_exp, target = softmax_statistics(logits, targets, vocab_start, vocab_size)
            if num_ranks > 1:
                local_max = row_max.clone()
                dist.all_reduce(row_max, op=dist.ReduceOp.MAX, group=group)
                sums = torch.stack([sum_exp * torch.exp(local_max - row_max), target])
                dist.all_reduce(sums, group=group)
                sum_exp, target = sums
            lse = row_max + sum_exp.log()
            losses[rows] = (lse - target) * loss_mask[rows]
            if needs_grad:
                softmax_gradient_(logits, lse, targets, loss_mask[rows], vocab_start, vocab_size)
                grad_hidden[rows] = project(logits, weight.t())
                if trains_weight and weight.dtype == torch.float32:
                    grad_weight.addmm_(logits.t(), hidden[rows])
                elif trains_weight:
                    accumulate_([grad_weight], [logits.t() @ hidden[rows]])
            del logits  # before the next chunk's are made
        if needs_grad:
            ctx.added = grad_weight is into
            ctx.save_for_backward(grad_hidden, grad_weight[:0] if ctx.added else grad_weight.to(weight.dtype))
        return losses.sum()

    @staticmethod
    def backward(ctx, grad_output):
        grad_hidden, grad_weight = ctx.saved_tensors
        # A host read is free on CPU, and spares a pass over the largest gradient of the model.
        if grad_output.device.type != "cpu" or grad_output.item() != 1.0:
            if ctx.added:
                raise RuntimeError(f"the loss is scaled by {grad_output.item():g}, and its gradient was added unscaled")
            grad_hidden, grad_weight = grad_hidden * grad_output, grad_weight * grad_output
        whole = ctx.needs_input_grad[1] and not ctx.added
        return grad_hidden, grad_weight if whole else None, None, None, None, None, None, None, None


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
    """Sum of the cross entropies of `hidden @ weight.T` against `labels`, weighted by `loss_mask`.

    Args:
        hidden: [N, H]; the same on every rank of `group`.
        weight: [V, H], this rank's rows of the output projection. Rows beyond `vocab_size` are padding: they take
            no part in the softmax and get no gradient.
        labels: [N] int64, ids in the whole vocabulary.
        loss_mask: [N] fp32 weight of each token's loss; 0 leaves it out.
        vocab_size: of the whole vocabulary, without padding.
        group: ranks that share the vocabulary; None when this rank holds all of it.
        draw: labels are drawn from the softmax itself, and `labels` are the keys of the draws (`token_keys`).
        chunk: tokens whose logits exist at once; unset, `CHUNK_TOKENS`.
        into: [V, H] fp32 (CPU), to which the gradient of `weight` is added at once, in the forward pass: autograd then
            sees none, and the backward pass must begin with a 1. It spares a tensor of that size.

    Returns:
        0-d fp32, nats. The gradient of `hidden` is this rank's share: sum it over `group`.
    """
    if not torch.is_grad_enabled():  # autograd.Function does not say so, and would make gradients for nobody
        hidden, weight = hidden.detach(), weight.detach()
    return _LinearCrossEntropy.apply(hidden, weight, labels, loss_mask, vocab_size, group, draw, chunk, into)
