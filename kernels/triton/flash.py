"""What the attention kernels share: one tile of keys and values folded into an online softmax, and the loads of it.

The state of a row is its largest score (in units of log2), the sum of its weights and its weighted values.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
ROWS = tl.constexpr(16)  # query rows of a program: the smallest tensor-core tile


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


# ==== online softmax of 16 rows: largest score (in units of log2), sum of weights, weighted values ====


@triton.jit
def empty_state(BLOCK_D: tl.constexpr):
    return (
        tl.full([ROWS], float("-inf"), tl.float32),
        tl.zeros([ROWS], tl.float32),
        tl.zeros([ROWS, BLOCK_D], tl.float32),
    )


@triton.jit
def merge(largest_a, total_a, weighted_a, largest_b, total_b, weighted_b):
    """The state of a's keys followed by b's. Merging an empty state changes no bit."""
    now = tl.maximum(largest_a, largest_b)
    shift = tl.where(now == float("-inf"), 0.0, now)
    keep_a, keep_b = tl.exp2(largest_a - shift), tl.exp2(largest_b - shift)
    return now, total_a * keep_a + total_b * keep_b, weighted_a * keep_a[:, None] + weighted_b * keep_b[:, None]


@triton.jit
def load_state(chunk_largest, chunk_total, chunk_weighted, rows, wanted, HEAD_DIM, BLOCK_D: tl.constexpr):
    """What the prefix kernel stored for a chunk; the empty state where not wanted."""
    largest = tl.load(chunk_largest + rows, mask=wanted, other=float("-inf"))
    total = tl.load(chunk_total + rows, mask=wanted, other=0.0)
    return largest, total, load_rows(chunk_weighted, rows, rows, wanted, HEAD_DIM, 0, HEAD_DIM, BLOCK_D, False)
