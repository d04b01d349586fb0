"""Attention to quantised keys and values on the GPU: split flash attention whose tiles are unpacked in registers.

One program per (16 query rows, chunk of records, KV head of a sequence). A thread loads words of 4 bytes, each once,
and makes two fp16 numbers of one at a time, as fp16 arithmetic comes: a code stays where it lies, an exponent is put
above it. x = zero + scale * code goes to the tensor cores through shared memory, with queries and weights in fp16 too,
whose 11 bits are more than those of bf16; in fp32 for queries in fp32. Keys are unpacked as [channels, tokens] and
values as [tokens, channels], so that both are vectors with scales and outliers of their own, [vectors, places].
An outlier's place, 16 * block + j, is one-hot in two parts: two multiply-adds for a pair of numbers put it in.
Low rank never meets the tile: scores get (q . b) a, and outputs (weights . a) b.
Bound by instructions, as many for outliers as for all else; records are read once.
A second kernel merges the chunks of a row, many at a time.
Row rule: a tile is folded alike for any number of rows; a row that does not see a record, or a token before its oldest,
gets weights of 0 from it, which change no bit. Chunks are cut at positions. kernels/params/gear.h has the layout of a
record.
"""

import torch

import triton
import triton.language as tl
from pyspec.kernels.flash import LN_2, LOG2_E, load_rows
from pyspec.kernels.gear_records import BLOCK, PART_OF_X, load_low_rank, load_tile

__all__ = ["compile_options", "fold_constants", "fold_kernel", "gear", "merge_kernel"]

ROWS = tl.constexpr(16)  # query rows of a program: the smallest tensor-core tile
CHUNK_BLOCKS = tl.constexpr(4)  # records of a chunk, folded in order; chunks are then merged
SHORT_CHUNKS = tl.constexpr(32)  # the first, of one record, so that a short text is shared out too
MERGED = tl.constexpr(32)  # chunks merged at a time
LARGEST = tl.constexpr(65504.0)  # of fp16


# ==== kernels ====


@triton.jit
def first_block(chunk):
    return tl.minimum(chunk, SHORT_CHUNKS) + tl.maximum(chunk - SHORT_CHUNKS, 0) * CHUNK_BLOCKS


@triton.jit
def begin_of_windows(first, oldest, nodes, row_seen):
    """The first record, from `first` on, that a row sees, and the first token that each row sees."""
    row_oldest = row_seen * 0
    if oldest is not None:
        row_oldest = tl.load(oldest + nodes, mask=row_seen > 0, other=2**31 - 1)
        first = tl.maximum(first, tl.min(row_oldest, 0) // BLOCK)
    return first, row_oldest


@triton.jit
def within_windows(scores, oldest, row_oldest, first_token, TILE: tl.constexpr):
    if oldest is not None:
        token = first_token + tl.arange(0, TILE)
        scores = tl.where(token[None, :] >= row_oldest[:, None], scores, float("-inf"))
    return scores


@triton.jit
def scaled(query, scale, NUMBER: tl.constexpr):
    """Queries whose products with PART_OF_X of the keys are scores in units of log2."""
    query = query.to(tl.float32) * (scale * (LOG2_E / PART_OF_X))
    if NUMBER == tl.float16:
        query = tl.clamp(query, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    return query.to(NUMBER)


@triton.jit
def own_channels(q, query_rows, used, channels, scale, KEY_DIM, BLOCK_K: tl.constexpr, HEAD_DIM, NUMBER: tl.constexpr):
    """Queries [ROWS, BLOCK_K] in the channels that a record's keys have; channels points to their numbers."""
    dims = tl.arange(0, BLOCK_K)
    channels = tl.load(channels + dims, mask=dims < KEY_DIM, other=255).to(tl.int32)
    mask = used[:, None] & (channels < HEAD_DIM)[None, :]
    return scaled(tl.load(q + query_rows[:, None] + channels[None, :], mask=mask, other=0.0), scale, NUMBER)


@triton.jit(do_not_specialize=["nodes", "chunks"])
def fold_kernel(
    # Pointers
    q,  # [B, Hq, T, D], turned where the keys are
    quantised,  # [B, Hkv, blocks, record] uint8
    seen,  # [B, T]
    oldest,  # [B, T], the first token that a node sees, or None
    chunk_largest,  # [B, Hkv, chunks, T * heads of a group], written
    chunk_total,  # [B, Hkv, chunks, T * heads of a group], written
    chunk_weighted,  # [B, Hkv, chunks, T * heads of a group, D], written
    # Sizes
    nodes,
    chunks,
    # Scores
    scale,
    # Strides
    stride_q_batch,
    stride_q_head,
    stride_q_node,
    stride_quantised_batch,
    stride_quantised_head,
    stride_quantised_block,
    # Constants
    KV_HEADS: tl.constexpr,
    GROUP_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KEY_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    VALUE_SIDE: tl.constexpr,
    TILE: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    RANK: tl.constexpr,
    OUTLIERS: tl.constexpr,
    NUMBER: tl.constexpr,
):
    """Folds one chunk of records into the states of 16 rows; row r is node r // heads of a group."""
    chunk, batch, kv_head = tl.program_id(1), tl.program_id(2) // KV_HEADS, tl.program_id(2) % KV_HEADS
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    used = rows < nodes * GROUP_HEADS
    node = tl.minimum(rows // GROUP_HEADS, nodes - 1)
    row_seen = tl.load(seen + batch * nodes + node, mask=used, other=0)
    first = first_block(chunk)
    end = tl.minimum(first_block(chunk + 1), tl.max(row_seen, 0))
    first, row_oldest = begin_of_windows(first, oldest, batch * nodes + node, row_seen)
    if first >= end:
        return  # no row reads this chunk

    q, head = q + batch.to(tl.int64) * stride_q_batch, kv_head * GROUP_HEADS + rows % GROUP_HEADS
    query_rows = head.to(tl.int64) * stride_q_head + node.to(tl.int64) * stride_q_node
    query = load_rows(q, head, node, used, stride_q_head, stride_q_node, HEAD_DIM, BLOCK_D, False)
    query = scaled(query, scale, NUMBER)
    quantised += batch.to(tl.int64) * stride_quantised_batch + kv_head.to(tl.int64) * stride_quantised_head
    PARTS: tl.constexpr = BLOCK // TILE
    # Where low rank begins.
    FACTOR_K: tl.constexpr = 4 * (BLOCK // GROUP) * KEY_DIM + 16 * KEY_DIM * BITS
    FACTOR_V: tl.constexpr = 4 * (HEAD_DIM // GROUP if GROUP < HEAD_DIM else 1) * BLOCK + 16 * HEAD_DIM * BITS
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for block in range(first, end):
        keys_side = quantised + block * stride_quantised_block.to(tl.int64)
        values_side, own = keys_side + VALUE_SIDE, keys_side + (VALUE_SIDE - KEY_DIM)
        if KEY_DIM < HEAD_DIM:  # the record's own channels, which end its keys
            gathered = own_channels(q, query_rows, used, own, scale, KEY_DIM, BLOCK_K, HEAD_DIM, NUMBER)
        else:
            gathered = query
        for part in range(PARTS):
            keys = load_tile(keys_side, part, KEY_DIM, BLOCK_K, TILE, BITS, GROUP, RANK, OUTLIERS, False, NUMBER)
            scores = tl.dot(gathered, keys, input_precision="ieee")
            if RANK:
                factor, a, b = load_low_rank(keys_side + FACTOR_K, part, KEY_DIM, BLOCK_K, TILE, RANK, NUMBER)
                along = tl.dot(gathered, tl.trans(b), input_precision="ieee") * factor[None, :]
                scores = tl.dot(along.to(NUMBER), a, scores, input_precision="ieee")
            scores = tl.where((block < row_seen)[:, None], scores, float("-inf"))
            scores = within_windows(scores, oldest, row_oldest, block * BLOCK + part * TILE, TILE)

            now = tl.maximum(largest, tl.max(scores, 1))
            shift = tl.where(now == float("-inf"), 0.0, now)  # a row that has seen no key yet: all weights 0
            keep = tl.exp2(largest - shift)
            weights = tl.exp2(scores - shift[:, None])
            largest, total = now, total * keep + tl.sum(weights, 1)

            weights = weights.to(NUMBER)
            values = load_tile(values_side, part, HEAD_DIM, BLOCK_D, TILE, BITS, GROUP, RANK, OUTLIERS, True, NUMBER)
            weighted = tl.dot(weights, values, weighted * keep[:, None], input_precision="ieee")
            if RANK:
                factor, a, b = load_low_rank(values_side + FACTOR_V, part, HEAD_DIM, BLOCK_D, TILE, RANK, NUMBER)
                along = tl.dot(weights, tl.trans(a), input_precision="ieee") * factor[None, :]
                weighted = tl.dot(along.to(NUMBER), b, weighted, input_precision="ieee")

    states = (tl.program_id(2).to(tl.int64) * chunks + chunk) * nodes * GROUP_HEADS + rows
    tl.store(chunk_largest + states, largest, mask=used)
    tl.store(chunk_total + states, total, mask=used)
    dims = tl.arange(0, BLOCK_D)[None, :]
    mask = used[:, None] & (dims < HEAD_DIM)
    tl.store(chunk_weighted + states[:, None] * HEAD_DIM + dims, weighted * (1.0 / PART_OF_X), mask=mask)


@triton.jit(do_not_specialize=["nodes", "chunks"])
def merge_kernel(
    # Pointers
    seen,  # [B, T]
    oldest,  # [B, T] or None
    chunk_largest,  # [B, Hkv, chunks, T * heads of a group]
    chunk_total,  # [B, Hkv, chunks, T * heads of a group]
    chunk_weighted,  # [B, Hkv, chunks, T * heads of a group, D]
    out,  # [B, Hq, T, D], written
    lse,  # [B, Hq, T], written
    # Sizes
    nodes,
    chunks,
    # Strides
    stride_out_batch,
    stride_out_head,
    stride_out_node,
    # Constants
    KV_HEADS: tl.constexpr,
    GROUP_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Merges the chunks that one row sees. One that sees nothing gives 0 and -inf."""
    row = tl.program_id(0)
    node, head = row // GROUP_HEADS, tl.program_id(1) % KV_HEADS * GROUP_HEADS + row % GROUP_HEADS
    batch = tl.program_id(1) // KV_HEADS
    row_seen = tl.load(seen + batch * nodes + node)
    end = tl.minimum(row_seen, SHORT_CHUNKS)
    end += (tl.maximum(row_seen - SHORT_CHUNKS, 0) + CHUNK_BLOCKS - 1) // CHUNK_BLOCKS
    start = 0
    if oldest is not None:  # no program need have folded the chunks before it
        block = tl.maximum(tl.load(oldest + batch * nodes + node), 0) // BLOCK
        begin = tl.minimum(block, SHORT_CHUNKS) + tl.maximum(block - SHORT_CHUNKS, 0) // CHUNK_BLOCKS
        begin = tl.where(block < row_seen, begin, end)
        start = begin // MERGED * MERGED
    dims = tl.arange(0, BLOCK_D)
    largest = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    weighted = tl.zeros([BLOCK_D], tl.float32)
    for first in range(start, end, MERGED):
        chunk = first + tl.arange(0, MERGED)
        there = chunk < end
        if oldest is not None:
            there = there & (chunk >= begin)
        states = (tl.program_id(1).to(tl.int64) * chunks + chunk) * nodes * GROUP_HEADS + row
        chunk_max = tl.load(chunk_largest + states, mask=there, other=float("-inf"))
        chunk_sum = tl.load(chunk_total + states, mask=there, other=0.0)
        mask = there[:, None] & (dims < HEAD_DIM)[None, :]
        values = tl.load(chunk_weighted + states[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0)
        now = tl.maximum(largest, tl.max(chunk_max, 0))
        shift = tl.where(now == float("-inf"), 0.0, now)
        keep, weights = tl.exp2(largest - shift), tl.exp2(chunk_max - shift)
        largest, total = now, total * keep + tl.sum(chunk_sum * weights, 0)
        weighted = weighted * keep + tl.sum(values * weights[:, None], 0)
    total = tl.where(total == 0.0, 1.0, total)
    out += batch.to(tl.int64) * stride_out_batch + head.to(tl.int64) * stride_out_head
    out += node.to(tl.int64) * stride_out_node
    tl.store(out + dims, (weighted / total).to(out.dtype.element_ty), mask=dims < HEAD_DIM)
    lse += (batch.to(tl.int64) * KV_HEADS * GROUP_HEADS + head) * nodes + node
    tl.store(lse + tl.arange(0, 1), (largest + tl.log2(total)) * LN_2)


# ==== launch ====


def fold_constants(head_dim, dtype, bits, group, rank, outliers, key_channels) -> dict:
    """What of a format and of queries fold_kernel is compiled for."""
    key_dim = key_channels or head_dim
    codes = 4 * (128 // group) * key_dim + 16 * key_dim * bits
    return {
        "KEY_DIM": key_dim,
        "BLOCK_K": max(16, triton.next_power_of_2(key_dim)),
        "VALUE_SIDE": codes + rank * (132 + key_dim) + 3 * outliers * key_dim + key_channels,
        "TILE": 64 if dtype == torch.float32 else 128,
        "BITS": bits,
        "GROUP": group,
        "RANK": rank,
        "OUTLIERS": outliers,
        "NUMBER": tl.float32 if dtype == torch.float32 else tl.float16,
    }


def compile_options(head_dim: int, dtype: torch.dtype, is_plain: bool) -> dict:
    """Options of both kernels; plain is without low rank and outliers. The number of nodes must never change them."""
    options = {"num_stages": 1, "enable_fp_fusion": False}
    if dtype != torch.float32 and head_dim in (64, 128):
        # Four programs on a multiprocessor, or three, which is worth that outliers park a few registers.
        return {"num_warps": 4, "maxnreg": 128 if is_plain else 168, **options}
    return {"num_warps": 16 if dtype == torch.float32 and head_dim not in (64, 128) else 8, **options}


def gear(q, quantised, seen, bits, group, rank, outliers, key_channels, scale, oldest=None):
    """Launches both kernels; arguments and results of torch.ops.pyspec.gear.

    Nothing waits for the device and grids come from shapes alone, so a CUDA graph can capture the call.
    """
    batch, heads, nodes, head_dim = q.shape
    kv_heads, group_heads = quantised.shape[1], heads // quantised.shape[1]
    out = torch.empty_like(q)
    lse = q.new_empty((batch, heads, nodes), dtype=torch.float32)
    if not out.numel():
        return out, lse
    blocks, short = quantised.shape[2], SHORT_CHUNKS.value
    chunks = min(blocks, short) + triton.cdiv(max(blocks - short, 0), CHUNK_BLOCKS.value)
    states = (batch, kv_heads, chunks, nodes * group_heads)
    chunk_state = [q.new_empty(shape, dtype=torch.float32) for shape in (states, states, (*states, head_dim))]
    seen, oldest = seen.contiguous(), None if oldest is None else oldest.contiguous()
    constants = compile_options(head_dim, q.dtype, is_plain=not rank and not outliers)
    constants |= {"KV_HEADS": kv_heads, "GROUP_HEADS": group_heads}
    constants |= {"HEAD_DIM": head_dim, "BLOCK_D": triton.next_power_of_2(head_dim)}
    with torch.cuda.device_of(q):
        if chunks:
            strides = (*q.stride()[:3], *quantised.stride()[:3])
            fold_kernel[triton.cdiv(nodes * group_heads, ROWS.value), chunks, batch * kv_heads](
                *(q, quantised, seen, oldest, *chunk_state, nodes, chunks, scale, *strides),
                **fold_constants(head_dim, q.dtype, bits, group, rank, outliers, key_channels),
                **constants,
            )
        inputs = (seen, oldest, *chunk_state, out, lse, nodes, chunks, *out.stride()[:3])
        merge_kernel[nodes * group_heads, batch * kv_heads](*inputs, **constants)
    return out, lse
