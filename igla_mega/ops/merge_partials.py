"""Merge attention partials over disjoint keys.   B batch, H heads, S queries, D head size, G partials

A partial is the softmax-weighted sum of its values and the log-sum-exp of its scores. Merged,
`lse = log(sum_i(exp(lse_i)))` and `out = sum_i(exp(lse_i - lse) * out_i)` are those of attention over all keys.
Arithmetic is fp32 for every type of the partials (fp64 for fp64), and each partial is read once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from igla_mega.ops.checks import check_device, check_lengths, check_not_expanded, check_rows, check_shape, check_type


def _check(outs: Sequence[Tensor], lses: Sequence[Tensor], out: Tensor, lse: Tensor) -> None:
    """Raise RuntimeError for a type, shape, stride or device that the kernels cannot handle."""
    torch._check(len(outs) > 0, lambda: "merge_partials needs at least one partial")
    check_lengths(outs=outs, lses=lses)
    torch._check(out.dim() == 4, lambda: f"out must be [B, H, S, D], got {out.dim()} dimensions")
    check_type("lse", lse, torch.float32, torch.float64)
    wide = lse.dtype == torch.float64
    types = (torch.float64,) if wide else (torch.float32, torch.bfloat16, torch.float16)
    for name, tensor in [("out", out), *((f"outs[{i}]", partial) for i, partial in enumerate(outs))]:
        check_type(name, tensor, *types)
        check_shape(name, tensor, out.shape, "out")
        check_rows(name, tensor)
        check_device(name, tensor, out.device, "out")
    for name, tensor in [("lse", lse), *((f"lses[{i}]", scores) for i, scores in enumerate(lses))]:
        check_type(name, tensor, lse.dtype)
        check_shape(name, tensor, out.shape[:3], "the rows of out")
        check_device(name, tensor, out.device, "out")
    check_not_expanded("out", out)
    check_not_expanded("lse", lse)


def merge_partials_reference(
    outs: Sequence[Tensor], lses: Sequence[Tensor], out: Tensor, lse: Tensor, zero_means_empty: bool
) -> None:
    """Merge the partials with torch ops; `merge_partials` documents the arguments."""
    _check(outs, lses, out, lse)
    scores = torch.stack(list(lses))  # [G, B, H, S]
    empty = scores.isinf()
    if zero_means_empty:
        empty |= (scores == 0) & torch.stack([(partial == 0).all(-1) for partial in outs])
    scores = scores.masked_fill(empty, -torch.inf)
    highest = scores.amax(0)  # [B, H, S]
    # -inf - -inf is NaN: a row that is empty in every partial is shifted by 0, and its weights are correctly 0.
    shift = highest.masked_fill(highest == -torch.inf, 0.0)
    weights = (scores - shift).exp()
    total = weights.sum(0)
    weights = weights / total.masked_fill(total == 0, 1.0)
    merged = torch.zeros_like(out, dtype=lse.dtype)
    for partial, weight, hole in zip(outs, weights, empty, strict=True):
        # 0 * NaN is NaN: the content of an empty row is undefined and must not count.
        merged += weight.unsqueeze(-1) * partial.to(lse.dtype).masked_fill(hole.unsqueeze(-1), 0.0)
    out.copy_(merged)
    lse.copy_(shift + total.log())


def _merge_partials_fake(
    outs: Sequence[Tensor], lses: Sequence[Tensor], out: Tensor, lse: Tensor, zero_means_empty: bool
) -> None:
    _check(outs, lses, out, lse)


torch.library.define(
    "igla::merge_partials",
    "(Tensor[] outs, Tensor[] lses, Tensor(a!) out, Tensor(b!) lse, bool zero_means_empty) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl("igla::merge_partials", "CompositeExplicitAutograd", merge_partials_reference)
torch.library.register_fake("igla::merge_partials", _merge_partials_fake)


def merge_partials(
    outs: Sequence[Tensor],
    lses: Sequence[Tensor],
    *,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    zero_means_empty: bool = False,
) -> tuple[Tensor, Tensor]:
    """Merge attention partials over disjoint keys, as if one softmax had covered all of them.

    A row whose lse is -inf or +inf saw no key (flash-attention 3 writes the former, 2 the latter): its out is ignored.
    A row that is empty in every partial becomes out 0, lse -inf. NaN stays NaN.

    Args:
        outs: [B, H, S, D] each, fp32, bf16 or fp16 in any mixture, or all fp64; D at stride 1, other strides free.
        lses: [B, H, S] each, natural logarithm, fp32 (fp64 for fp64); strides free.
        out: destination, any of these types; `outs[i]` itself is allowed, any other overlap is not.
            None allocates a tensor of the type of `lses` in the layout of `outs[0]`.
        lse: destination of the merged lse; `lses[i]` itself is allowed. None allocates a tensor.
        zero_means_empty: True to also treat a row with lse 0 and an out of zeros as empty, as torch's flash attention
            marks it on CPU.

    Returns:
        `out` and `lse`.

    Raises:
        RuntimeError: no partial, or a wrong type, shape, stride or device.
    """
    torch._check(
        len(outs) > 0 and len(lses) > 0, lambda: "merge_partials needs at least one partial, and an lse for each"
    )
    if out is None:
        out = torch.empty_like(outs[0], dtype=lses[0].dtype)
    if lse is None:
        lse = torch.empty_like(lses[0])
    torch.ops.igla.merge_partials(outs, lses, out, lse, zero_means_empty)
    return out, lse
