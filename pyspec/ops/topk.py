"""topk: the k largest values of a row and where they are; exactly, or the best of what buckets of the row keep.

A row of n values falls into buckets. Each keeps its per_bucket best, in one pass over the row, and the result is the k
best of what was kept: one stage where that is just k, two where it is more. Bucket i owns, with s = n // buckets,

    interleaved:  x[i], x[i + buckets], x[i + 2 buckets], ...
    contiguous:   a run of neighbours; the first n % buckets runs have s + 1 values, the others s

A value of the true top k is lost only where more than per_bucket of them share a bucket, so the share that is found
depends on n, k, buckets and per_bucket alone as long as the best values lie at random places (`expected_recall`).
Neighbours are often alike, which is why interleaved is the default.

What is best: values are compared as numbers (-0 equals +0), NaN is above +inf whatever its sign, and of equals the one
with the lower index is better, also for the smallest. So every result is decided by the row alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyspec.ops._checks import FLOATS, check_are_tensors
from pyspec.ops._library import Op
from pyspec.ops.topk_recall import EXACT, MOST_PER_BUCKET, bucket_sizes, choose_buckets

ASSIGNMENTS = ("interleaved", "contiguous")


class TopK(NamedTuple):
    """The k best values of x along a dimension, and their indices."""

    values: Tensor  #: of x's dtype; always x.gather(dim, indices)
    indices: Tensor  #: int64, different from each other


def topk_reference(
    x: Tensor, k: int, buckets: int, per_bucket: int, interleaved: bool, largest: bool, sorted: bool
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch; always best first, which is one of the orders that are allowed where sorted is not asked for."""
    order = x.sort(dim=1, descending=largest, stable=True).indices  # [rows, n], best first
    if buckets and buckets * per_bucket < x.shape[1]:
        n = x.shape[1]
        places = torch.arange(n, device=x.device)
        larger_size, larger = bucket_sizes(n, buckets)
        sizes = torch.full((buckets,), larger_size, device=x.device)
        sizes[larger:] -= 1
        owner = places % buckets if interleaved else torch.arange(buckets, device=x.device).repeat_interleave(sizes)
        # ranks of the row's values, bucket after bucket, best first in each: the first per_bucket of each are kept
        ranks = owner[order].sort(dim=1, stable=True).indices
        starts = sizes.cumsum(0) - sizes
        kept = (starts[:, None] + torch.arange(per_bucket, device=x.device)).flatten()
        order = order.gather(1, ranks[:, kept].sort(dim=1).values)
    indices = order[:, :k].contiguous()
    return x.gather(1, indices), indices


def _fake(
    x: Tensor, k: int, buckets: int, per_bucket: int, interleaved: bool, largest: bool, sorted: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty((x.shape[0], k)), x.new_empty((x.shape[0], k), dtype=torch.int64)


_OP = Op(
    "topk",
    "(Tensor x, int k, int buckets, int per_bucket, bool interleaved, bool largest, bool sorted) -> (Tensor, Tensor)",
    topk_reference,
    _fake,
    cuda=True,
)


def topk(
    x: Tensor,
    k: int,
    dim: int = -1,
    *,
    recall: float | None = None,
    buckets: int | None = None,
    per_bucket: int | None = None,
    assignment: str = "interleaved",
    largest: bool = True,
    sorted: bool = False,
) -> TopK:
    """The k largest values of x along a dimension, and their indices.

    Exact, unless recall, buckets or per_bucket is given. Equals are taken lowest index first, NaN is the largest of all
    (as for torch.topk), and the same arguments always give the same result, on any number of threads.

    Args:
        x: fp32, fp16 or bf16, any shape and strides.
        k: how many, in [1, x.shape[dim]].
        dim: the dimension that is searched, of less than 2^31 values.
        recall: the share of the true top k that is enough, in (0, 1], on average over rows whose best values lie at
            random places. The cheapest buckets that keep this promise are chosen, or none where the exact result is
            cheaper (`choose_buckets`; the first call on a machine measures for a fraction of a second).
        buckets: instead of recall, how many share the row; the fewest that hold k where only per_bucket is given.
        per_bucket: values that a bucket keeps, 1 to 4; the fewest that hold k where only buckets is given. With
            buckets * per_bucket > k a second stage picks the k best of them.
        assignment: "interleaved" or "contiguous" buckets.
        largest: False for the smallest values; NaN comes last then.
        sorted: best first, else in an order that the row decides but that differs between backends.

    Returns:
        TopK: values and int64 indices, like x but with k values in dim.

    Raises:
        ValueError: an argument is out of range, or x has another dtype.
        TypeError: k, dim, buckets or per_bucket is not an integer, or recall not a number.
    """
    dim, n = _check_x(x, dim)
    _check_integer("k", k)
    if not 1 <= k <= n:
        raise ValueError(f"k must be in [1, {n}], the values of x in dimension {dim}, got {k}")
    if assignment not in ASSIGNMENTS:
        raise ValueError(f"assignment must be 'interleaved' or 'contiguous', got {assignment!r}")
    if recall is not None:
        _check_recall(recall, buckets, per_bucket, assignment)
        chosen = choose_buckets(n, k, recall, x.device.type)
        buckets, per_bucket = chosen.buckets, chosen.per_bucket  # torch 2.11 does not trace a constant's unpacking
    elif buckets is None and per_bucket is None:
        buckets, per_bucket = EXACT
    else:
        buckets, per_bucket = _check_buckets(k, buckets, per_bucket)

    if x.dim() == 2 and dim == 1 and (x.stride(1) == 1 or n == 1):
        return TopK(*_OP(x, k, buckets, per_bucket, assignment == "interleaved", largest, sorted))
    moved = x.movedim(dim, -1)
    rows = moved.reshape(-1, n)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    found = _OP(rows, k, buckets, per_bucket, assignment == "interleaved", largest, sorted)
    return TopK(*(out.view(*moved.shape[:-1], k).movedim(-1, dim) for out in found))


def _check_x(x: Tensor, dim: int) -> tuple[int, int]:
    """The dimension, not negative, and its size."""
    check_are_tensors(x=x)
    if x.dtype not in FLOATS:
        raise ValueError(f"x must be float32, float16 or bfloat16, got {x.dtype}")
    shape = x.shape
    if not shape:
        raise ValueError("x must have at least one dimension, got a scalar")
    _check_integer("dim", dim)
    if not -len(shape) <= dim < len(shape):
        raise ValueError(f"dim must be in [{-len(shape)}, {len(shape) - 1}], got {dim}")
    dim %= len(shape)
    if shape[dim] >= 2**31:
        raise ValueError(f"x must have less than 2^31 values in dimension {dim}, got shape {tuple(shape)}")
    return dim, shape[dim]


def _check_recall(recall: float, buckets: int | None, per_bucket: int | None, assignment: str) -> None:
    if isinstance(recall, bool) or not isinstance(recall, (int, float)):
        raise TypeError(f"recall must be a number, got {recall!r}")
    if not 0 < recall <= 1:
        raise ValueError(f"recall must be in (0, 1], got {recall}")
    if buckets is not None or per_bucket is not None:
        raise ValueError(f"recall chooses the buckets, but got buckets {buckets} and per_bucket {per_bucket} as well")
    if assignment != "interleaved":
        raise ValueError(f"recall can be promised for interleaved buckets only, got assignment {assignment!r}")


def _check_buckets(k: int, buckets: int | None, per_bucket: int | None) -> tuple[int, int]:
    if buckets is not None:
        _check_integer("buckets", buckets)
        if not 1 <= buckets < 2**31:
            raise ValueError(f"buckets must be in [1, 2^31), got {buckets}")
    if per_bucket is not None:
        _check_integer("per_bucket", per_bucket)
        if not 1 <= per_bucket <= MOST_PER_BUCKET:
            raise ValueError(f"per_bucket must be in [1, {MOST_PER_BUCKET}], got {per_bucket}")
    if buckets is None:
        return -(-k // per_bucket), per_bucket
    kept = MOST_PER_BUCKET if per_bucket is None else per_bucket
    if buckets * kept < k:
        raise ValueError(f"buckets must keep at least k = {k} values, got {buckets} buckets that keep {kept} each")
    return buckets, -(-k // buckets) if per_bucket is None else per_bucket


def _check_integer(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {value!r}")
