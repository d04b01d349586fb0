"""block_masked_attention on the GPU: flash attention over the tiles that a mask has something in.

One work item is a row block of one head; or of two heads of a KV head, where the block has only 64 rows and the tensor
cores want 128; or a part of a row block, where more rows do not fit into registers. A grid of as many programs as the
GPU runs at a time goes through the items. Queries and online softmax stay in registers; full tiles come first and are
folded without mask or bounds, then partial ones, whose bits are one word of 64 rows for each key. Bound by the tensor
cores.
"""

import functools

import torch

import triton
import triton.language as tl
from pyspec.kernels.flash import LN_2, fold_keys, fold_values, load_rows

__all__ = ["block_masked_attention", "block_masked_attention_kernel", "compile_options", "program_rows"]

TILE = tl.constexpr(64)  # keys of a tile, and rows of a word of bits


@triton.jit
def slots_of(tile, wanted, key_order):
    """Where a tile's keys are."""
    slots = tile * TILE + tl.arange(0, TILE)
    if key_order is not None:
        slots = tl.load(key_order + slots) if wanted is None else tl.load(key_order + slots, mask=wanted, other=0)
    return slots


@triton.jit
def visible_of(words, lane, WORDS: tl.constexpr):
    """Which keys of a tile [TILE] the rows at lane [rows] of their block see; words: pointer to the tile's bits."""
    words += tl.arange(0, TILE)
    word = tl.load(words)[None, :]
    for index in tl.static_range(1, WORDS):
        word = tl.where((lane >= index * TILE)[:, None], tl.load(words + index * TILE)[None, :], word)
    return ((word >> (lane % TILE)[:, None]) & 1) != 0


@triton.jit
def add_not_finite(weighted, visible, values, is_high: tl.constexpr):
    """Adds infinities of one sign, and NaN as both, to the rows that see them and to no other."""
    limit = float("inf") if is_high else float("-inf")
    wide = values.to(tl.float32)
    found = ((wide == limit) | (wide != wide)).to(values.dtype)
    count = tl.dot(visible.to(values.dtype), found, input_precision="ieee")
    return weighted + tl.where(count > 0.0, limit, 0.0)


# The numbers of a call that change from mask to mask must not compile the kernel anew.
@triton.jit(do_not_specialize=["rows", "keys", "blocks", "items"])
def block_masked_attention_kernel(
    # Pointers
    q,  # [B, Hq, N, D]
    k,  # [B, Hkv, M, D]
    v,  # like k
    full_ranges,  # [B or 1, Hq or 1, blocks, 2]
    full_tiles,  # [F]
    partial_ranges,  # [B or 1, Hq or 1, blocks, 2]
    partial_tiles,  # [P, 2]
    bits,  # [U, WORDS, TILE] int64
    row_order,  # [B or 1, N] or None
    key_order,  # [B or 1, M] or None
    out,  # like q, written
    lse,  # [B, Hq, N], written
    # Sizes
    rows,
    keys,
    blocks,
    items,
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
    """Every work item; the rows of an item are those of its block for one head, then for the next."""
    HEIGHT: tl.constexpr = TILE * WORDS
    HEADS_FOLDED: tl.constexpr = (ROWS + HEIGHT - 1) // HEIGHT
    PARTS: tl.constexpr = (HEIGHT + ROWS - 1) // ROWS
    dims = tl.arange(0, BLOCK_D)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        block, outer = item % (blocks * PARTS) // PARTS, item // (blocks * PARTS)
        head = outer % (HEADS // HEADS_FOLDED) * HEADS_FOLDED
        batch = (outer // (HEADS // HEADS_FOLDED)).to(tl.int64)
        mask_batch = batch if MASK_BATCH > 1 else batch * 0
        mask_head = head if MASK_HEADS > 1 else 0
        lists = ((mask_batch * MASK_HEADS + mask_head) * blocks + block) * 2

        lane = item % (blocks * PARTS) % PARTS * ROWS + tl.arange(0, ROWS) % HEIGHT
        heads = head + tl.arange(0, ROWS) // HEIGHT
        row = block * HEIGHT + lane
        used = row < rows
        if row_order is not None:
            row = tl.load(row_order + mask_batch * rows + row, mask=used, other=0)
        order = None
        if key_order is not None:
            order = key_order + mask_batch * keys
        base = q + batch * stride_q_batch
        query = load_rows(base, heads, row, used, stride_q_head, stride_q_row, HEAD_DIM, BLOCK_D, UPCAST)
        k_base = k + batch * stride_k_batch + (head // GROUP).to(tl.int64) * stride_k_head
        v_base = v + batch * stride_v_batch + (head // GROUP).to(tl.int64) * stride_v_head

        largest = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        weighted = tl.zeros([ROWS, BLOCK_D], tl.float32)
        for i in range(tl.load(full_ranges + lists), tl.load(full_ranges + lists + 1)):
            slots = slots_of(tl.load(full_tiles + i), None, order)
            tile_keys = load_rows(k_base, slots, slots, None, stride_k_slot, 0, HEAD_DIM, BLOCK_D, UPCAST)
            largest, total, weights, keep = fold_keys(query, tile_keys, None, largest, total, scale, softcap)
            values = load_rows(v_base, slots, slots, None, stride_v_slot, 0, HEAD_DIM, BLOCK_D, UPCAST)
            weighted = fold_values(weights, keep, values, weighted)

        is_spoiled = tl.zeros([TILE], tl.int32)
        for i in range(tl.load(partial_ranges + lists), tl.load(partial_ranges + lists + 1)):
            tile = tl.load(partial_tiles + 2 * i)
            words = bits + tl.load(partial_tiles + 2 * i + 1).to(tl.int64) * (WORDS * TILE)
            visible = visible_of(words, lane, WORDS)
            wanted = tile * TILE + tl.arange(0, TILE) < keys
            slots = slots_of(tile, wanted, order)
            tile_keys = load_rows(k_base, slots, slots, wanted, stride_k_slot, 0, HEAD_DIM, BLOCK_D, UPCAST)
            largest, total, weights, keep = fold_keys(query, tile_keys, visible, largest, total, scale, softcap)
            values = load_rows(v_base, slots, slots, wanted, stride_v_slot, 0, HEAD_DIM, BLOCK_D, UPCAST)
            # A weight of 0 does not hide a value that is NaN or infinite: those come after the loop.
            is_finite = values.to(tl.float32) * 0.0 == 0.0
            is_spoiled = tl.maximum(is_spoiled, tl.max(1 - is_finite.to(tl.int32), 1))
            values = tl.where(is_finite, values, 0.0).to(values.dtype)
            weighted = fold_values(weights, keep, values, weighted)

        total = tl.where(total == 0.0, 1.0, total)  # saw nothing: 0 and -inf
        weighted = weighted / total[:, None]
        if tl.max(is_spoiled, 0) != 0:
            for i in range(tl.load(partial_ranges + lists), tl.load(partial_ranges + lists + 1)):
                tile = tl.load(partial_tiles + 2 * i)
                words = bits + tl.load(partial_tiles + 2 * i + 1).to(tl.int64) * (WORDS * TILE)
                wanted = tile * TILE + tl.arange(0, TILE) < keys
                slots = slots_of(tile, wanted, order)
                values = load_rows(v_base, slots, slots, wanted, stride_v_slot, 0, HEAD_DIM, BLOCK_D, UPCAST)
                visible = visible_of(words, lane, WORDS)
                weighted = add_not_finite(weighted, visible, values, True)
                weighted = add_not_finite(weighted, visible, values, False)

        result = weighted.to(out.dtype.element_ty)
        places = heads.to(tl.int64) * stride_out_head + row.to(tl.int64) * stride_out_row
        mask = used[:, None] & (dims < HEAD_DIM)[None, :]
        tl.store(out + batch * stride_out_batch + places[:, None] + dims[None, :], result, mask=mask)
        tl.store(lse + (batch * HEADS + heads) * rows + row, (largest + tl.log2(total)) * LN_2, mask=used)


# ==== launch ====


def program_rows(words: int, group: int, mask_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Rows of a work item: as many as fit into registers. fp32 is multiplied there, with operands of whole rows."""
    if dtype == torch.float32:
        return 16 if head_dim <= 64 else 8
    most = 128 if head_dim <= 64 else 64 if head_dim <= 128 else 32
    can_fold = group % 2 == 0 and mask_heads == 1
    return most if words == 2 or can_fold else min(most, 64)


def compile_options(head_dim: int, dtype: torch.dtype) -> dict:
    """Options of every number of rows."""
    row_bytes = triton.next_power_of_2(head_dim) * dtype.itemsize
    stages = max(1, min(3, 96 * 1024 // (2 * TILE.value * row_bytes)))  # tiles of keys and values on their way
    return {"num_warps": 8, "num_stages": stages, "enable_fp_fusion": True}  # no promise about bits needs it off


@functools.cache
def _programs(device: torch.device) -> int:
    """Programs that run at a time: two on each multiprocessor."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


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
    item_rows = program_rows(words, group, mask_heads, head_dim, q.dtype)
    items = batch * heads * blocks * words * TILE.value // item_rows
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
    lists = (full_ranges, full_tiles, partial_ranges, partial_tiles, bits, row_order, key_order)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3])
    with torch.cuda.device_of(q):
        block_masked_attention_kernel[(min(items, _programs(q.device)),)](
            *(q, k, v, *lists, out, lse, rows, k.shape[2], blocks, items, scale, softcap, *strides),
            **constants,
            **compile_options(head_dim, q.dtype),
        )
    return out, lse
