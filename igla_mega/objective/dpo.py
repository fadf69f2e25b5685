"""Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290) as a megatron-core forward step.

A micro-batch of B pairs is 2B rows, each chosen answer before its rejected one. The reference's log-probabilities come
in the batch: they are made before the step by a pass that keeps nothing for a backward one (the model with its adapters
off, or a frozen second model), or once for the whole data set. All three go through the same code.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import torch
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from torch import Tensor, nn
from torch.nn import functional as F

from igla_mega.config.features import Dpo
from igla_mega.data.micro_batch import MicroBatch
from igla_mega.distributed.mesh import Axis
from igla_mega.objective import language

METRICS = (
    "dpo_reward_chosen",
    "dpo_reward_rejected",
    "dpo_margin",
    "dpo_accuracy",
    "dpo_kl",
    "dpo_log_prob_chosen",
    "dpo_log_prob_rejected",
    "dpo_preferred",
)
"""Means over pairs. Rewards and margin: beta times nats. Accuracy: share of pairs whose chosen answer has the higher
reward. KL: nats by which the model's log-probability of an answer exceeds the reference's, mean of both answers; an
estimate of the divergence on the data's answers, not on the model's own. Preferred: share of pairs whose chosen answer
the model finds the likelier one, reference or not."""


def forward_step(batches: Iterator[MicroBatch], model: nn.Module, *, dpo: Dpo, context: Axis) -> tuple[Tensor, partial]:
    """Run one micro-batch of pairs through this rank's chunk (whose output is `TokenLogProbs`).

    Args:
        context: ranks that hold parts of the same sequences.

    Returns:
        What the chunk gives, and the function that megatron-core calls on it on the last stage: (summed loss, number
        of pairs, report). The report, fp64: summed loss, number of pairs, sums of `METRICS`.
    """
    batch = next(batches)
    return language.run(batch, model), partial(_loss, batch, dpo, context)


def reference_step(batches: Iterator[MicroBatch], model: nn.Module, *, context: Axis) -> tuple[Tensor, partial]:
    """Run one micro-batch for its log-probabilities alone; the report is these, fp32 [2B]."""
    return language.run(next(batches), model), partial(_reference, context)


def with_reference(batches: Iterable[MicroBatch], reports: Sequence[Tensor]) -> Iterator[MicroBatch]:
    """Join the micro-batches of a step with what `reference_step` reported of them (nothing, but on the last stage)."""
    for index, batch in enumerate(batches):
        yield batch._replace(reference=reports[index]) if reports else batch


def answer_log_probs(log_probs: Tensor, context: Axis) -> Tensor:
    """Log-probability of each row's answer, fp64 [2B], from those of this rank's tokens [S, 2B].

    Its gradient stays with the rank that holds the token: every rank computes the same loss of the same sum.
    """
    sums = log_probs.double().sum(0)
    return reduce_from_tensor_model_parallel_region(sums, group=context.group) if context.size > 1 else sums


def _reference(context: Axis, log_probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    sums = answer_log_probs(log_probs, context)
    return sums.sum(), torch.zeros((), dtype=torch.int, device=sums.device), sums.float()


def _loss(batch: MicroBatch, dpo: Dpo, context: Axis, log_probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    sums = answer_log_probs(log_probs, context)
    if dpo.reference_free:
        reference = torch.zeros_like(sums)
    else:
        assert batch.reference is not None, "the reference pass or the data set supplies it"
        reference = batch.reference.double()
    lengths = batch.loss_mask.double().sum(1)
    if context.size > 1:
        lengths = reduce_from_tensor_model_parallel_region(lengths, group=context.group)
    losses, metrics = pair_losses(sums, reference, lengths, dpo)
    num_pairs = torch.full((), len(losses), dtype=torch.int, device=losses.device)
    report = torch.cat([torch.stack([losses.detach().sum(), num_pairs.double()]), metrics.sum(1)])
    if context.rank > 0:
        # Context ranks share pairs: one of them counts. Gradients are summed over them, each rank having its tokens'.
        num_pairs, report = torch.zeros_like(num_pairs), torch.zeros_like(report)
    return losses.sum().float(), num_pairs, report


def pair_losses(log_probs: Tensor, reference: Tensor, lengths: Tensor, dpo: Dpo) -> tuple[Tensor, Tensor]:
    """Loss of each pair, and what is logged of it.

    With `label_smoothing` e a preference is taken to be the wrong way round with probability e (Mitchell 2023, "A note
    on DPO with noisy preferences"): sigmoid and hinge become (1 - e) f(m) + e f(-m). IPO (Azar et al. 2023,
    arXiv:2310.12036, eq. 17) takes log-ratios per token, as TRL does.

    Args:
        log_probs, reference: [2B] nats, chosen and rejected in turn.
        lengths: [2B] tokens of each answer.

    Returns:
        [B] losses; [len(METRICS), B] without gradient.
    """
    ratios = (log_probs - reference).view(-1, 2)
    logits = dpo.beta * (ratios[:, 0] - ratios[:, 1])
    if dpo.loss_type == "sigmoid":
        losses = _smoothed(lambda m: -F.logsigmoid(m), logits, dpo.label_smoothing)
    elif dpo.loss_type == "hinge":
        losses = _smoothed(lambda m: torch.relu(1 - m), logits, dpo.label_smoothing)
    else:
        means = ratios / lengths.view(-1, 2).clamp(min=1)
        losses = _smoothed(lambda m: (m - 1 / (2 * dpo.beta)) ** 2, means[:, 0] - means[:, 1], dpo.label_smoothing)
    with torch.no_grad():
        chosen, rejected = dpo.beta * ratios.t()
        accuracy = (chosen > rejected).double()
        policy = log_probs.view(-1, 2)
        metrics = [chosen, rejected, chosen - rejected, accuracy, ratios.mean(1), policy[:, 0], policy[:, 1]]
        metrics.append((policy[:, 0] > policy[:, 1]).double())
    return losses, torch.stack(metrics)


def _smoothed(loss, margin: Tensor, smoothing: float) -> Tensor:
    if smoothing == 0.0:
        return loss(margin)
    return (1 - smoothing) * loss(margin) + smoothing * loss(-margin)
