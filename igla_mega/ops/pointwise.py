"""Fused pointwise ops of a Llama layer: RMSNorm, SwiGLU, rotary positions.   N rows, H width, F half of the width

Each op saves only its input for the backward pass and reads it once; eager torch makes about ten passes and saves three
times as much. On CPU the kernels of `csrc/` run; on CUDA torch.compile turns each reference into one kernel.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

_TYPES = (torch.float32, torch.bfloat16)


def rms_norm_reference(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Normalize x [N, H]; return the output and the scale [N] fp32 that the gradient reuses."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1) + epsilon)
    return (wide * scale.unsqueeze(-1) * weight.float()).to(x.dtype), scale


def rms_norm_gradient_reference(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of x [N, H] and weight [H]."""
    upstream, wide, scale = grad.float(), x.float(), scale.unsqueeze(-1)
    weighted = upstream * weight.float()
    # d scale / d x = -scale^3 * x / H: the path of the gradient through the norm itself.
    back = scale.pow(3) * (weighted * wide).mean(-1, keepdim=True)  # [N, 1]
    grad_weight = (upstream * wide * scale).sum(0)
    return (weighted * scale - wide * back).to(x.dtype), grad_weight.to(weight.dtype)


def swiglu_reference(x: Tensor) -> Tensor:
    """Return `silu(gate) * up` [N, F] of x [N, 2F]."""
    gate, up = x.float().chunk(2, -1)
    return (F.silu(gate) * up).to(x.dtype)


def swiglu_gradient_reference(grad: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of x [N, 2F] from that of the output [N, F]."""
    upstream, (gate, up) = grad.float(), x.float().chunk(2, -1)
    sigmoid = torch.sigmoid(gate)
    to_gate = upstream * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat((to_gate, upstream * gate * sigmoid), -1).to(x.dtype)


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (i, i + D/2) of x [..., D] by its angle."""
    first, second = x.float().chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def _rms_norm_gradient_fake(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


_OPS: dict[str, tuple[str, Callable, Callable]] = {
    "rms_norm": (
        "(Tensor x, Tensor weight, float epsilon) -> (Tensor out, Tensor scale)",
        rms_norm_reference,
        lambda x, weight, epsilon: (torch.empty_like(x), x.new_empty(x.size(0), dtype=torch.float32)),
    ),
    "rms_norm_gradient": (
        "(Tensor grad, Tensor x, Tensor weight, Tensor scale) -> (Tensor grad_x, Tensor grad_weight)",
        rms_norm_gradient_reference,
        _rms_norm_gradient_fake,
    ),
    "swiglu": ("(Tensor x) -> Tensor", swiglu_reference, lambda x: x.new_empty(x.size(0), x.size(1) // 2)),
    "swiglu_gradient": (
        "(Tensor grad, Tensor x) -> Tensor",
        swiglu_gradient_reference,
        lambda grad, x: torch.empty_like(x),
    ),
    "rotate": (
        "(Tensor x, Tensor cos, Tensor sin) -> Tensor",
        rotate_reference,
        lambda x, cos, sin: x.new_empty(x.shape),
    ),
}
for _name, (_schema, _reference, _fake) in _OPS.items():
    torch.library.define(f"igla::{_name}", _schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(f"igla::{_name}", "CompositeExplicitAutograd", _reference)
    torch.library.register_fake(f"igla::{_name}", _fake)
_compiled: dict[str, Callable] = {}


def _call(name: str, x: Tensor, *rest):
    """Run an op on the device of `x`: the dispatcher's kernel on CPU, the compiled reference on CUDA."""
    if x.device.type != "cuda":
        return getattr(torch.ops.igla, name)(x, *rest)
    if name not in _compiled:
        _compiled[name] = torch.compile(_OPS[name][1])
    return _compiled[name](x, *rest)


class _RmsNorm(torch.autograd.Function):
    """RMSNorm over the last dimension; saves the input and one scale per row."""

    @staticmethod
    def forward(ctx, x, weight, epsilon):
        rows = x.flatten(0, -2).contiguous()  # [N, H]
        out, scale = _call("rms_norm", rows, weight, epsilon)
        ctx.save_for_backward(rows, weight, scale)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx, grad_output):
        rows, weight, scale = ctx.saved_tensors
        grad = grad_output.flatten(0, -2).contiguous()
        grad_x, grad_weight = _call("rms_norm_gradient", grad, rows, weight, scale)
        return grad_x.view(grad_output.shape), grad_weight, None


class _Swiglu(torch.autograd.Function):
    """SwiGLU over the last dimension; saves the input only."""

    @staticmethod
    def forward(ctx, x):
        rows = x.flatten(0, -2).contiguous()  # [N, 2F]
        ctx.save_for_backward(rows)
        return _call("swiglu", rows).view(*x.shape[:-1], x.size(-1) // 2)

    @staticmethod
    def backward(ctx, grad_output):
        (rows,) = ctx.saved_tensors
        grad = grad_output.flatten(0, -2).contiguous()
        return _call("swiglu_gradient", grad, rows).view(*grad_output.shape[:-1], rows.size(1))


class _Rotate(torch.autograd.Function):
    """Rotary positions; the backward pass rotates by the negative angles, so the input is not saved."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _call("rotate", _rows(x), cos, sin)

    @staticmethod
    def backward(ctx, grad_output):
        cos, sin = ctx.saved_tensors
        return _call("rotate", _rows(grad_output), cos, -sin), None, None


def _rows(x: Tensor) -> Tensor:
    """Return `x` with stride 1 in its last dimension, copied only if needed."""
    return x if x.stride(-1) == 1 else x.contiguous()


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Return `x / sqrt(mean(x^2) + epsilon) * weight` over the last dimension, computed in fp32 (arXiv:1910.07467).

    Args:
        x: [..., H] fp32 or bf16; any other type uses torch's `rms_norm`.
        weight: [H], in the type of `x`.
        epsilon: added to the mean square before the root.
    """
    if x.dtype not in _TYPES or weight.dtype != x.dtype or x.device.type == "cuda":
        return F.rms_norm(x, (x.size(-1),), weight, epsilon)  # one kernel on CUDA too
    return _RmsNorm.apply(x, weight, epsilon)


def swiglu(x: Tensor) -> Tensor:
    """Return `silu(gate) * up` of x = [gate, up] (Shazeer 2020, arXiv:2002.05202), computed in fp32.

    Args:
        x: [..., 2F]

    Returns:
        [..., F], in x's type.
    """
    if x.dtype not in _TYPES:
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up
    return _Swiglu.apply(x)


def rotate(x: Tensor, angles: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate pairs (i, i + D/2) of each head by the angles of the position, computed in fp32.

    Rotary position embedding (Su et al. 2021, arXiv:2104.09864).

    Args:
        x: [S, B, H, D] in any strides.
        angles: [S, 1 or B, 1, D] fp32 radians; both halves of D are equal.
        interleaved: must be False; megatron-core passes it for models that rotate pairs (2i, 2i + 1).
    """
    assert not interleaved, "Llama rotates pairs that are half a head apart"
    half = angles[..., : x.size(-1) // 2]
    cos, sin = half.cos(), half.sin()
    if x.dtype not in _TYPES:
        return rotate_reference(x.float(), cos, sin).to(x.dtype)
    return _Rotate.apply(x, cos, sin)
