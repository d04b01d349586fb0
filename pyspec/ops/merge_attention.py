"""merge_attention: two attentions over disjoint keys become the attention over both.

With s the log-sum-exp of each part and m = max(s_a, s_b),

    total = e^(s_a - m) + e^(s_b - m)
    out = (out_a e^(s_a - m) + out_b e^(s_b - m)) / total
    lse = m + log(total).

A part that saw no key has lse -inf and weight 0; when both saw none the result is 0 and -inf.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyspec.ops._checks import FLOATS, check_are_tensors, check_tensors
from pyspec.ops._library import Op


def merge_attention_reference(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Plain PyTorch, in fp32."""
    largest = torch.maximum(lse_a, lse_b)
    shift = torch.where(largest == -torch.inf, 0.0, largest)
    weight_a, weight_b = (lse_a - shift).exp(), (lse_b - shift).exp()
    total = weight_a + weight_b
    # A part without keys may hold anything, NaN included: it is left out, not multiplied by 0.
    part_a = torch.where(weight_a[..., None] == 0, 0.0, out_a.float()) * weight_a[..., None]
    part_b = torch.where(weight_b[..., None] == 0, 0.0, out_b.float()) * weight_b[..., None]
    out = (part_a + part_b) / torch.where(total == 0, 1.0, total)[..., None]
    return out.to(out_a.dtype).contiguous(), shift + total.log()


def _fake(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    return out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)


def _triton():
    from pyspec.kernels.merge_attention import merge_attention as launch

    return launch


_OP = Op(
    "merge_attention",
    "(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor, Tensor)",
    merge_attention_reference,
    _fake,
    _triton,
)


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Merges two attentions of the same queries over disjoint sets of keys.

    Args:
        out_a, out_b: [..., D] fp32, fp16 or bf16, one dtype and shape.
        lse_a, lse_b: [...] fp32, natural log-sum-exp of each part's scores; -inf where a part saw no key.

    Returns:
        out [..., D] of the dtype of out_a, and its lse [...] fp32, both contiguous; 0 and -inf where both parts
        are empty.

    Raises:
        TypeError: a dtype is not supported or the two differ.
        ValueError: shapes do not fit, or tensors are on different devices.
    """
    check_are_tensors(out_a=out_a, lse_a=lse_a, out_b=out_b, lse_b=lse_b)
    if out_a.dtype not in FLOATS or out_b.dtype != out_a.dtype:
        raise TypeError(
            f"out_a and out_b must share a dtype of float32, float16 or bfloat16, got {out_a.dtype} and {out_b.dtype}"
        )
    if out_a.dim() < 1 or out_b.shape != out_a.shape:
        raise ValueError(f"out_b must have the shape of out_a {tuple(out_a.shape)}, got {tuple(out_b.shape)}")
    check_tensors(
        "out_a",
        out_a,
        ("lse_a", lse_a, torch.float32, out_a.shape[:-1]),
        ("out_b", out_b, out_a.dtype, out_a.shape),
        ("lse_b", lse_b, torch.float32, out_a.shape[:-1]),
    )
    return _OP(out_a, lse_a, out_b, lse_b)
