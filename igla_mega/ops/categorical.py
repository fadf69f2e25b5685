"""Draw one label per token from the softmax of a chunk of logits.   N tokens, V columns of this shard

Uses the Gumbel-max trick (Gumbel 1954; Maddison et al. 2014, arXiv:1411.0030) with noise that is a function of the
token's key and the label's id. Every rank that holds a column computes the same noise for it, so every layout draws the
same labels. A draw changes only where rounding swaps the two highest scores, about once in 1 / (error of a logit)
tokens.
"""

import hashlib

import torch
import torch.distributed as dist
from torch import Tensor


def _signed(value: int) -> int:
    """Return the int64 with the bits of an unsigned 64-bit value: torch has no arithmetic on uint64."""
    return value - (1 << 64) if value >= 1 << 63 else value


# Golden ratio (a Weyl sequence over ids) and the multipliers of splitmix64 (Steele et al. 2014).
_STEP, _FIRST, _SECOND = (_signed(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def token_keys(seed: int, sample: int, positions: Tensor) -> Tensor:
    """Return the keys of one sample's tokens.

    Args:
        seed: seed of the pass over the data.
        sample: index of the sample in the pass, counted over all ranks.
        positions: int64, position of each token in the whole sample, independent of the rank that holds it.

    Returns:
        int64, in the shape of `positions`.
    """
    digest = hashlib.blake2b(f"{seed}/{sample}".encode(), digest_size=8).digest()
    return _mix_(positions * _STEP + int.from_bytes(digest, "little", signed=True))


def uniform_int16(keys: Tensor, width: int) -> Tensor:
    """Return numbers that are uniform over all of int16, [N, width]: a function of the key and the column.

    Args:
        keys: [N] int64.
    """
    # 16 bits each: the upper half of a mixed value makes two.
    columns = torch.arange(-(-width // 2), device=keys.device)
    bits = _mix_(keys.unsqueeze(1) + columns * _STEP)
    return bits.view(torch.int16).unflatten(1, (-1, 4))[:, :, 2:].flatten(1)[:, :width]


def draw_labels(
    logits: Tensor, keys: Tensor, vocab_start: int, vocab_limit: int, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Draw a label from the softmax of each row.

    Args:
        logits: [N, V] fp32, bf16 or fp16.
        keys: [N] int64, from `token_keys`; the same on every rank of `group`.
        vocab_start: global id of column 0.
        vocab_limit: first global id that is padding and is never drawn.
        group: ranks that share the vocabulary; None when this rank holds all of it.

    Returns:
        [N] int64 global ids, the same on every rank of `group`.
    """
    columns = max(0, min(logits.size(1), vocab_limit - vocab_start))
    if columns:
        scores = _gumbel(keys, vocab_start, columns).add_(logits[:, :columns])
        best, labels = scores.max(dim=1)
        labels += vocab_start
    else:
        best = logits.new_full((len(logits),), -torch.inf, dtype=torch.float32)
        labels = torch.full_like(keys, vocab_limit)
    # The rank with the highest score wins; ranks without it report an id above every label. Ties go to the lowest id.
    if group is not None and group.size() > 1:
        highest = best.clone()
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
        labels.masked_fill_(best < highest, vocab_limit)
        dist.all_reduce(labels, op=dist.ReduceOp.MIN, group=group)
    return labels


def _gumbel(keys: Tensor, first_id: int, num_ids: int) -> Tensor:
    """Return standard Gumbel noise of each (key, id), [N, num_ids] fp32."""
    ids = torch.arange(first_id, first_id + num_ids, device=keys.device)
    bits = _mix_(keys.unsqueeze(1) + ids * _STEP)  # [N, num_ids]
    high = bits.view(torch.int32)[:, 1::2]
    # Uniform in (0, 1], with the full precision of fp32 near 0: those values map to the largest noise, which decides.
    uniform = high.float().abs_().add_(0.5).mul_(2.0**-31)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def _mix_(values: Tensor) -> Tensor:
    """Mix the bits of int64 values in place, after which the upper half of each is uniform noise."""
    halves = values.view(torch.int32)
    low, high = halves[..., 0::2], halves[..., 1::2]
    for multiplier in (_FIRST, _SECOND):
        low ^= high
        values *= multiplier
    return values
