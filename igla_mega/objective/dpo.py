"""Implement direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290) as a megatron-core forward step.

A micro-batch of B pairs has 2B rows: each chosen answer is followed by its rejected one. The batch contains the
log-probabilities of the reference model. They are computed before the step without gradients (by the model with its
adapters off, or by a frozen second model), or once for the whole data set; all three cases share this code.
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

TIE_NATS, TIE_RELATIVE = 1e-6, 1e-6
"""Two rewards are equal if their log-ratios differ by at most `TIE_NATS` nats plus `TIE_RELATIVE` of the pair's
log-probabilities, which are sums of fp32 numbers."""
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
"""Logged metrics, means over pairs.

Rewards and margin are beta times nats. Accuracy is the fraction of pairs whose chosen answer has the higher reward; a
tie counts half. KL is the model's log-probability of an answer minus the reference's, in nats, averaged over both
answers; it estimates the divergence on the answers of the data, not on answers of the model. Preferred is the fraction
of pairs whose chosen answer has the higher log-probability under the model, regardless of the reference."""


def forward_step(batches: Iterator[MicroBatch], model: nn.Module, *, dpo: Dpo, context: Axis) -> tuple[Tensor, partial]:
    """Run one micro-batch of pairs through this rank's chunk (whose output is `TokenLogProbs`).

    Args:
        batches: iterator of micro-batches; one is drawn.
        model: this rank's chunk.
        dpo: the recipe's `dpo` section.
        context: ranks that hold parts of the same sequences.

    Returns:
        The chunk's output, and the function that megatron-core calls with it on the last stage: (summed loss, number
        of pairs, report). The report is fp64: summed loss, number of pairs, sums of `METRICS`. A pair without targets
        counts nothing.
    """
    batch = next(batches)
    return language.run(batch, model), partial(_loss, batch, dpo, context)


def reference_step(batches: Iterator[MicroBatch], model: nn.Module, *, context: Axis) -> tuple[Tensor, partial]:
    """Run one micro-batch for its log-probabilities only, which are the report, fp32 [2B]."""
    return language.run(next(batches), model), partial(_reference, context)


def with_reference(batches: Iterable[MicroBatch], reports: Sequence[Tensor]) -> Iterator[MicroBatch]:
    """Yield the micro-batches of a step with the reports of `reference_step` added.

    Only the last pipeline stage has reports; on other stages the batches are passed through.
    """
    for index, batch in enumerate(batches):
        yield batch._replace(reference=reports[index]) if reports else batch


def answer_log_probs(log_probs: Tensor, context: Axis) -> Tensor:
    """Return the log-probability of each row's answer, fp64 [2B], given those of this rank's tokens [S, 2B].

    The sum is taken over the context ranks with an identity backward pass: every rank computes the same loss from the
    same sum, so each already has the complete gradient of its own tokens.
    """
    # fp64: the loss depends on small differences of sums of thousands of log-probabilities.
    sums = log_probs.double().sum(0)
    return reduce_from_tensor_model_parallel_region(sums, group=context.group) if context.size > 1 else sums


def _reference(context: Axis, log_probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a placeholder loss, zero targets and the log-probabilities of the answers, fp32 [2B]."""
    sums = answer_log_probs(log_probs, context)
    return sums.sum(), torch.zeros((), dtype=torch.int, device=sums.device), sums.float()


def _loss(batch: MicroBatch, dpo: Dpo, context: Axis, log_probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the summed loss, the number of pairs and the report, given log-probabilities of tokens [S, 2B]."""
    sums = answer_log_probs(log_probs, context)
    if dpo.reference_free:
        reference = torch.zeros_like(sums)
    else:
        assert batch.reference is not None, "the reference pass or the data set provides it"
        reference = batch.reference.double()
    lengths = batch.loss_mask.double().sum(1)
    if context.size > 1:
        lengths = reduce_from_tensor_model_parallel_region(lengths, group=context.group)
    losses, metrics = pair_losses(sums, reference, lengths, dpo)
    # Pairs without targets fill up the last batch of a validation; their loss is that of equal answers, not 0.
    real = lengths.view(-1, 2).sum(1) > 0
    losses, metrics = losses * real, metrics * real
    num_pairs = real.sum(dtype=torch.int)
    report = torch.cat([torch.stack([losses.detach().sum(), num_pairs.double()]), metrics.sum(1)])
    if context.rank > 0:
        # Context ranks process the same pairs, so only one of them counts the pairs. The loss itself stays on every
        # rank: gradients are summed over context ranks, and each rank contributes those of its own tokens.
        num_pairs, report = torch.zeros_like(num_pairs), torch.zeros_like(report)
    return losses.sum().float(), num_pairs, report


def pair_losses(log_probs: Tensor, reference: Tensor, lengths: Tensor, dpo: Dpo) -> tuple[Tensor, Tensor]:
    """Return the loss and the metrics of each pair.

    `label_smoothing` e is the probability that a preference is labeled the wrong way round (Mitchell 2023, "A note on
    DPO with noisy preferences"): the loss f(m) becomes (1 - e) f(m) + e f(-m). IPO (Azar et al. 2023,
    arXiv:2310.12036, eq. 17) uses log-ratios per token, as TRL does.

    Args:
        log_probs, reference: [2B] nats, chosen and rejected alternating.
        lengths: [2B] tokens of each answer.
        dpo: the recipe's `dpo` section.

    Returns:
        [B] losses; [len(METRICS), B] metrics without gradient.
    """
    ratios = (log_probs - reference).view(-1, 2)  # [B, 2]: chosen, rejected
    logits = dpo.beta * (ratios[:, 0] - ratios[:, 1])  # [B]
    if dpo.loss_type == "sigmoid":
        losses = _smoothed(lambda m: -F.logsigmoid(m), logits, dpo.label_smoothing)
    elif dpo.loss_type == "hinge":
        losses = _smoothed(lambda m: torch.relu(1 - m), logits, dpo.label_smoothing)
    else:
        means = ratios / lengths.view(-1, 2).clamp(min=1)
        losses = _smoothed(lambda m: (m - 1 / (2 * dpo.beta)) ** 2, means[:, 0] - means[:, 1], dpo.label_smoothing)
    with torch.no_grad():
        chosen, rejected = dpo.beta * ratios.t()
        # At step 0 the policy is its reference: the sign of their difference is rounding, which layouts differ in.
        difference = ratios[:, 0] - ratios[:, 1]
        tied = difference.abs() <= TIE_NATS + TIE_RELATIVE * log_probs.abs().view(-1, 2).sum(1)
        accuracy = torch.where(tied, 0.5, (difference > 0).double())
        policy = log_probs.view(-1, 2)
        metrics = [chosen, rejected, chosen - rejected, accuracy, ratios.mean(1), policy[:, 0], policy[:, 1]]
        metrics.append((policy[:, 0] > policy[:, 1]).double())
    return losses, torch.stack(metrics)


def _smoothed(loss, margin: Tensor, smoothing: float) -> Tensor:
    """Return (1 - e) loss(m) + e loss(-m); without smoothing loss(m), bit for bit."""
    if smoothing == 0.0:
        return loss(margin)
    return (1 - smoothing) * loss(margin) + smoothing * loss(-margin)
