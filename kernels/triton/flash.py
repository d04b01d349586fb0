"""What the attention kernels share: one tile of keys and values folded into an online softmax, and the loads of it.

The state of a row is its largest score (in units of log2), the sum of its weights and its weighted values.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def fold_keys(query, keys, visible, largest, total, scale, softcap):
    """Largest and total of the rows, weights [rows, tile], and what the earlier weighted values are multiplied by."""
    scores = tl.dot(query, tl.trans(keys), input_precision="ieee")
    if softcap is None:
        scores = scores * (scale * LOG2_E)
    else:  # softcap * tanh(x / softcap) with tanh(y) = 1 - 2 / (1 + e^2y)
        scores = (softcap * LOG2_E) * (1.0 - 2.0 / (1.0 + tl.exp2(scores * (scale * (2.0 * LOG2_E) / softcap))))
    if visible is not None:
        scores = tl.where(visible, scores, float("-inf"))
    now = tl.maximum(largest, tl.max(scores, 1))
    shift = tl.where(now == float("-inf"), 0.0, now)  # a row that has seen no key yet: all weights 0
    keep = tl.exp2(largest - shift)
    weights = tl.exp2(scores - shift[:, None])
    return now, total * keep + tl.sum(weights, 1), weights, keep


@triton.jit
def fold_values(weights, keep, values, weighted):
    return tl.dot(weights.to(values.dtype), values, weighted * keep[:, None], input_precision="ieee")


@triton.jit
def load_rows(base, outer, inner, wanted, stride_outer, stride_inner, HEAD_DIM, BLOCK_D: tl.constexpr, UPCAST):
    """Rows [N, BLOCK_D] at outer [N] and inner [N]; 0 where not wanted, whatever the memory holds. None: all are."""
    rows = outer.to(tl.int64) * stride_outer + inner.to(tl.int64) * stride_inner
    dims = tl.arange(0, BLOCK_D)
    if wanted is not None:
        mask = wanted[:, None] & (dims < HEAD_DIM)[None, :]
        loaded = tl.load(base + rows[:, None] + dims[None, :], mask=mask, other=0.0)
    elif HEAD_DIM == BLOCK_D:
        loaded = tl.load(base + rows[:, None] + dims[None, :])
    else:
        loaded = tl.load(base + rows[:, None] + dims[None, :], mask=(dims < HEAD_DIM)[None, :], other=0.0)
    return loaded.to(tl.float32) if UPCAST else loaded
