"""The backward of block_masked_attention on the GPU: two kernels, no atomics, so that no bit depends on their order.

The first has some rows of a head: queries and their d_out stay, keys and values are streamed past them, and dq is
summed in registers. It also writes what the second needs of a row, its lse and its constant. The second has a key tile
of a KV head: keys and values stay, queries and d_out of all rows that see them are streamed past, of one query head
after another, and dk and dv are summed in registers. Both compute the weights anew from lse: together seven products
of a tile where the forward has two. Bound by the tensor cores.

A weight of 0 hides nothing that is not finite. Sums that come out so are summed again, with zeros for such numbers in
partial tiles; of a row that has some, lse is made NaN, which the keys that it sees get to feel and no others.
"""

import torch

import triton
import triton.language as tl
from pyspec.kernels.block_masked_attention import TILE
from pyspec.kernels.block_masked_attention_gradients import not_finite, store_rows, sum_over_keys, sum_over_rows
from pyspec.kernels.flash import LOG2_E, load_rows
from pyspec.kernels.lists_by_key import lists_by_key

__all__ = [
    "block_masked_attention_backward",
    "compile_options",
    "item_size",
    "key_kernel",
    "query_kernel",
]

# ==== dq ====


# The numbers of a call that change from mask to mask must not compile the kernel anew.
@triton.jit(do_not_specialize=["rows", "keys", "blocks"])
def query_kernel(
    # Pointers
    d_out,  # [B, Hq, N, D]
    d_lse,  # [B, Hq, N] or None
    q,  # [B, Hq, N, D]
    k,  # [B, Hkv, M, D]
    v,  # like k
    out,  # like q
    lse,  # [B, Hq, N]
    full_ranges,  # [B or 1, Hq or 1, blocks, 2]
    full_tiles,  # [F]
    partial_ranges,  # [B or 1, Hq or 1, blocks, 2]
    partial_tiles,  # [P, 2]
    bits,  # [U, WORDS, TILE, 2] int32, the halves of words of 64 rows
    row_order,  # [B or 1, N] or None
    key_order,  # [B or 1, M] or None
    d_q,  # like q, written
    row_lse,  # [B, Hq, N], written: in units of log2, inf where a row sees nothing, NaN where it is not finite
    row_constant,  # [B, Hq, N], written
    # Sizes
    rows,
    keys,
    blocks,
    # Scores
    scale,
    softcap,
    # Strides
    stride_d_out_batch,
    stride_d_out_head,
    stride_d_out_row,
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
    stride_d_q_batch,
    stride_d_q_head,
    stride_d_q_row,
    # Constants
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,  # of an item: a part of the block
    MASK_BATCH: tl.constexpr,  # 1, or the batch
    MASK_HEADS: tl.constexpr,
    WORDS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Some rows of a row block of a head."""
    PARTS: tl.constexpr = TILE * WORDS // ROWS
    part = tl.num_programs(0) - 1 - tl.program_id(0)  # the last rows of a causal mask have most to do: they start first
    block, first_lane = part // PARTS, part % PARTS * ROWS
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    mask_batch = batch if MASK_BATCH > 1 else batch * 0
    lists = ((mask_batch * MASK_HEADS + (head if MASK_HEADS > 1 else 0)) * blocks + block) * 2

    row = part * ROWS + tl.arange(0, ROWS)
    used = row < rows
    if row_order is not None:
        row = tl.load(row_order + mask_batch * rows + row, mask=used, other=0)
    order = None
    if key_order is not None:
        order = key_order + mask_batch * keys
    q += batch * stride_q_batch + head.to(tl.int64) * stride_q_head
    d_out += batch * stride_d_out_batch + head.to(tl.int64) * stride_d_out_head
    out += batch * stride_out_batch + head.to(tl.int64) * stride_out_head
    k += batch * stride_k_batch + (head // GROUP).to(tl.int64) * stride_k_head
    v += batch * stride_v_batch + (head // GROUP).to(tl.int64) * stride_v_head
    query = load_rows(q, row, row, used, stride_q_row, 0, HEAD_DIM, BLOCK_D, UPCAST)
    d_row = load_rows(d_out, row, row, used, stride_d_out_row, 0, HEAD_DIM, BLOCK_D, UPCAST)
    result = load_rows(out, row, row, used, stride_out_row, 0, HEAD_DIM, BLOCK_D, UPCAST)

    of_row = (batch * tl.num_programs(1) + head) * rows + row
    constant = tl.sum(d_row.to(tl.float32) * result.to(tl.float32), 1)
    if d_lse is not None:
        constant -= tl.load(d_lse + of_row, mask=used, other=0.0)
    zeros = tl.sum(query.to(tl.float32) * 0.0 + d_row.to(tl.float32) * 0.0, 1)  # or NaN
    log_sum = tl.load(lse + of_row, mask=used, other=float("-inf")) * LOG2_E
    log_sum = tl.where(log_sum == float("-inf"), float("inf"), log_sum) + zeros
    tl.store(row_lse + of_row, log_sum, mask=used)
    tl.store(row_constant + of_row, constant, mask=used)
    log_sum, constant = log_sum[:, None], constant[:, None]

    full_ranges += lists
    partial_ranges += lists
    d_q += batch * stride_d_q_batch + head.to(tl.int64) * stride_d_q_head
    total = sum_over_keys(
        *(query, d_row, log_sum, constant, k, v, full_ranges, full_tiles, partial_ranges, partial_tiles, bits),
        order,
        *(keys, scale),
        softcap,
        *(stride_k_slot, stride_v_slot, first_lane, WORDS, HEAD_DIM, UPCAST, False),
    )
    store_rows(d_q, row, stride_d_q_row, total * scale, used, HEAD_DIM, BLOCK_D)
    if not_finite(total):
        total = sum_over_keys(
            *(query, d_row, log_sum, constant, k, v, full_ranges, full_tiles, partial_ranges, partial_tiles, bits),
            order,
            *(keys, scale),
            softcap,
            *(stride_k_slot, stride_v_slot, first_lane, WORDS, HEAD_DIM, UPCAST, True),
        )
        store_rows(d_q, row, stride_d_q_row, total * scale, used, HEAD_DIM, BLOCK_D)


# ==== dk and dv ====


@triton.jit(do_not_specialize=["rows", "keys", "blocks"])
def key_kernel(
    # Pointers
    d_out,  # [B, Hq, N, D]
    q,  # [B, Hq, N, D]
    k,  # [B, Hkv, M, D]
    v,  # like k
    row_lse,  # [B, Hq, N], of query_kernel
    row_constant,  # [B, Hq, N]
    counts,  # [B or 1, Hq or 1, tiles, 2], of lists_by_key
    full_blocks,  # [B or 1, Hq or 1, tiles, blocks]
    partial_blocks,  # [B or 1, Hq or 1, tiles, blocks, 2]
    bits,  # [U, WORDS, TILE, 2] int32, the halves of words of 64 rows
    row_order,  # [B or 1, N] or None
    key_order,  # [B or 1, M] or None
    d_k,  # like k, written
    d_v,  # like k, written
    # Sizes
    rows,
    keys,
    blocks,
    # Scores
    scale,
    softcap,
    # Strides
    stride_d_out_batch,
    stride_d_out_head,
    stride_d_out_row,
    stride_q_batch,
    stride_q_head,
    stride_q_row,
    stride_k_batch,
    stride_k_head,
    stride_k_slot,
    stride_v_batch,
    stride_v_head,
    stride_v_slot,
    stride_d_k_batch,
    stride_d_k_head,
    stride_d_k_slot,
    stride_d_v_batch,
    stride_d_v_head,
    stride_d_v_slot,
    # Constants
    GROUP: tl.constexpr,
    KEYS: tl.constexpr,  # of an item: a part of the tile
    MASK_BATCH: tl.constexpr,
    MASK_HEADS: tl.constexpr,
    WORDS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Some keys of a tile of a KV head; rows come by halves of words, as columns."""
    PARTS: tl.constexpr = TILE // KEYS
    tile, first_key = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS * KEYS
    kv_head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    tiles = tl.num_programs(0) // PARTS
    mask_batch = batch if MASK_BATCH > 1 else batch * 0
    slots = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    wanted = slots < keys
    if key_order is not None:
        slots = tl.load(key_order + mask_batch * keys + slots, mask=wanted, other=0)
    k += batch * stride_k_batch + kv_head.to(tl.int64) * stride_k_head
    v += batch * stride_v_batch + kv_head.to(tl.int64) * stride_v_head
    own_keys = load_rows(k, slots, slots, wanted, stride_k_slot, 0, HEAD_DIM, BLOCK_D, UPCAST)
    values = load_rows(v, slots, slots, wanted, stride_v_slot, 0, HEAD_DIM, BLOCK_D, UPCAST)

    head = kv_head * GROUP
    lists = (mask_batch * MASK_HEADS + (head if MASK_HEADS > 1 else 0)) * tiles + tile
    counts += 2 * lists
    full_blocks += lists * blocks
    partial_blocks += lists * blocks * 2
    of_head = (batch * tl.num_programs(1) * GROUP + head) * rows
    row_lse += of_head
    row_constant += of_head
    q += batch * stride_q_batch + head.to(tl.int64) * stride_q_head
    d_out += batch * stride_d_out_batch + head.to(tl.int64) * stride_d_out_head
    order = None
    if row_order is not None:
        order = row_order + mask_batch * rows
    d_k += batch * stride_d_k_batch + kv_head.to(tl.int64) * stride_d_k_head
    d_v += batch * stride_d_v_batch + kv_head.to(tl.int64) * stride_d_v_head
    k_total, v_total = sum_over_rows(
        *(own_keys, values, d_out, q, row_lse, row_constant, counts, full_blocks, partial_blocks, bits),
        order,
        *(rows, blocks, tiles, scale),
        softcap,
        *(stride_d_out_head, stride_d_out_row, stride_q_head, stride_q_row, first_key),
        *(GROUP, MASK_HEADS, WORDS, HEAD_DIM, UPCAST, False),
    )
    store_rows(d_k, slots, stride_d_k_slot, k_total * scale, wanted, HEAD_DIM, BLOCK_D)
    store_rows(d_v, slots, stride_d_v_slot, v_total, wanted, HEAD_DIM, BLOCK_D)
    if not_finite(k_total) | not_finite(v_total):
        k_total, v_total = sum_over_rows(
            *(own_keys, values, d_out, q, row_lse, row_constant, counts, full_blocks, partial_blocks, bits),
            order,
            *(rows, blocks, tiles, scale),
            softcap,
            *(stride_d_out_head, stride_d_out_row, stride_q_head, stride_q_row, first_key),
            *(GROUP, MASK_HEADS, WORDS, HEAD_DIM, UPCAST, True),
        )
        store_rows(d_k, slots, stride_d_k_slot, k_total * scale, wanted, HEAD_DIM, BLOCK_D)
        store_rows(d_v, slots, stride_d_v_slot, v_total, wanted, HEAD_DIM, BLOCK_D)


# ==== launch ====


def item_size(head_dim: int, dtype: torch.dtype) -> int:
    """Rows of an item of query_kernel and keys of one of key_kernel: as many as fit into registers."""
    if dtype == torch.float32:  # is multiplied there, with operands of whole rows
        return 16 if head_dim <= 64 else 8
    return 64 if head_dim <= 128 else 32


def compile_options(head_dim: int, dtype: torch.dtype) -> tuple[dict, dict]:
    """Of query_kernel and key_kernel. Four warps are what a row of tensor cores' 64 rows takes."""
    warps = 8 if dtype == torch.float32 or head_dim > 128 else 4
    if head_dim <= 128:
        stages = (3, 3) if head_dim <= 64 and dtype != torch.float32 else (2, 2)
    else:
        stages = (1, 1 if dtype == torch.float32 else 2)
    of_query, of_key = ({"num_warps": warps, "num_stages": n, "enable_fp_fusion": True} for n in stages)
    return of_query, of_key


def block_masked_attention_backward(
    d_out,
    d_lse,
    q,
    k,
    v,
    out,
    lse,
    full_ranges,
    full_tiles,
    partial_ranges,
    partial_tiles,
    bits,
    row_order,
    key_order,
    scale,
    softcap,
):
    """Launches the kernels; arguments and results of torch.ops.pyspec.block_masked_attention_backward.

    Nothing waits for the device and the grids come from shapes alone, so a CUDA graph can capture the call.
    """
    batch, heads, rows, head_dim = q.shape
    kv_heads, keys = k.shape[1:3]
    mask_batch, mask_heads, blocks = full_ranges.shape[:3]
    words, tiles, halves = bits.shape[1], triton.cdiv(keys, TILE.value), bits.view(torch.int32)
    d_q, d_k, d_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if not (q.numel() and k.numel()):
        return d_q.zero_(), d_k.zero_(), d_v.zero_()
    if d_out.stride(3) != 1:  # of a sum, say: one number for all
        d_out = d_out.contiguous()
    d_lse = None if d_lse is None else d_lse.contiguous()
    size = item_size(head_dim, q.dtype)
    of_query, of_key = compile_options(head_dim, q.dtype)
    row_lse, row_constant = torch.empty_like(lse), torch.empty_like(lse)
    lists = (full_ranges, full_tiles, partial_ranges, partial_tiles)
    constants = {
        "GROUP": heads // kv_heads,
        "MASK_BATCH": mask_batch,
        "MASK_HEADS": mask_heads,
        "WORDS": words,
        "HEAD_DIM": head_dim,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "UPCAST": not q.is_cuda and q.dtype == torch.bfloat16,  # the interpreter computes on the bits of bf16
    }
    sizes = (rows, keys, blocks, scale, softcap)
    inputs = (*d_out.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    with torch.cuda.device_of(q):
        by_key = lists_by_key(*lists, tiles)
        query_kernel[(blocks * words * TILE.value // size, heads, batch)](
            *(d_out, d_lse, q, k, v, out, lse, *lists, halves, row_order, key_order, d_q, row_lse, row_constant),
            *(*sizes, *inputs, *out.stride()[:3], *d_q.stride()[:3]),
            ROWS=size,
            **constants,
            **of_query,
        )
        key_kernel[(tiles * (TILE.value // size), kv_heads, batch)](
            *(d_out, q, k, v, row_lse, row_constant, *by_key, halves, row_order, key_order, d_k, d_v),
            *(*sizes, *inputs, *d_k.stride()[:3], *d_v.stride()[:3]),
            KEYS=size,
            **constants,
            **of_key,
        )
    return d_q, d_k, d_v
