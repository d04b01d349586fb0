"""rms_norm: the residual stream takes a layer's output in and is normalised, in one walk.

hidden = (hidden + delta) * hidden_scale;  out = hidden / sqrt(mean(hidden^2) + epsilon) * weight, in fp32, rounded
once. With a weight [groups, H] the rows are groups of a longer vector: row r is scaled by weight r % groups. Some
models norm a layer's output too, delta by a weight of its own, before it is added; and some do only that: without a
weight, out = hidden.
Centred, the mean of a row is taken off before it is normalised, and a bias may be added at last: a layer norm.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyspec.ops._checks import check_are_tensors, check_floating, check_tensors
from pyspec.ops._library import Op


def rms_norm_reference(
    hidden: Tensor,
    delta: Tensor | None,
    weight: Tensor | None,
    epsilon: float,
    out_dtype: torch.dtype,
    delta_weight: Tensor | None = None,
    bias: Tensor | None = None,
    centred: bool = False,
    hidden_scale: float = 1.0,
) -> Tensor:
    """Plain PyTorch; hidden is changed in place. The specification of the kernels."""
    if delta is not None:
        hidden += delta if delta_weight is None else _normed(delta, delta_weight, epsilon)
        hidden *= hidden_scale
    if weight is None:
        return hidden.to(out_dtype, copy=True)
    if weight.dim() == 2:
        weight = weight.repeat(len(hidden) // len(weight), 1)
    x = hidden - hidden.mean(-1, keepdim=True) if centred else hidden
    out = _normed(x, weight, epsilon)
    return (out if bias is None else out + bias).to(out_dtype)


def _normed(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight


def _fake(hidden, delta, weight, epsilon, out_dtype, *rest) -> Tensor:
    return hidden.new_empty(hidden.shape, dtype=out_dtype)


def _triton():
    from pyspec.kernels.rms_norm import rms_norm as launch

    return launch


_OP = Op(
    "rms_norm",
    "(Tensor(a!) hidden, Tensor? delta, Tensor? weight, float epsilon, ScalarType out_dtype, "
    "Tensor? delta_weight=None, Tensor? bias=None, bool centred=False, "
    "float hidden_scale=1.0) -> Tensor",
    rms_norm_reference,
    _fake,
    _triton,
)


def rms_norm(
    hidden: Tensor,
    weight: Tensor | None,
    epsilon: float,
    *,
    delta: Tensor | None = None,
    delta_weight: Tensor | None = None,
    bias: Tensor | None = None,
    centred: bool = False,
    hidden_scale: float = 1.0,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Adds delta to hidden in place and returns the root-mean-square norm, or the layer norm, of the sum.

    Args:
        hidden: [R, H] fp32 with contiguous rows, which may be parts of longer ones: the residual stream; changed where
            there is a delta.
        weight: [H] fp32, or [groups, H] where R is a multiple of groups; None returns the sum as it is, rounded.
        epsilon: added to the mean of squares.
        delta: [R, H] fp32 or None.
        delta_weight: [H] fp32: delta's own norm is added, scaled by this; None adds delta as it is.
        bias: [H] fp32, added to what has been scaled by weight; None for none.
        centred: whether the mean of a row is taken off before it is normalised; it is kept in hidden.
        hidden_scale: what the sum of hidden and delta is multiplied by before it is kept and normalised.
        out_dtype: fp32, fp16 or bf16.

    Returns:
        [R, H] of out_dtype.

    Raises:
        TypeError, ValueError: a dtype or shape does not fit; the message names the argument.
    """
    options = {"weight": weight, "delta": delta, "delta_weight": delta_weight, "bias": bias}
    check_are_tensors(hidden=hidden, **options, optional=tuple(options))
    if hidden.dim() != 2 or (hidden.stride(1) != 1 and hidden.shape[1] > 1):
        raise ValueError(
            f"hidden must be [rows, size] with contiguous rows, got {tuple(hidden.shape)} {hidden.stride()}"
        )
    if delta is None and delta_weight is not None:
        raise ValueError("delta_weight must be None where there is no delta")
    if weight is None and (bias is not None or centred):
        raise ValueError("weight must be there for a bias and where rows are centred, got None")
    if centred and delta_weight is not None:
        raise ValueError("delta_weight must be None where rows are centred")
    if delta is None and hidden_scale != 1:
        raise ValueError(f"hidden_scale must be 1 where there is no delta, got {hidden_scale}")
    has_groups = weight is not None and weight.dim() == 2
    check_tensors(
        "hidden",
        hidden,
        ("hidden", hidden, torch.float32, hidden.shape),
        ("weight", weight, torch.float32, (*weight.shape[:1], *hidden.shape[1:]) if has_groups else hidden.shape[1:]),
        ("delta", delta, torch.float32, hidden.shape),
        ("delta_weight", delta_weight, torch.float32, hidden.shape[1:]),
        ("bias", bias, torch.float32, hidden.shape[1:]),
    )
    if has_groups and (not len(weight) or len(hidden) % len(weight)):
        raise ValueError(f"hidden must have a multiple of weight's {len(weight)} groups as rows, got {len(hidden)}")
    check_floating("out_dtype", out_dtype)
    return _OP(hidden, delta, weight, epsilon, out_dtype, delta_weight, bias, centred, hidden_scale)
