"""block_masked_attention on the GPU: flash attention over the tiles that a mask has something in.

One program per work item: a row block of one head; or of two heads of a KV head, where the block has only 64 rows and
the tensor cores want 128; or a part of a row block, where more rows do not fit into registers. Weights, online softmax
and weighted values stay in registers; tiles of keys and values are streamed past them through shared memory, two ahead
where they fit. Full tiles come first and are folded without mask or bounds, then partial ones, whose bits are one word
of 64 rows for each key. Bound by the tensor cores and, with narrow heads, as much by the powers of 2.
"""

import functools

import torch

import triton
import triton.language as tl
from pyspec.kernels.flash import LN_2, LOG2_E, fold_values, load_rows

__all__ = ["block_masked_attention", "block_masked_attention_kernel", "compile_options", "program_rows"]

TILE = tl.constexpr(64)  # keys of a tile, and rows of a word of bits
LARGE = 200 * 1024  # bytes of shared memory of GPUs whose tensor cores read operands there, not in registers


@triton.jit
def slots_of(tile, wanted, key_order):
    """Where a tile's keys are."""
    slots = tile * TILE + tl.arange(0, TILE)
    if key_order is not None:
        slots = tl.load(key_order + slots) if wanted is None else tl.load(key_order + slots, mask=wanted, other=0)
    return slots


@triton.jit
def visible_of(words, first_lane, ROWS: tl.constexpr, HEIGHT: tl.constexpr):
    """Which keys of a tile [TILE] an item's rows [ROWS] see; words: pointer to the tile's bits, as halves of words."""
    STRIP: tl.constexpr = min(ROWS, 32)  # rows that share a half
    lane = first_lane + tl.arange(0, ROWS // STRIP) * STRIP % HEIGHT
    halves = words + lane // TILE * (2 * TILE) + lane // 32 % 2
    half = tl.load(halves[:, None, None] + 2 * tl.arange(0, TILE)[None, None, :])
    bit = 1 << ((first_lane + tl.arange(0, STRIP)) % 32)
    return tl.reshape(half & bit[None, :, None], [ROWS, TILE]) != 0


@triton.jit
def scores_of(query, keys, scale, softcap):
    """Of a tile, in units of 1 / scale; of 1 with a softcap."""
    scores = tl.dot(query, tl.trans(keys), input_precision="ieee")
    if softcap is not None:  # softcap * tanh(x / softcap) with tanh(y) = 1 - 2 / (1 + e^2y)
        scores = softcap * (1.0 - 2.0 / (1.0 + tl.exp2(scores * (scale * (2.0 * LOG2_E) / softcap))))
    return scores


@triton.jit
def fold_scores(scores, largest, total, factor):
    """Largest and total of the rows, weights [rows, tile], and what the earlier weighted values are multiplied by.

    Scores are in units of 1 / factor of log2, so that a weight is one multiply-add and one power of 2.
    """
    now = tl.maximum(largest, tl.max(scores, 1))
    shift = tl.where(now == float("-inf"), 0.0, now) * factor  # a row that has seen no key yet: all weights 0
    keep = tl.exp2(largest * factor - shift)
    weights = tl.exp2(scores * factor - shift[:, None])
    return now, total * keep + tl.sum(weights, 1), weights, keep


@triton.jit
def add_not_finite(weighted, visible, values, is_high: tl.constexpr):
    """Adds infinities of one sign, and NaN as both, to the rows that see them and to no other."""
    limit = float("inf") if is_high else float("-inf")
    wide = values.to(tl.float32)
    found = tl.where((wide == limit) | (wide != wide), 1.0, 0.0).to(values.dtype)
    count = tl.dot(tl.where(visible, 1.0, 0.0).to(values.dtype), found, input_precision="ieee")
    return weighted + tl.where(count > 0.0, limit, 0.0)


# The numbers of a call that change from mask to mask must not compile the kernel anew.
@triton.jit(do_not_specialize=["rows", "keys", "blocks"])
def block_masked_attention_kernel(
    # Pointers
    q,  # [B, Hq, N, D]
    k,  # [B, Hkv, M, D]
    v,  # like k
    full_ranges,  # [B or 1, Hq or 1, blocks, 2]
    full_tiles,  # [F]
    partial_ranges,  # [B or 1, Hq or 1, blocks, 2]
    partial_tiles,  # [P, 2]
    bits,  # [U, WORDS, TILE, 2] int32, the halves of words of 64 rows
    row_order,  # [B or 1, N] or None
    key_order,  # [B or 1, M] or None
    out,  # like q, written
    lse,  # [B, Hq, N], written
    # Sizes
    rows,
    keys,
    blocks,
    # Scores
    scale,
    softcap,
    # Strides
    stride_q_batch,
    stride_q_head,
    stride_q_row,
    stride_k_batch,
    stride_k_head,
    stride_k_slot,
    stride_v_batch,
    stride_v_head,
    stride_v_slot,
    stride_out_batch,
    stride_out_head,
    stride_out_row,
    # Constants
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,  # of an item: those of some heads, or a part of the block
    MASK_BATCH: tl.constexpr,  # 1, or the batch
    MASK_HEADS: tl.constexpr,
    WORDS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One work item; its rows are those of its block for one head, then for the next."""
    HEIGHT: tl.constexpr = TILE * WORDS
    HEADS_FOLDED: tl.constexpr = (ROWS + HEIGHT - 1) // HEIGHT
    PARTS: tl.constexpr = (HEIGHT + ROWS - 1) // ROWS
    part = tl.num_programs(0) - 1 - tl.program_id(0)  # the last rows of a causal mask have most to do: they start first
    block, first_lane = part // PARTS, part % PARTS * ROWS
    head, batch = tl.program_id(1) * HEADS_FOLDED, tl.program_id(2).to(tl.int64)
    mask_batch = batch if MASK_BATCH > 1 else batch * 0
    mask_head = head if MASK_HEADS > 1 else 0
    lists = ((mask_batch * MASK_HEADS + mask_head) * blocks + block) * 2

    heads = head + tl.arange(0, ROWS) // HEIGHT
    row = block * HEIGHT + first_lane + tl.arange(0, ROWS) % HEIGHT
    used = row < rows
    if row_order is not None:
        row = tl.load(row_order + mask_batch * rows + row, mask=used, other=0)
    order = None
    if key_order is not None:
        order = key_order + mask_batch * keys
    base = q + batch * stride_q_batch
    query = load_rows(base, heads, row, used, stride_q_head, stride_q_row, HEAD_DIM, BLOCK_D, UPCAST)
    k += batch * stride_k_batch + (head // GROUP).to(tl.int64) * stride_k_head
    v += batch * stride_v_batch + (head // GROUP).to(tl.int64) * stride_v_head
    factor = scale * LOG2_E if softcap is None else LOG2_E

    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for i in range(tl.load(full_ranges + lists), tl.load(full_ranges + lists + 1)):
        slots = slots_of(tl.load(full_tiles + i), None, order)
        tile_keys = load_rows(k, slots, slots, None, stride_k_slot, 0, HEAD_DIM, BLOCK_D, UPCAST)
        scores = scores_of(query, tile_keys, scale, softcap)
        largest, total, weights, keep = fold_scores(scores, largest, total, factor)
        values = load_rows(v, slots, slots, None, stride_v_slot, 0, HEAD_DIM, BLOCK_D, UPCAST)
        weighted = fold_values(weights, keep, values, weighted)

    spoiled = tl.zeros([TILE], tl.float32)
    for i in range(tl.load(partial_ranges + lists), tl.load(partial_ranges + lists + 1)):
        tile = tl.load(partial_tiles + 2 * i)
        words = bits + tl.load(partial_tiles + 2 * i + 1).to(tl.int64) * (2 * WORDS * TILE)
        wanted = tile * TILE + tl.arange(0, TILE) < keys
        slots = slots_of(tile, wanted, order)
        tile_keys = load_rows(k, slots, slots, wanted, stride_k_slot, 0, HEAD_DIM, BLOCK_D, UPCAST)
        scores = scores_of(query, tile_keys, scale, softcap)
        scores = tl.where(visible_of(words, first_lane, ROWS, HEIGHT), scores, float("-inf"))
        largest, total, weights, keep = fold_scores(scores, largest, total, factor)
        values = load_rows(v, slots, slots, wanted, stride_v_slot, 0, HEAD_DIM, BLOCK_D, UPCAST)
        # A weight of 0 does not hide a value that is NaN or infinite: those come after the loop.
        zeros = values.to(tl.float32) * 0.0  # or NaN
        spoiled += tl.sum(zeros, 1)
        values = tl.where(zeros == 0.0, values, 0.0).to(values.dtype)
        weighted = fold_values(weights, keep, values, weighted)

    total = tl.where(total == 0.0, 1.0, total)  # saw nothing: 0 and -inf
    weighted = weighted / total[:, None]
    if tl.sum(spoiled, 0) != 0.0:
        for i in range(tl.load(partial_ranges + lists), tl.load(partial_ranges + lists + 1)):
            tile = tl.load(partial_tiles + 2 * i)
            words = bits + tl.load(partial_tiles + 2 * i + 1).to(tl.int64) * (2 * WORDS * TILE)
            wanted = tile * TILE + tl.arange(0, TILE) < keys
            slots = slots_of(tile, wanted, order)
            values = load_rows(v, slots, slots, wanted, stride_v_slot, 0, HEAD_DIM, BLOCK_D, UPCAST)
            visible = visible_of(words, first_lane, ROWS, HEIGHT)
            weighted = add_not_finite(weighted, visible, values, True)
            weighted = add_not_finite(weighted, visible, values, False)

    dims = tl.arange(0, BLOCK_D)
    result = weighted.to(out.dtype.element_ty)
    places = heads.to(tl.int64) * stride_out_head + row.to(tl.int64) * stride_out_row
    mask = used[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(out + batch * stride_out_batch + places[:, None] + dims[None, :], result, mask=mask)
    tl.store(lse + (batch * HEADS + heads) * rows + row, (largest * factor + tl.log2(total)) * LN_2, mask=used)


# ==== launch ====


def program_rows(words: int, group: int, mask_heads: int, head_dim: int, dtype: torch.dtype, shared: int) -> int:
    """Rows of a work item: as many as fit into registers. fp32 is multiplied there, with operands of whole rows."""
    if dtype == torch.float32:
        return 16 if head_dim <= 64 else 8
    most = 128 if head_dim <= 64 or (head_dim <= 128 and shared >= LARGE) else 64 if head_dim <= 128 else 32
    can_fold = group % 2 == 0 and mask_heads == 1
    return most if words == 2 or can_fold else min(most, 64)


def compile_options(rows: int, head_dim: int, dtype: torch.dtype, shared: int) -> dict:
    """shared: bytes of shared memory that a program may have, where tiles ahead of the one that is folded arrive."""
    row_bytes = triton.next_power_of_2(head_dim) * dtype.itemsize
    room = shared - rows * row_bytes - 3072  # queries; bits and numbers of tiles
    ahead = max(0, min(2, room // (2 * TILE.value * row_bytes) - 1))
    options = {"num_warps": 8, "num_stages": 2 * ahead + 1}  # of two loads in series: a tile's number, then the tile
    if dtype != torch.float32 and head_dim <= 64 and shared >= LARGE:
        # Two programs on a multiprocessor: one's products run beside the other's softmax. With heads of 128 an H200
        # gains nothing by it for short documents, neither with 128 registers nor with 64 rows: 45 microseconds, not 43.
        options["maxnreg"] = 128
    return {**options, "enable_fp_fusion": True}  # no promise about bits needs it off


@functools.cache
def _shared_memory(device: torch.device) -> int:
    return triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"]


def block_masked_attention(
    q, k, v, full_ranges, full_tiles, partial_ranges, partial_tiles, bits, row_order, key_order, scale, softcap
):
    """Launches the kernel; arguments and results of torch.ops.pyspec.block_masked_attention.

    Nothing waits for the device and the grid comes from shapes alone, so a CUDA graph can capture the call.
    """
    batch, heads, rows, head_dim = q.shape
    group = heads // k.shape[1]
    mask_batch, mask_heads, blocks = full_ranges.shape[:3]
    words = bits.shape[1]
    out = torch.empty_like(q)
    lse = q.new_empty((batch, heads, rows), dtype=torch.float32)
    if not out.numel():
        return out, lse
    shared = _shared_memory(q.device) if q.is_cuda else LARGE
    item_rows = program_rows(words, group, mask_heads, head_dim, q.dtype, shared)
    height = words * TILE.value
    constants = {
        "HEADS": heads,
        "GROUP": group,
        "ROWS": item_rows,
        "MASK_BATCH": mask_batch,
        "MASK_HEADS": mask_heads,
        "WORDS": words,
        "HEAD_DIM": head_dim,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "UPCAST": not q.is_cuda and q.dtype == torch.bfloat16,  # the interpreter computes on the bits of bf16
    }
    grid = (blocks * triton.cdiv(height, item_rows), heads // triton.cdiv(item_rows, height), batch)
    lists = (full_ranges, full_tiles, partial_ranges, partial_tiles, bits.view(torch.int32), row_order, key_order)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3])
    with torch.cuda.device_of(q):
        block_masked_attention_kernel[grid](
            *(q, k, v, *lists, out, lse, rows, k.shape[2], blocks, scale, softcap, *strides),
            **constants,
            **compile_options(item_rows, head_dim, q.dtype, shared),
        )
    return out, lse
