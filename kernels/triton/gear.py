"""Attention to packed keys and values on the GPU: split flash attention whose tiles are unpacked in registers.

One program per (16 query rows, chunk of records, KV head of a sequence). A thread loads words of 4 bytes, each once,
and makes two fp16 numbers of one at a time, as fp16 arithmetic comes: a code stays where it lies, an exponent is put
above it. x = zero + scale * code goes to the tensor cores through shared memory, with queries and weights in fp16 too,
whose 11 bits are more than those of bf16; in fp32 for queries in fp32. Keys are unpacked as [channels, tokens] and
values as [tokens, channels], so that both are vectors with scales and outliers of their own, [vectors, places].
An outlier's place, 16 * block + j, is one-hot in two parts: two multiply-adds for a pair of numbers put it in.
Low rank never meets the tile: scores get (q . b) a, and outputs (weights . a) b.
Bound by instructions, as many for outliers as for all else; records are read once.
A second kernel merges the chunks of a row, many at a time.
Row rule: a tile is folded alike for any number of rows; a row that does not see a record gets weights of 0 from it,
which change no bit. Chunks are cut at positions. The layout of a record is in kernels/params/gear.h.
"""

import torch

import triton
import triton.language as tl
from pyspec.kernels.flash import LN_2, LOG2_E, load_rows

__all__ = ["compile_options", "fold_constants", "fold_kernel", "gear_packed_attention", "merge_kernel"]

ROWS = tl.constexpr(16)  # query rows of a program: the smallest tensor-core tile
BLOCK = tl.constexpr(128)  # tokens of a record
CHUNK_BLOCKS = tl.constexpr(4)  # records of a chunk, folded in order; chunks are then merged
SHORT_CHUNKS = tl.constexpr(32)  # the first, of one record, so that a short text is shared out too
MERGED = tl.constexpr(32)  # chunks merged at a time
MOST_RANK = tl.constexpr(16)  # the smallest side of a product on tensor cores
LARGEST = tl.constexpr(65504.0)  # of fp16
PART_OF_X = tl.constexpr(0.25)  # keys and values may be up to LARGEST, and their differences must be in fp16


# ==== one tile of a record: [H halves of 64 tokens, P pairs of vectors, S blocks of 16 places, 16, 2 vectors] ====


@triton.jit
def pointer(base, offset, dtype: tl.constexpr):
    return (base + offset).to(tl.pointer_type(dtype), bitcast=True)


@triton.jit
def split(words, BITS: tl.constexpr):
    """The two numbers of BITS bits that each of words [..., 1] begins with, int16 [..., 2]."""
    return (words >> (tl.arange(0, 2) * BITS)[None, None, None, None, :]).to(tl.int16)


@triton.jit
def load_codes(words, HALF, PAIRS, SPAN, PLANE: tl.constexpr, H: tl.constexpr, P: tl.constexpr, S: tl.constexpr):
    """PLANE bits of codes, fp16 [H, P, S, 16, 2]; anything beyond PAIRS and SPAN. HALF: words of a half."""
    SHARE: tl.constexpr = 16 // PLANE  # blocks of two vectors in 16 words
    half = tl.arange(0, H)[:, None, None, None, None]
    j = tl.arange(0, 16)[None, None, None, :, None]
    if S == SPAN:  # a word is loaded once
        row = tl.arange(0, P * S // SHARE)[None, :, None, None, None]
        bit = (tl.arange(0, SHARE) * PLANE)[None, None, :, None, None]
        word = tl.load(words + half * HALF + row * 16 + j, mask=row < PAIRS * S // SHARE, other=0)
    else:
        block = tl.arange(0, P)[None, :, None, None, None] * SPAN + tl.arange(0, S)[None, None, :, None, None]
        bit = block % SHARE * PLANE
        there = tl.arange(0, S)[None, None, :, None, None] < SPAN
        word = tl.load(words + half * HALF + block // SHARE * 16 + j, mask=there, other=0)
    # Below the exponent 25 - bit a code at that bit of its byte is worth itself, above 1024 / 2^bit.
    codes = split(word >> (bit // 8 * 8), 16)
    bit = (bit % 8).to(tl.int16)
    base = (25 - bit) << 10
    codes = codes & (((1 << PLANE) - 1) << bit) | base
    codes = codes.to(tl.float16, bitcast=True) - base.to(tl.float16, bitcast=True)
    return tl.reshape(codes, [H, P, S, 16, 2])


@triton.jit
def is_equal(a, b):
    """1.0 where the whole numbers a and b, int16 below 1024, are the same, else 0.0; without a comparison, in fp16."""
    off = (a | 0x6400).to(tl.float16, bitcast=True) - (b | 0x6400).to(tl.float16, bitcast=True)
    off = tl.fma(off, off, tl.full(off.shape, -0.5, tl.float16))
    return tl.abs(off) - off


@triton.jit
def load_tile(side, part, HEAD_DIM, BLOCK_D, TILE, BITS, GROUP, RANK, OUTLIERS: tl.constexpr, VALUES, NUMBER):
    """PART_OF_X of x without low rank, of TILE tokens: keys [BLOCK_D, TILE] or values [TILE, BLOCK_D].

    Of a record's keys or values `side`, its TILE tokens number `part`; all else are constants. Keys are 0 in channels
    that there are not, values are anything.
    """
    VECTORS: tl.constexpr = BLOCK if VALUES else HEAD_DIM
    LENGTH: tl.constexpr = HEAD_DIM if VALUES else BLOCK
    WIDTH: tl.constexpr = GROUP if GROUP < LENGTH else LENGTH
    SCALES: tl.constexpr = LENGTH // WIDTH * VECTORS
    HALF: tl.constexpr = 2 * HEAD_DIM * BITS
    OUTLIER: tl.constexpr = 4 * SCALES + 8 * HALF + RANK * (4 + BLOCK + HEAD_DIM)
    H: tl.constexpr = TILE // 64
    PAIRS: tl.constexpr = 32 if VALUES else HEAD_DIM // 2
    SPAN: tl.constexpr = HEAD_DIM // 16 if VALUES else 4
    P: tl.constexpr = 32 if VALUES else BLOCK_D // 2
    S: tl.constexpr = BLOCK_D // 16 if VALUES else 4

    words = pointer(side, 4 * SCALES, tl.int32) + part * (H * HALF)
    if BITS == 3:
        x = load_codes(words, HALF, PAIRS, SPAN, 2, H, P, S)
        x += 4.0 * load_codes(words + HALF // 3 * 2, HALF, PAIRS, SPAN, 1, H, P, S)
    else:
        x = load_codes(words, HALF, PAIRS, SPAN, BITS, H, P, S)

    half = part * H + tl.arange(0, H)[:, None, None, None, None]
    pair = tl.arange(0, P)[None, :, None, None, None]
    block = tl.arange(0, S)[None, None, :, None, None]
    there = pair < PAIRS
    GROUPS: tl.constexpr = LENGTH // WIDTH if VALUES else (TILE + WIDTH - 1) // WIDTH
    if VALUES:
        pair += half * 32
        group = 0
    else:
        block += half * 4
        group = part * TILE // WIDTH
    scales = pointer(side, 0, tl.int32) + group * (VECTORS // 2) + pair
    zeros = scales + SCALES // 2
    scale = split(tl.load(scales, mask=there, other=0), 16)
    zero = split(tl.load(zeros, mask=there, other=0), 16)
    for g in tl.static_range(1, GROUPS):
        is_later = block >= (group + g) * (WIDTH // 16)
        scale = tl.where(is_later, split(tl.load(scales + g * (VECTORS // 2), mask=there, other=0), 16), scale)
        zero = tl.where(is_later, split(tl.load(zeros + g * (VECTORS // 2), mask=there, other=0), 16), zero)
    scale = scale.to(tl.float16, bitcast=True).to(NUMBER) * PART_OF_X
    zero = zero.to(tl.float16, bitcast=True).to(NUMBER) * PART_OF_X
    x = x.to(NUMBER)
    x = tl.fma(x, tl.broadcast_to(scale, x.shape), tl.broadcast_to(zero, x.shape))

    for o in tl.static_range(OUTLIERS):
        places = pointer(side, OUTLIER + (2 * OUTLIERS + o) * VECTORS, tl.int16) + pair
        place = split(tl.load(places, mask=there, other=0), 8) & 255
        bits = split(tl.load(pointer(side, OUTLIER + 2 * o * VECTORS, tl.int32) + pair, mask=there, other=0), 16)
        value = (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)  # bf16 is the upper half of fp32
        outlier = zero.to(tl.float32) + scale.to(tl.float32) * (value + ((1 << BITS) - 1) / 2.0)
        is_block = is_equal(place >> 4, block.to(tl.int16)).to(NUMBER)
        is_place = is_equal(place & 15, tl.arange(0, 16).to(tl.int16)[None, None, None, :, None]).to(NUMBER)
        minus, outlier = tl.broadcast_to(0.0 - is_block, x.shape), is_block * outlier.to(NUMBER)
        change = tl.fma(minus, x, tl.broadcast_to(outlier, x.shape))  # outlier - x in its block, else 0
        x = tl.fma(tl.broadcast_to(is_place, x.shape), change, x)
    if VALUES:
        x = tl.reshape(tl.permute(x, (0, 1, 4, 2, 3)), [TILE, BLOCK_D])
    else:
        x = tl.reshape(tl.permute(x, (1, 4, 0, 2, 3)), [BLOCK_D, TILE])
    return x


@triton.jit
def load_factor(address, N: tl.constexpr, FIRST, COUNT: tl.constexpr, RANK: tl.constexpr, NUMBER: tl.constexpr):
    """int8 [RANK, N] from column FIRST on, as [MOST_RANK, COUNT]; 0 beyond."""
    r, pair = tl.arange(0, MOST_RANK)[:, None, None], FIRST // 2 + tl.arange(0, COUNT // 2)[None, :, None]
    mask = (r < RANK) & (pair < N // 2)
    pairs = tl.load(pointer(address, 0, tl.int16) + r * (N // 2) + pair, mask=mask, other=0)
    bits = pairs >> (tl.arange(0, 2) * 8).to(tl.int16)[None, None, :]
    numbers = (bits & 255 ^ 128 | 0x6400).to(tl.float16, bitcast=True) - 1152.0  # 1024 + 128 + x
    return tl.reshape(numbers, [MOST_RANK, COUNT]).to(NUMBER)


@triton.jit
def load_low_rank(address, part, HEAD_DIM, BLOCK_D: tl.constexpr, TILE: tl.constexpr, RANK: tl.constexpr, NUMBER):
    """PART_OF_X of the factor [MOST_RANK], a [MOST_RANK, TILE] of tokens and b [MOST_RANK, BLOCK_D] of channels."""
    ranks = tl.arange(0, MOST_RANK)
    factor = PART_OF_X * tl.load(pointer(address, 0, tl.float32) + ranks, mask=ranks < RANK, other=0.0)
    a = load_factor(address + 4 * RANK, BLOCK, part * TILE, TILE, RANK, NUMBER)
    return factor, a, load_factor(address + (4 + BLOCK) * RANK, HEAD_DIM, 0, BLOCK_D, RANK, NUMBER)


# ==== kernels ====


@triton.jit
def first_block(chunk):
    return tl.minimum(chunk, SHORT_CHUNKS) + tl.maximum(chunk - SHORT_CHUNKS, 0) * CHUNK_BLOCKS


@triton.jit
def scaled(query, scale, NUMBER: tl.constexpr):
    """Queries whose products with PART_OF_X of the keys are scores in units of log2."""
    query = query.to(tl.float32) * (scale * (LOG2_E / PART_OF_X))
    if NUMBER == tl.float16:
        query = tl.clamp(query, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    return query.to(NUMBER)


@triton.jit(do_not_specialize=["nodes", "chunks"])
def fold_kernel(
    # Pointers
    q,  # [B, Hq, T, D], turned where the keys are
    packed,  # [B, Hkv, blocks, record] uint8
    seen,  # [B, T]
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
    stride_packed_batch,
    stride_packed_head,
    stride_packed_block,
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
    chunk = tl.program_id(1)
    batch, kv_head = tl.program_id(2) // KV_HEADS, tl.program_id(2) % KV_HEADS
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    used = rows < nodes * GROUP_HEADS
    node = tl.minimum(rows // GROUP_HEADS, nodes - 1)
    row_seen = tl.load(seen + batch * nodes + node, mask=used, other=0)
    first = first_block(chunk)
    end = tl.minimum(first_block(chunk + 1), tl.max(row_seen, 0))
    if first >= end:
        return  # no row reads this chunk

    q += batch.to(tl.int64) * stride_q_batch
    head = kv_head * GROUP_HEADS + rows % GROUP_HEADS
    query_rows = head.to(tl.int64) * stride_q_head + node.to(tl.int64) * stride_q_node
    query = load_rows(q, head, node, used, stride_q_head, stride_q_node, HEAD_DIM, BLOCK_D, False)
    query = scaled(query, scale, NUMBER)
    packed += batch.to(tl.int64) * stride_packed_batch + kv_head.to(tl.int64) * stride_packed_head
    PARTS: tl.constexpr = BLOCK // TILE
    # Where low rank begins.
    FACTOR_K: tl.constexpr = 4 * (BLOCK // GROUP) * KEY_DIM + 16 * KEY_DIM * BITS
    FACTOR_V: tl.constexpr = 4 * (HEAD_DIM // GROUP if GROUP < HEAD_DIM else 1) * BLOCK + 16 * HEAD_DIM * BITS
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for block in range(first, end):
        keys_side = packed + block * stride_packed_block.to(tl.int64)
        values_side = keys_side + VALUE_SIDE
        if KEY_DIM < HEAD_DIM:  # the record's own channels, which end its keys
            dims = tl.arange(0, BLOCK_K)
            channels = tl.load(values_side - KEY_DIM + dims, mask=dims < KEY_DIM, other=255).to(tl.int32)
            mask = used[:, None] & (channels < HEAD_DIM)[None, :]
            gathered = tl.load(q + query_rows[:, None] + channels[None, :], mask=mask, other=0.0)
            gathered = scaled(gathered, scale, NUMBER)
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
    dims = tl.arange(0, BLOCK_D)
    tl.store(chunk_largest + states, largest, mask=used)
    tl.store(chunk_total + states, total, mask=used)
    mask = used[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(chunk_weighted + states[:, None] * HEAD_DIM + dims[None, :], weighted * (1.0 / PART_OF_X), mask=mask)


@triton.jit(do_not_specialize=["nodes", "chunks"])
def merge_kernel(
    # Pointers
    seen,  # [B, T]
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
    dims = tl.arange(0, BLOCK_D)
    largest = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    weighted = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, end, MERGED):
        chunk = first + tl.arange(0, MERGED)
        there = chunk < end
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


def gear_packed_attention(q, packed, seen, bits, group, rank, outliers, key_channels, scale):
    """Launches both kernels; arguments and results of torch.ops.pyspec.gear_packed_attention.

    Nothing waits for the device and grids come from shapes alone, so a CUDA graph can capture the call.
    """
    batch, heads, nodes, head_dim = q.shape
    kv_heads, group_heads = packed.shape[1], heads // packed.shape[1]
    out = torch.empty_like(q)
    lse = q.new_empty((batch, heads, nodes), dtype=torch.float32)
    if not out.numel():
        return out, lse
    blocks, short = packed.shape[2], SHORT_CHUNKS.value
    chunks = min(blocks, short) + triton.cdiv(max(blocks - short, 0), CHUNK_BLOCKS.value)
    states = (batch, kv_heads, chunks, nodes * group_heads)
    chunk_state = [q.new_empty(shape, dtype=torch.float32) for shape in (states, states, (*states, head_dim))]
    seen = seen.contiguous()
    constants = compile_options(head_dim, q.dtype, is_plain=not rank and not outliers)
    constants |= {"KV_HEADS": kv_heads, "GROUP_HEADS": group_heads}
    constants |= {"HEAD_DIM": head_dim, "BLOCK_D": triton.next_power_of_2(head_dim)}
    with torch.cuda.device_of(q):
        if chunks:
            strides = (*q.stride()[:3], *packed.stride()[:3])
            fold_kernel[triton.cdiv(nodes * group_heads, ROWS.value), chunks, batch * kv_heads](
                *(q, packed, seen, *chunk_state, nodes, chunks, scale, *strides),
                **fold_constants(head_dim, q.dtype, bits, group, rank, outliers, key_channels),
                **constants,
            )
        inputs = (seen, *chunk_state, out, lse, nodes, chunks, *out.stride()[:3])
        merge_kernel[nodes * group_heads, batch * kv_heads](*inputs, **constants)
    return out, lse
