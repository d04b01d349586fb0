"""rms_norm: the residual stream takes a layer's output in and is normalised, in one walk.

hidden += delta;  out = hidden / sqrt(mean(hidden^2) + epsilon) * weight, in fp32, rounded once. With a weight
[groups, H] the rows are groups of a longer vector: row r is scaled by weight r % groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyspec.ops._checks import check_are_tensors, check_floating, check_tensors
from pyspec.ops._library import Op


def rms_norm_reference(
    hidden: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float, out_dtype: torch.dtype
) -> Tensor:
    """Plain PyTorch; hidden is changed in place. The specification of the kernels."""
    if delta is not None:
        hidden += delta
    scales = torch.rsqrt(hidden.square().mean(-1, keepdim=True) + epsilon)
    if weight.dim() == 2:
        weight = weight.repeat(len(hidden) // len(weight), 1)
    return (hidden * scales * weight).to(out_dtype)


def _fake(hidden, delta, weight, epsilon, out_dtype) -> Tensor:
    return torch.empty_like(hidden, dtype=out_dtype)


def _triton():
    from pyspec.kernels.rms_norm import rms_norm as launch

    return launch


_OP = Op(
    "rms_norm",
    "(Tensor(a!) hidden, Tensor? delta, Tensor weight, float epsilon, ScalarType out_dtype) -> Tensor",
    rms_norm_reference,
    _fake,
    _triton,
)


def rms_norm(
    hidden: Tensor,
    weight: Tensor,
    epsilon: float,
    *,
    delta: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Adds delta to hidden in place and returns the root-mean-square norm of the sum.

    Args:
        hidden: [R, H] fp32 and contiguous: the residual stream; changed where there is a delta.
        weight: [H] fp32, or [groups, H] where R is a multiple of groups.
        epsilon: added to the mean of squares.
        delta: [R, H] fp32 or None.
        out_dtype: fp32, fp16 or bf16.

    Returns:
        [R, H] of out_dtype.

    Raises:
        TypeError, ValueError: a dtype or shape does not fit; the message names the argument.
    """
    check_are_tensors(hidden=hidden, weight=weight, delta=delta, optional=("delta",))
    if hidden.dim() != 2 or not hidden.is_contiguous():
        raise ValueError(f"hidden must be [rows, size] and contiguous, got {tuple(hidden.shape)} {hidden.stride()}")
    check_tensors(
        "hidden",
        hidden,
        ("hidden", hidden, torch.float32, hidden.shape),
        ("weight", weight, torch.float32, hidden.shape[1:] if weight.dim() < 2 else (len(weight), *hidden.shape[1:])),
        ("delta", delta, torch.float32, hidden.shape),
    )
    if weight.dim() == 2 and (not len(weight) or len(hidden) % len(weight)):
        raise ValueError(f"hidden must have a multiple of weight's {len(weight)} groups as rows, got {len(hidden)}")
    check_floating("out_dtype", out_dtype)
    return _OP(hidden, delta, weight, epsilon, out_dtype)
