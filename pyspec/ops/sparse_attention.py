"""sparse_attention: attention of one query that reads only the keys and values that seem to matter.

For a query q, keys K [n, D] and values V [n, D], after Ribar et al., "SparQ Attention", arXiv 2312.04985:

1. The `components` largest |q| are I. With them alone, scores are softmax(q[I] K[:, I]^T scale / sqrt(t)) where
   t = sum |q[I]| / sum |q| makes up for the missing ones.
2. P are the `positions` largest of these scores among all but the last `window` keys, found by a bucketed top-k
   (`topk`, interleaved: neighbours score alike), and those last keys themselves. a is the sum of their scores.
3. out = a softmax(q K[P]^T scale) V[P] + (1 - a) mean V: the rest is taken for average.

Heads that share keys choose together, by the sum of their |q| and of their scores. Read are `components` of the D
columns of the keys, and P; but columns are read alone only where they lie in order: keys stored as [D, n] and viewed
as [n, D].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyspec.ops._checks import check_are_tensors, check_floating
from pyspec.ops._library import outside_autocast, refuse_gradients
from pyspec.ops.topk import topk


@outside_autocast
def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None = None,
    *,
    components: int = 16,
    positions: int = 128,
    window: int = 32,
    per_bucket: int | None = 2,
    scale: float | None = None,
    value_mean: Tensor | None = None,
) -> Tensor:
    """Approximate attention of one query a sequence over a long context.

    Exact where components is D and positions + window reach over the whole context.

    Args:
        q: [B, Hq, D] fp32, fp16 or bf16.
        k, v: [B, Hkv, S, D] like q, any strides; Hq a multiple of Hkv.
        lengths: [B] int32 or int64, keys of each sequence, in [1, S]; S by default. On a GPU they are not checked.
        components: entries of a query that scores are guessed from, in [1, D].
        positions: keys that are read for their scores, at least 1.
        window: latest keys that are read always, at least 1.
        per_bucket: values that a bucket of the top-k keeps, 1 to 4, in one stage; None for an exact top-k.
        scale: of the scores, 1 / sqrt(D) by default.
        value_mean: [B, Hkv, D], the mean of each sequence's values, where a cache keeps it; else v is read for it.

    Returns:
        [B, Hq, D] like q; sums are in fp32.

    Raises:
        TypeError: dtypes do not fit.
        ValueError: a shape, device or number does not fit.
        RuntimeError: an argument requires a gradient.
    """
    _check(q, k, v, lengths, value_mean)
    refuse_gradients("sparse_attention", q=q, k=k, v=v, value_mean=value_mean)
    head_dim, slots = k.shape[3], k.shape[2]
    for name, value, most in (
        ("components", components, head_dim),
        ("positions", positions, 2**31),
        ("window", window, 2**31),
    ):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {value!r}")
        if not 1 <= value <= most:
            raise ValueError(f"{name} must be in [1, {most}], got {value}")
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    is_key = None
    if lengths is not None:
        lengths = lengths.long()[:, None, None]
        is_key = torch.arange(slots, device=q.device) < lengths  # [B, 1, S]

    q = q.float().unflatten(1, (k.shape[1], -1))  # [B, Hkv, G, D]
    guessed = _guessed_scores(q, k, is_key, components, scale)  # [B, Hkv, G, S]
    chosen, is_chosen = _choose(guessed.sum(2), lengths, positions, window, per_bucket)  # [B, Hkv, P]
    is_chosen = is_chosen[:, :, None]
    covered = guessed.gather(3, chosen[:, :, None].expand(-1, -1, q.shape[2], -1))
    covered = torch.where(is_chosen, covered, 0.0).sum(3, keepdim=True)

    scores = torch.einsum("bhgd,bhpd->bhgp", q, _rows(k, chosen).float()) * scale
    weights = torch.where(is_chosen, scores, -torch.inf).softmax(3)
    out = torch.einsum("bhgp,bhpd->bhgd", weights, _rows(v, chosen).float())
    if value_mean is None:
        if is_key is None:
            value_mean = v.mean(2, dtype=torch.float32)
        else:
            value_mean = torch.where(is_key[..., None], v, 0).sum(2, dtype=torch.float32) / lengths
    out = covered * out + (1 - covered) * value_mean.float()[:, :, None]
    return out.flatten(1, 2).to(v.dtype)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x[b, h, index[b, h]] of x [B, H, N, M] and index [B, H, R]; unlike gather, it takes whole rows."""
    batch = torch.arange(x.shape[0], device=x.device)[:, None, None]
    return x[batch, torch.arange(x.shape[1], device=x.device)[:, None], index]


def _guessed_scores(q: Tensor, k: Tensor, is_key: Tensor | None, components: int, scale: float) -> Tensor:
    """Softmax of the scores that the largest entries of each query give, [B, Hkv, G, S] fp32."""
    sizes = q.abs()
    largest = topk(sizes.sum(2), components).indices  # [B, Hkv, r]
    among = largest[:, :, None].expand(-1, -1, q.shape[2], -1)
    share = sizes.gather(3, among).sum(3, keepdim=True) / sizes.sum(3, keepdim=True).clamp_min(1e-30)
    factor = scale / share.clamp_min(1e-30).sqrt()
    if k.stride(2) == 1:  # the columns lie in order: only they are read
        columns = _rows(k.transpose(2, 3), largest).float()
        scores = torch.einsum("bhgr,bhrs->bhgs", q.gather(3, among) * factor, columns)
    else:
        part = torch.zeros_like(q).scatter(3, among, q.gather(3, among) * factor)
        scores = torch.einsum("bhgd,bhsd->bhgs", part, k.float())
    return (scores if is_key is None else torch.where(is_key[:, :, None], scores, -torch.inf)).softmax(3)


def _choose(
    scores: Tensor, lengths: Tensor | None, positions: int, window: int, per_bucket: int | None
) -> tuple[Tensor, Tensor]:
    """Positions [B, Hkv, P] that are read, and whether each is one: short contexts have fewer."""
    slots = scores.shape[2]
    window = min(window, slots)
    local = torch.arange(-window, 0, device=scores.device) + (slots if lengths is None else lengths)
    chosen = local.expand(*scores.shape[:2], window)
    is_chosen = chosen >= 0
    if slots > window:
        others = scores[..., : slots - window]  # no sequence is longer, so none has its window before that
        if lengths is not None:
            is_other = torch.arange(slots - window, device=scores.device) < lengths - window
            others = torch.where(is_other, others, -torch.inf)
        best = topk(others, min(positions, slots - window), per_bucket=per_bucket)
        chosen = torch.cat([best.indices, chosen], 2)
        is_chosen = torch.cat([best.values > -torch.inf, is_chosen], 2)
    return torch.where(is_chosen, chosen, 0), is_chosen


def _check(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, value_mean: Tensor | None) -> None:
    optional = ("lengths", "value_mean")
    check_are_tensors(q=q, k=k, v=v, lengths=lengths, value_mean=value_mean, optional=optional)
    check_floating("q", q.dtype)
    if q.dim() != 3 or 0 in q.shape[1:]:
        raise ValueError(f"q must be [B, Hq, D], got shape {tuple(q.shape)}")
    if k.dim() != 4 or k.shape[0] != len(q) or k.shape[3] != q.shape[2] or 0 in k.shape[1:]:
        raise ValueError(f"k must be [{len(q)}, Hkv, S, {q.shape[2]}], got shape {tuple(k.shape)}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"q must have a multiple of k's {k.shape[1]} heads, got {q.shape[1]}")
    if v.shape != k.shape:
        raise ValueError(f"v must have k's shape {tuple(k.shape)}, got {tuple(v.shape)}")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} must be {q.dtype} like q, got {tensor.dtype}")
    for name, tensor in (("k", k), ("v", v), ("lengths", lengths), ("value_mean", value_mean)):
        if tensor is not None and tensor.device != q.device:
            raise ValueError(f"{name} must be on {q.device} like q, got {tensor.device}")
    if value_mean is not None and value_mean.shape != (len(q), k.shape[1], q.shape[2]):
        raise ValueError(f"value_mean must be {[len(q), k.shape[1], q.shape[2]]}, got shape {tuple(value_mean.shape)}")
    if lengths is None:
        return
    if lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"lengths must be int32 or int64, got {lengths.dtype}")
    if lengths.shape != (len(q),):
        raise ValueError(f"lengths must be [{len(q)}], got shape {tuple(lengths.shape)}")
    if torch.compiler.is_compiling() or lengths.device.type != "cpu" or not len(lengths):
        return
    lowest, highest = (int(length) for length in lengths.aminmax())
    if lowest < 1 or highest > k.shape[2]:
        raise ValueError(f"lengths must be in [1, {k.shape[2]}], got {lowest} to {highest}")
