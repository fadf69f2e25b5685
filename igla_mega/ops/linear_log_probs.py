"""Compute the log-probability of each label over chunks of tokens, without ever holding all logits.

`linear_cross_entropy` returns one sum, so it can compute the gradient in the forward pass. Here every token has its
own value, whose gradient is known only in the backward pass, which computes the logits of each chunk again. Tokens that
the mask excludes are not projected at all.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from igla_mega.ops.cross_entropy import softmax_gradient_, softmax_statistics
from igla_mega.ops.linear_cross_entropy import CHUNK_TOKENS, project


class _LinearLogProbs(torch.autograd.Function):
    """Log-probabilities of selected tokens; saves one log-sum-exp per token instead of its logits."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, tokens, vocab_size, group):
        """Return log-probabilities [N] fp32, 0 for tokens not in `tokens`."""
        vocab_start = 0 if group is None else group.rank() * weight.size(0)
        log_probs = torch.zeros(len(hidden), dtype=torch.float32, device=hidden.device)
        lses = torch.empty(len(tokens), dtype=torch.float32, device=hidden.device)
        for rows, chunk in _chunks(tokens):
            logits = project(hidden[chunk], weight)  # [chunk, V]
            row_max, sum_exp, target = softmax_statistics(logits, labels[chunk], vocab_start, vocab_size)
            # Log-sum-exp over the whole vocabulary: rescale each rank's sum to the common maximum before adding.
            if group is not None:
                local_max = row_max.clone()
                dist.all_reduce(row_max, op=dist.ReduceOp.MAX, group=group)
                sums = torch.stack([sum_exp * torch.exp(local_max - row_max), target])
                dist.all_reduce(sums, group=group)
                sum_exp, target = sums
            lses[rows] = row_max + sum_exp.log()
            log_probs[chunk] = target - lses[rows]
        ctx.save_for_backward(hidden, weight, labels, tokens, lses)
        ctx.vocab_start, ctx.vocab_size = vocab_start, vocab_size
        return log_probs

    @staticmethod
    def backward(ctx, grad):
        """Compute each chunk's logits again and multiply their gradient into both factors."""
        hidden, weight, labels, tokens, lses = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden)
        needs_weight = ctx.needs_input_grad[1]
        # Summed over chunks in fp32 for every type of the weight.
        grad_weight = torch.zeros_like(weight if needs_weight else weight[:0], dtype=torch.float32)
        for rows, chunk in _chunks(tokens):
            logits = project(hidden[chunk], weight)
            # `softmax_gradient_` computes the gradient of -log p: the upstream gradient is negated.
            softmax_gradient_(logits, lses[rows], labels[chunk], -grad[chunk], ctx.vocab_start, ctx.vocab_size)
            grad_hidden[chunk] = logits @ weight
            if needs_weight and weight.dtype == torch.float32:
                grad_weight.addmm_(logits.t(), hidden[chunk])
            elif needs_weight:
                grad_weight += logits.t() @ hidden[chunk]
        return grad_hidden, grad_weight.to(weight.dtype) if needs_weight else None, None, None, None, None


def _chunks(tokens: Tensor):
    """Yield slices into `tokens` and the token indices they hold, one chunk of logits at a time."""
    size = CHUNK_TOKENS[tokens.device.type]
    for start in range(0, len(tokens), size):
        rows = slice(start, start + size)
        yield rows, tokens[rows]


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_mask: Tensor,
    *,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Return the log-probability of each label under `hidden @ weight.T`, times its mask.

    Args:
        hidden: [N, H]; the same on every rank of `group`.
        weight: [V, H], this rank's rows of the output projection. Rows beyond `vocab_size` are padding.
        labels: [N] int64, ids in the whole vocabulary.
        loss_mask: [N] fp32; where it is 0 the result is 0 and no logits are computed.
        vocab_size: size of the whole vocabulary, without padding.
        group: ranks that share the vocabulary; None if this rank holds all of it.

    Returns:
        [N] fp32, nats. The gradient of `hidden` is this rank's share: sum it over `group`.
    """
    tokens = loss_mask.nonzero().squeeze(1)
    return _LinearLogProbs.apply(hidden, weight, labels, tokens, vocab_size, group) * loss_mask
