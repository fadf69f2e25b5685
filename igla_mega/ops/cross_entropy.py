"""Compute vocabulary-parallel cross-entropy over a chunk of logits in two sweeps.   N tokens, V columns of this shard

Column `v` of a shard is the global token id `vocab_start + v`; ids from `vocab_limit` on are padding: they get no
probability and no gradient. Between the two calls a rank combines its statistics with those of its tensor-parallel
peers to the global `lse = log(sum(exp(logits)))`. Arithmetic is fp32 for every type of the logits.
"""

import torch
from torch import Tensor

_LOGIT_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def _check(logits: Tensor, labels: Tensor, **row_vectors: Tensor) -> None:
    """Raise RuntimeError for a type, shape or layout that the kernels cannot handle."""
    torch._check(logits.dim() == 2, lambda: f"logits must be [tokens, columns], got {logits.dim()} dimensions")
    torch._check(
        logits.dtype in _LOGIT_TYPES, lambda: f"logits must be float32, bfloat16 or float16, got {logits.dtype}"
    )
    torch._check(logits.is_contiguous(), lambda: "logits must be contiguous; call .contiguous() first")
    _check_rows("labels", labels, torch.int64, logits.shape[0])
    for name, vector in row_vectors.items():
        _check_rows(name, vector, torch.float32, logits.shape[0])


def _check_rows(name: str, vector: Tensor, dtype: torch.dtype, num_rows: int) -> None:
    """Check a vector with one entry per row of logits."""
    torch._check(
        vector.dtype == dtype, lambda: f"{name} must be {str(dtype).removeprefix('torch.')}, got {vector.dtype}"
    )
    torch._check(vector.is_contiguous(), lambda: f"{name} must be contiguous; call .contiguous() first")
    torch._check(
        vector.dim() == 1 and vector.shape[0] == num_rows,
        lambda: f"{name} must have one entry for each of the {num_rows} rows of logits",
    )


def _real_columns(logits: Tensor, vocab_start: int, vocab_limit: int) -> int:
    """Return the number of columns that are not padding."""
    return max(0, min(logits.shape[1], vocab_limit - vocab_start))


def softmax_statistics_reference(
    logits: Tensor, labels: Tensor, vocab_start: int, vocab_limit: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Reduce with torch ops; `softmax_statistics` documents the arguments."""
    _check(logits, labels)
    num_rows, columns = logits.shape[0], _real_columns(logits, vocab_start, vocab_limit)
    if columns == 0:
        zeros = logits.new_zeros(num_rows, dtype=torch.float32)
        return torch.full_like(zeros, -torch.inf), zeros, zeros.clone()

    values = logits[:, :columns].float()
    row_max = values.amax(dim=1)
    # A row of only -inf has no finite maximum, and -inf - -inf is NaN; shifted by 0 its sum is correctly 0.
    shift = row_max.masked_fill(row_max == -torch.inf, 0.0).unsqueeze(1)
    sum_exp = (values - shift).exp_().sum(dim=1)

    local = labels - vocab_start
    is_local = (local >= 0) & (local < columns)
    target = values.gather(1, local.clamp(0, columns - 1).unsqueeze(1)).squeeze(1)
    # Exactly one rank of the vocabulary holds the label: zeros elsewhere make the sum over ranks its logit.
    return row_max, sum_exp, target.masked_fill(~is_local, 0.0)


def softmax_gradient_reference_(
    logits: Tensor, lse: Tensor, labels: Tensor, weight: Tensor, vocab_start: int, vocab_limit: int
) -> None:
    """Compute the gradient with torch ops; `softmax_gradient_` documents the arguments."""
    _check(logits, labels, lse=lse, weight=weight)
    columns = _real_columns(logits, vocab_start, vocab_limit)
    logits[:, columns:] = 0
    if columns == 0:
        return

    gradient = (logits[:, :columns].float() - lse.unsqueeze(1)).exp_()
    local = labels - vocab_start
    rows = torch.nonzero((local >= 0) & (local < columns)).squeeze(1)
    gradient[rows, local[rows]] -= 1.0
    gradient *= weight.unsqueeze(1)
    # 0 * NaN is NaN: a masked row is written as zeros even if its logits or lse are not finite.
    logits[:, :columns] = gradient.masked_fill_((weight == 0).unsqueeze(1), 0.0).to(logits.dtype)


def _softmax_statistics_fake(
    logits: Tensor, labels: Tensor, vocab_start: int, vocab_limit: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return three empty vectors [N], for tracing without data."""
    row = logits.new_empty(logits.shape[0], dtype=torch.float32)
    return row, torch.empty_like(row), torch.empty_like(row)


def _softmax_gradient_fake_(
    logits: Tensor, lse: Tensor, labels: Tensor, weight: Tensor, vocab_start: int, vocab_limit: int
) -> None:
    return None


torch.library.define(
    "igla::softmax_statistics",
    "(Tensor logits, Tensor labels, int vocab_start, int vocab_limit)"
    " -> (Tensor row_max, Tensor sum_exp, Tensor target_logit)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "igla::softmax_gradient_",
    "(Tensor(a!) logits, Tensor lse, Tensor labels, Tensor weight, int vocab_start, int vocab_limit) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl("igla::softmax_statistics", "CompositeExplicitAutograd", softmax_statistics_reference)
torch.library.impl("igla::softmax_gradient_", "CompositeExplicitAutograd", softmax_gradient_reference_)
torch.library.register_fake("igla::softmax_statistics", _softmax_statistics_fake)
torch.library.register_fake("igla::softmax_gradient_", _softmax_gradient_fake_)


def softmax_statistics(
    logits: Tensor, labels: Tensor, vocab_start: int, vocab_limit: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What one shard adds to the log-sum-exp of each row, and the label's logit where this shard holds it.

    Args:
        logits: [N, V] fp32, bf16 or fp16, contiguous.
        labels: [N] int64 global ids; -100 or any id outside this shard matches no column.
        vocab_start: global id of column 0.
        vocab_limit: first global id that is padding.

    Returns:
        row_max [N] fp32: largest real logit (-inf when every column is padding); sum_exp [N] fp32:
        `sum(exp(logits - row_max))` (0 when every column is padding, NaN when a real logit is);
        target_logit [N] fp32: the label's logit, or 0 where another shard or none holds it.

    Raises:
        RuntimeError: a wrong type or shape, or a tensor that is not contiguous.
    """
    return torch.ops.igla.softmax_statistics(logits, labels, vocab_start, vocab_limit)


def softmax_gradient_(
    logits: Tensor, lse: Tensor, labels: Tensor, weight: Tensor, vocab_start: int, vocab_limit: int
) -> None:
    """Overwrite `logits` with `weight * (exp(logits - lse) - [column is the label])`, and with 0 in padding columns.

    Args:
        logits: [N, V] fp32, bf16 or fp16, contiguous; the gradient has its type.
        lse: [N] fp32, over the whole vocabulary: never below a logit of its row.
        labels: [N] int64 global ids, as for `softmax_statistics`.
        weight: [N] fp32, d loss / d (nats of this token); a row of weight 0 becomes 0 even when its lse is not finite.
        vocab_start: global id of column 0.
        vocab_limit: first global id that is padding.

    Raises:
        RuntimeError: a wrong type or shape, or a tensor that is not contiguous.
    """
    torch.ops.igla.softmax_gradient_(logits, lse, labels, weight, vocab_start, vocab_limit)
