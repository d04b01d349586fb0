"""rotary_write: queries and keys are turned to their positions; keys and values go to their cache slots.

A head's first half x and second half y at position p become x cos - y sin and y cos + x sin, with the angles of p;
where there are fewer angles, that is so of the head's first dimensions, and the others stay. Some models norm queries
and keys before, by their root mean square, and values too, and some scale queries by their position. Where there are no
key heads, only queries are turned: some layers read the keys of others. The projection is read once, in
fp32, and rounded once, to the cache's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyspec.ops._checks import FLOATS, check_are_tensors, check_contiguous, check_places, check_tensors
from pyspec.ops._library import Op


def rotary_write_reference(
    qkv: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    sequences: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    heads: int,
    norm: Tensor | None = None,
    epsilon: float = 0.0,
    query_scales: Tensor | None = None,
    norm_values: bool = False,
) -> Tensor:
    """Plain PyTorch; keys and values are changed in place. The specification of the kernels."""
    kv_heads, head_dim = keys.shape[1], keys.shape[3]
    turned, straight = qkv.unflatten(1, (-1, head_dim)).split([heads + kv_heads, kv_heads], dim=1)
    if norm is not None:
        over, of_queries = (-1, 1) if len(norm) == 2 else ((1, 2), heads)  # a head, or all of them
        parts = zip(turned.split([heads, kv_heads], 1), norm.tensor_split([of_queries]), strict=True)
        turned = torch.cat(
            [x * torch.rsqrt(x.square().mean(over, keepdim=True) + epsilon) * weight for x, weight in parts], 1
        )
    cos, sin = cos_sin[positions.long()].unsqueeze(2).unbind(1)  # [R, 1, width / 2]
    x, y, rest = turned.tensor_split([cos.shape[2], 2 * cos.shape[2]], dim=-1)
    turned = torch.cat((x * cos - y * sin, y * cos + x * sin, rest), -1)
    if query_scales is not None:
        turned[:, :heads] *= query_scales[positions.long(), None, None]
    if norm_values:
        straight = straight * torch.rsqrt(straight.square().mean(-1, keepdim=True) + epsilon)
    turned = turned.to(keys.dtype)
    places = sequences.long(), slice(None), slots.long()
    keys[places] = turned[:, heads:]
    values[places] = straight.to(values.dtype)
    return turned[:, :heads].contiguous()


def _check_places(qkv, cos_sin, positions, sequences, slots, keys, values, heads, *rest) -> None:
    check_places("positions", positions, len(cos_sin), "cos_sin has {} positions")
    check_places("sequences", sequences, len(keys), "keys has {} sequences")
    check_places("slots", slots, keys.shape[2], "keys has {} slots")


def _fake(qkv, cos_sin, positions, sequences, slots, keys, values, heads, *rest) -> Tensor:
    return keys.new_empty((qkv.shape[0], heads, keys.shape[3]))


def _triton():
    from pyspec.kernels.rotary_write import rotary_write as launch

    return launch


_OP = Op(
    "rotary_write",
    "(Tensor qkv, Tensor cos_sin, Tensor positions, Tensor sequences, Tensor slots, Tensor(a!) keys, "
    "Tensor(b!) values, int heads, Tensor? norm=None, float epsilon=0.0, "
    "Tensor? query_scales=None, bool norm_values=False) -> Tensor",
    rotary_write_reference,
    _fake,
    _triton,
    check=_check_places,
)


def rotary_write(
    qkv: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    sequences: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    heads: int,
    norm: Tensor | None = None,
    epsilon: float = 0.0,
    query_scales: Tensor | None = None,
    norm_values: bool = False,
) -> Tensor:
    """Turns queries and keys and writes keys and values to a cache.

    Args:
        qkv: [R, (heads + 2 kv_heads) * D] fp32: queries, keys and values of R rows, which may be a part of longer ones.
        cos_sin: [P, 2, W / 2] fp32 and contiguous: cosines and sines of every position, for the first W dimensions of a
            head, an even number up to D.
        positions: [R] int32 in [0, P).
        sequences, slots: [R] int32, where each row's key and value go.
        keys, values: [B, kv_heads, S, D] fp32, fp16 or bf16 with a contiguous last dimension; changed in place. With
            kv_heads = 0 nothing is written.
        heads: of the queries.
        norm: None, or weights of queries' and keys' root mean square norms, in this order: [2, D] fp32 for each head by
            itself; [heads + kv_heads, D] for all query heads of a row together, and all its key heads.
        epsilon: added to the mean of squares.
        query_scales: [P] fp32 and contiguous, what turned queries are multiplied by at each position; None for 1.
        norm_values: whether each head's values are divided by their root mean square, with the same epsilon.

    Returns:
        The turned queries, [R, heads, D] of the keys' dtype.

    Raises:
        TypeError, ValueError: a dtype or shape does not fit; the message names the argument. On the CPU also when a
            position, sequence or slot is out of range; nothing is written then.
        RuntimeError: an argument requires a gradient.
    """
    check_are_tensors(qkv=qkv, cos_sin=cos_sin, positions=positions, sequences=sequences, slots=slots)
    check_are_tensors(keys=keys, values=values, norm=norm, query_scales=query_scales, optional=("norm", "query_scales"))
    for name, tensor in (("keys", keys), ("values", values)):
        if tensor.dim() != 4 or tensor.shape != keys.shape or tensor.stride(3) != 1:
            raise ValueError(
                f"{name} must be [batch, kv_heads, slots, head_dim] with a contiguous last dimension, "
                f"got shape {tuple(tensor.shape)} and strides {tensor.stride()}"
            )
        if tensor.dtype not in FLOATS or tensor.dtype != keys.dtype:
            raise TypeError(f"{name} must be float32, float16 or bfloat16 and like keys, got {tensor.dtype}")
    kv_heads, head_dim = keys.shape[1], keys.shape[3]
    if head_dim % 16 or not 0 < head_dim <= 512:
        raise ValueError(f"keys must have a head_dim that is a multiple of 16 up to 512, got {head_dim}")
    rows, width = qkv.shape[0], 2 * cos_sin.shape[-1]
    if not 0 < width <= head_dim:
        raise ValueError(
            f"cos_sin must have angles for at most {head_dim} dimensions, got shape {tuple(cos_sin.shape)}"
        )
    if norm is not None and norm.shape not in ((2, head_dim), (heads + kv_heads, head_dim)):
        raise ValueError(
            f"norm must have shape {(2, head_dim)} or {(heads + kv_heads, head_dim)}, got {tuple(norm.shape)}"
        )
    check_tensors(
        "keys",
        keys,
        ("qkv", qkv, torch.float32, (rows, (heads + 2 * kv_heads) * head_dim)),
        ("cos_sin", cos_sin, torch.float32, (*cos_sin.shape[:1], 2, width // 2)),
        ("norm", norm, torch.float32, () if norm is None else norm.shape),
        ("query_scales", query_scales, torch.float32, cos_sin.shape[:1]),
        ("positions", positions, torch.int32, (rows,)),
        ("sequences", sequences, torch.int32, (rows,)),
        ("slots", slots, torch.int32, (rows,)),
    )
    check_contiguous(cos_sin=cos_sin, query_scales=query_scales)
    return _OP(qkv, cos_sin, positions, sequences, slots, keys, values, heads, norm, epsilon, query_scales, norm_values)
