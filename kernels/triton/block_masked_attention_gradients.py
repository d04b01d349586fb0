"""Gradients of block_masked_attention summed over tiles: what the two kernels of its backward have in their loops."""

import triton
import triton.language as tl
from pyspec.kernels.block_masked_attention import TILE, slots_of
from pyspec.kernels.flash import LOG2_E, load_rows

__all__ = ["not_finite", "store_rows", "sum_over_keys", "sum_over_rows"]

STRIP = tl.constexpr(32)  # rows of half a word of bits


# ==== one tile ====


@triton.jit
def gradients_of(scores, d_weights, lse, constant, visible, scale, softcap):
    """Weights, and the gradients of scores over scale; lse, in units of log2, and constant broadcast against both."""
    if softcap is None:
        weights = tl.exp2(scores * (scale * LOG2_E) - lse)
        d_scores = weights * (d_weights - constant)
    else:  # softcap * tanh(x / softcap) with tanh(y) = 1 - 2 r, of slope 4 r (1 - r), and r = 1 / (1 + e^2y)
        r = 1.0 / (1.0 + tl.exp2(scores * (scale * (2.0 * LOG2_E) / softcap)))
        weights = tl.exp2(softcap * (1.0 - 2.0 * r) * LOG2_E - lse)
        d_scores = weights * (d_weights - constant) * (4.0 * r * (1.0 - r))
    if visible is not None:
        weights, d_scores = tl.where(visible, weights, 0.0), tl.where(visible, d_scores, 0.0)
    return weights, d_scores


@triton.jit
def finite_or_zero(values):
    return tl.where(values.to(tl.float32) * 0.0 == 0.0, values, 0.0).to(values.dtype)


@triton.jit
def not_finite(sums):
    """Whether any number is not."""
    return tl.sum(sums * 0.0) != 0.0


@triton.jit
def store_rows(base, row, stride_row, values, wanted, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    dims = tl.arange(0, BLOCK_D)
    mask = wanted[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(base + row.to(tl.int64)[:, None] * stride_row + dims[None, :], values.to(base.dtype.element_ty), mask=mask)


# ==== sums ====


@triton.jit
def sum_over_keys(
    query,  # [ROWS, BLOCK_D]
    d_row,  # [ROWS, BLOCK_D], of out
    lse,  # [ROWS, 1]
    constant,  # [ROWS, 1]
    k,
    v,
    full_ranges,
    full_tiles,
    partial_ranges,
    partial_tiles,
    bits,
    key_order,
    keys,
    scale,
    softcap,
    stride_k_slot,
    stride_v_slot,
    first_lane,
    WORDS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    UPCAST: tl.constexpr,
    IS_SPOILT: tl.constexpr,
):
    """dq over scale [ROWS, BLOCK_D]: from pointers to the head's keys and values and to the row block's ranges."""
    ROWS: tl.constexpr = query.shape[0]
    BLOCK_D: tl.constexpr = query.shape[1]
    PART: tl.constexpr = min(ROWS, STRIP)
    STAGES: tl.constexpr = 1 if IS_SPOILT else None
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for i in tl.range(tl.load(full_ranges), tl.load(full_ranges + 1), num_stages=STAGES):
        slots = slots_of(tl.load(full_tiles + i), None, key_order)
        tile_keys = load_rows(k, slots, slots, None, stride_k_slot, 0, HEAD_DIM, BLOCK_D, UPCAST)
        values = load_rows(v, slots, slots, None, stride_v_slot, 0, HEAD_DIM, BLOCK_D, UPCAST)
        scores = tl.dot(query, tl.trans(tile_keys), input_precision="ieee")
        d_weights = tl.dot(d_row, tl.trans(values), input_precision="ieee")
        _, d_scores = gradients_of(scores, d_weights, lse, constant, None, scale, softcap)
        total = tl.dot(d_scores.to(tile_keys.dtype), tile_keys, total, input_precision="ieee")

    for i in tl.range(tl.load(partial_ranges), tl.load(partial_ranges + 1), num_stages=STAGES):
        tile = tl.load(partial_tiles + 2 * i)
        wanted = tile * TILE + tl.arange(0, TILE) < keys
        slots = slots_of(tile, wanted, key_order)
        tile_keys = load_rows(k, slots, slots, wanted, stride_k_slot, 0, HEAD_DIM, BLOCK_D, UPCAST)
        values = load_rows(v, slots, slots, wanted, stride_v_slot, 0, HEAD_DIM, BLOCK_D, UPCAST)
        scores = tl.dot(query, tl.trans(tile_keys), input_precision="ieee")
        d_weights = tl.dot(d_row, tl.trans(values), input_precision="ieee")
        words = bits + tl.load(partial_tiles + 2 * i + 1).to(tl.int64) * (2 * WORDS * TILE)
        lane = first_lane + tl.arange(0, ROWS // PART) * PART
        halves = words + lane // TILE * (2 * TILE) + lane // STRIP % 2
        half = tl.load(halves[:, None, None] + 2 * tl.arange(0, TILE)[None, None, :])
        bit = 1 << ((first_lane + tl.arange(0, PART)) % STRIP)
        visible = tl.reshape(half & bit[None, :, None], [ROWS, TILE]) != 0
        _, d_scores = gradients_of(scores, d_weights, lse, constant, visible, scale, softcap)
        if IS_SPOILT:
            tile_keys = finite_or_zero(tile_keys)
        total = tl.dot(d_scores.to(tile_keys.dtype), tile_keys, total, input_precision="ieee")
    return total


@triton.jit
def sum_over_rows(
    own_keys,  # [KEYS, BLOCK_D]
    values,  # [KEYS, BLOCK_D]
    d_out,
    q,
    row_lse,
    row_constant,
    counts,
    full_blocks,
    partial_blocks,
    bits,
    row_order,
    rows,
    blocks,
    tiles,
    scale,
    softcap,
    stride_d_out_head,
    stride_d_out_row,
    stride_q_head,
    stride_q_row,
    first_key,
    GROUP: tl.constexpr,
    MASK_HEADS: tl.constexpr,
    WORDS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    UPCAST: tl.constexpr,
    IS_SPOILT: tl.constexpr,
):
    """dk over scale and dv [KEYS, BLOCK_D]: from pointers to the group's first head and to the tile's lists for it."""
    KEYS: tl.constexpr = own_keys.shape[0]
    BLOCK_D: tl.constexpr = own_keys.shape[1]
    STRIPS: tl.constexpr = 2 * WORDS  # of a row block
    lane = tl.arange(0, STRIP)
    STAGES: tl.constexpr = 1 if IS_SPOILT else None
    k_total = tl.zeros([KEYS, BLOCK_D], tl.float32)
    v_total = tl.zeros([KEYS, BLOCK_D], tl.float32)
    for _ in range(GROUP):
        for i in tl.range(tl.load(counts) * STRIPS, num_stages=STAGES):
            row = (tl.load(full_blocks + i // STRIPS) * STRIPS + i % STRIPS) * STRIP + lane
            used = row < rows
            if row_order is not None:
                row = tl.load(row_order + row, mask=used, other=0)
            query = load_rows(q, row, row, used, stride_q_row, 0, HEAD_DIM, BLOCK_D, UPCAST)
            d_row = load_rows(d_out, row, row, used, stride_d_out_row, 0, HEAD_DIM, BLOCK_D, UPCAST)
            lse = tl.load(row_lse + row, mask=used, other=float("inf"))[None, :]
            constant = tl.load(row_constant + row, mask=used, other=0.0)[None, :]
            scores = tl.dot(own_keys, tl.trans(query), input_precision="ieee")
            d_weights = tl.dot(values, tl.trans(d_row), input_precision="ieee")
            weights, d_scores = gradients_of(scores, d_weights, lse, constant, None, scale, softcap)
            v_total = tl.dot(weights.to(d_row.dtype), d_row, v_total, input_precision="ieee")
            k_total = tl.dot(d_scores.to(query.dtype), query, k_total, input_precision="ieee")

        for i in tl.range(tl.load(counts + 1) * STRIPS, num_stages=STAGES):
            entry = partial_blocks + i // STRIPS * 2
            row = (tl.load(entry) * STRIPS + i % STRIPS) * STRIP + lane
            used = row < rows
            if row_order is not None:
                row = tl.load(row_order + row, mask=used, other=0)
            query = load_rows(q, row, row, used, stride_q_row, 0, HEAD_DIM, BLOCK_D, UPCAST)
            d_row = load_rows(d_out, row, row, used, stride_d_out_row, 0, HEAD_DIM, BLOCK_D, UPCAST)
            if IS_SPOILT:
                query, d_row = finite_or_zero(query), finite_or_zero(d_row)
            lse = tl.load(row_lse + row, mask=used, other=float("inf"))[None, :]
            constant = tl.load(row_constant + row, mask=used, other=0.0)[None, :]
            scores = tl.dot(own_keys, tl.trans(query), input_precision="ieee")
            d_weights = tl.dot(values, tl.trans(d_row), input_precision="ieee")
            half = tl.load(entry + 1).to(tl.int64) * WORDS + i % STRIPS // 2
            half = half * (2 * TILE) + 2 * (first_key + tl.arange(0, KEYS)) + i % 2
            visible = ((tl.load(bits + half)[:, None] >> lane[None, :]) & 1) != 0
            weights, d_scores = gradients_of(scores, d_weights, lse, constant, visible, scale, softcap)
            v_total = tl.dot(weights.to(d_row.dtype), d_row, v_total, input_precision="ieee")
            k_total = tl.dot(d_scores.to(query.dtype), query, k_total, input_precision="ieee")

        q += stride_q_head
        d_out += stride_d_out_head
        row_lse += rows
        row_constant += rows
        if MASK_HEADS > 1:
            counts += tiles * 2
            full_blocks += tiles * blocks
            partial_blocks += tiles * blocks * 2
    return k_total, v_total
