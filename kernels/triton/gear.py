"""Attention to packed keys and values on the GPU: split flash attention whose tiles are unpacked in registers.

One program per (16 query rows, chunk of 4 records, KV head of a sequence). A record is two tiles of 64 tokens. Each
thread loads the word that holds its code (neighbours find it in the first-level cache), makes zero + scale * code of
it, puts an outlier there if its index says so, adds low rank, and the tile goes to the tensor cores in the dtype of the
queries, as if it had been loaded. Bound by reading records, and by some twenty instructions for each number.
A second kernel merges the chunks of a row in order.
Row rule: a tile is folded alike for any number of rows; a row that does not see a record gets weights of 0 from it,
which change no bit. Chunks are cut at positions. The layout of a record is in kernels/params/gear.h.
"""

import torch

import triton
import triton.language as tl
from pyspec.kernels.flash import LN_2, ROWS, empty_state, fold_keys, fold_values, load_rows, load_state, merge

__all__ = ["compile_options", "fold_kernel", "gear_packed_attention", "merge_kernel", "side_bytes"]

BLOCK = tl.constexpr(128)  # tokens of a record
TILE = tl.constexpr(64)  # tokens whose codes lie together
CHUNK_BLOCKS = tl.constexpr(4)  # records folded in order; chunks are then merged in order


# ==== one tile of a record ====


@triton.jit
def pointer(base, offset, dtype: tl.constexpr):
    return (base + offset).to(tl.pointer_type(dtype), bitcast=True)


@triton.jit
def load_bf16(address, mask):
    """In fp32, whose upper half they are."""
    bits = tl.load(address, mask=mask, other=0).to(tl.int32) << 16
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def load_plane(words, vector, lane, mask, PLANE: tl.constexpr):
    """`PLANE` bits of each code; 16 / PLANE vectors of 32 share 32 words."""
    SHARE: tl.constexpr = 16 // PLANE
    word = tl.load(words + vector // SHARE * 32 + lane, mask=mask, other=0).to(tl.int32)
    return (word >> (vector % SHARE * PLANE)) & ((1 << PLANE) - 1)


@triton.jit
def load_codes(side, half, token, channel, HEAD_DIM: tl.constexpr, BITS: tl.constexpr, VALUES: tl.constexpr):
    """Codes [TILE, BLOCK_D] in fp32; side points to the first half's."""
    if VALUES:
        vector, lane = token // 2 * (HEAD_DIM // 16) + channel // 16, channel % 16 * 2 + token % 2
    else:
        vector, lane = channel // 2 * 4 + token // 16, token % 16 * 2 + channel % 2
    mask = (token >= 0) & (channel < HEAD_DIM)
    words = pointer(side, half * (TILE * HEAD_DIM * BITS // 8), tl.int16)
    if BITS == 3:
        codes = load_plane(words, vector, lane, mask, 2)
        codes |= load_plane(words + TILE * HEAD_DIM // 8, vector, lane, mask, 1) << 2
    else:
        codes = load_plane(words, vector, lane, mask, BITS)
    return codes.to(tl.float32)


@triton.jit
def load_tile(
    side,  # a record's keys or values
    half,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    RANK: tl.constexpr,
    OUTLIERS: tl.constexpr,
    VALUES: tl.constexpr,
):
    """64 tokens of keys or values, [TILE, BLOCK_D] fp32; 0 in channels that there are not."""
    VECTORS: tl.constexpr = BLOCK if VALUES else HEAD_DIM
    WIDTH: tl.constexpr = (GROUP if GROUP < HEAD_DIM else HEAD_DIM) if VALUES else GROUP
    GROUPS: tl.constexpr = (HEAD_DIM if VALUES else TILE) // WIDTH
    SCALES: tl.constexpr = (HEAD_DIM // WIDTH if VALUES else BLOCK // WIDTH) * VECTORS
    FACTOR: tl.constexpr = 4 * SCALES + BLOCK * HEAD_DIM * BITS // 8
    OUTLIER: tl.constexpr = FACTOR + RANK * (4 + BLOCK + HEAD_DIM)
    token, channel = tl.arange(0, TILE)[:, None], tl.arange(0, BLOCK_D)[None, :]
    here = half * TILE + token  # in the record
    there = channel < HEAD_DIM

    codes = load_codes(side + 4 * SCALES, half, token, channel, HEAD_DIM, BITS, VALUES)
    for o in tl.static_range(OUTLIERS):
        if VALUES:
            own, along, own_there = here, channel, here >= 0
        else:
            own, along, own_there = channel, here, there
        outlier = load_bf16(pointer(side, OUTLIER + 2 * o * VECTORS, tl.int16) + own, own_there)
        index = tl.load(side + OUTLIER + (2 * OUTLIERS + o) * VECTORS + own, mask=own_there, other=0).to(tl.int32)
        codes = tl.where(along == index, outlier + ((1 << BITS) - 1) / 2.0, codes)

    scales, zeros = pointer(side, 0, tl.float16), pointer(side, 2 * SCALES, tl.float16)
    if VALUES:
        scale, zero = tl.load(scales + here).to(tl.float32), tl.load(zeros + here).to(tl.float32)
        for g in tl.static_range(1, GROUPS):  # channels from g * WIDTH on
            is_later = channel >= g * WIDTH
            scale = tl.where(is_later, tl.load(scales + g * BLOCK + here).to(tl.float32), scale)
            zero = tl.where(is_later, tl.load(zeros + g * BLOCK + here).to(tl.float32), zero)
    else:
        first = half * TILE // WIDTH * HEAD_DIM + channel
        scale = tl.load(scales + first, mask=there, other=0.0).to(tl.float32)
        zero = tl.load(zeros + first, mask=there, other=0.0).to(tl.float32)
        for g in tl.static_range(1, GROUPS):  # tokens from g * WIDTH on
            is_later = token >= g * WIDTH
            more = first + g * HEAD_DIM
            scale = tl.where(is_later, tl.load(scales + more, mask=there, other=0.0).to(tl.float32), scale)
            zero = tl.where(is_later, tl.load(zeros + more, mask=there, other=0.0).to(tl.float32), zero)
    x = zero + scale * codes
    for r in tl.static_range(RANK):
        factor = tl.load(pointer(side, FACTOR + 4 * r, tl.float32))
        a = tl.load(pointer(side, FACTOR + 4 * RANK + r * BLOCK, tl.int8) + here).to(tl.float32)
        b = pointer(side, FACTOR + RANK * (4 + BLOCK) + r * HEAD_DIM, tl.int8) + channel
        x += (factor * a) * tl.load(b, mask=there, other=0).to(tl.float32)
    return tl.where(there, x, 0.0)


# ==== kernels ====


@triton.jit
def row_places(seen, batch, nodes, GROUP_HEADS: tl.constexpr):
    """Rows of this program, which of them there are, their node, and how many records they see."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    used = rows < nodes * GROUP_HEADS
    node = tl.minimum(rows // GROUP_HEADS, nodes - 1)
    return rows, used, node, tl.load(seen + batch * nodes + node, mask=used, other=0)


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
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    RANK: tl.constexpr,
    OUTLIERS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Folds one chunk of records into the states of 16 rows; row r is node r // heads of a group."""
    chunk = tl.program_id(1)
    batch, kv_head = tl.program_id(2) // KV_HEADS, tl.program_id(2) % KV_HEADS
    rows, used, node, row_seen = row_places(seen, batch, nodes, GROUP_HEADS)
    first = chunk * CHUNK_BLOCKS
    end = tl.minimum(first + CHUNK_BLOCKS, tl.max(row_seen, 0))
    if first >= end:
        return  # no row reads this chunk

    q += batch.to(tl.int64) * stride_q_batch
    head = kv_head * GROUP_HEADS + rows % GROUP_HEADS
    query_rows = head.to(tl.int64) * stride_q_head + node.to(tl.int64) * stride_q_node
    query = load_rows(q, head, node, used, stride_q_head, stride_q_node, HEAD_DIM, BLOCK_D, UPCAST)
    packed += batch.to(tl.int64) * stride_packed_batch + kv_head.to(tl.int64) * stride_packed_head
    largest, total, weighted = empty_state(BLOCK_D)
    for tile in range(first * 2, end * 2):
        block, half = tile // 2, tile % 2
        record = packed + block * stride_packed_block.to(tl.int64)
        if KEY_DIM < HEAD_DIM:  # the record's own channels, which end its keys
            dims = tl.arange(0, BLOCK_K)
            channels = tl.load(record + (VALUE_SIDE - KEY_DIM) + dims, mask=dims < KEY_DIM, other=255).to(tl.int32)
            mask = used[:, None] & (channels < HEAD_DIM)[None, :]
            gathered = tl.load(q + query_rows[:, None] + channels[None, :], mask=mask, other=0.0)
            gathered = gathered.to(tl.float32) if UPCAST else gathered
        else:
            gathered = query
        keys = load_tile(record, half, KEY_DIM, BLOCK_K, BITS, GROUP, RANK, OUTLIERS, False).to(query.dtype)
        visible = (block < row_seen)[:, None]
        largest, total, weights, keep = fold_keys(gathered, keys, visible, largest, total, scale, None)
        side = record + VALUE_SIDE
        values = load_tile(side, half, HEAD_DIM, BLOCK_D, BITS, GROUP, RANK, OUTLIERS, True).to(query.dtype)
        weighted = fold_values(weights, keep, values, weighted)

    states = (tl.program_id(2).to(tl.int64) * chunks + chunk) * nodes * GROUP_HEADS + rows
    dims = tl.arange(0, BLOCK_D)
    tl.store(chunk_largest + states, largest, mask=used)
    tl.store(chunk_total + states, total, mask=used)
    mask = used[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(chunk_weighted + states[:, None] * HEAD_DIM + dims[None, :], weighted, mask=mask)


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
    """Merges the chunks of 16 rows in order. A row that sees nothing gives 0 and -inf."""
    batch, kv_head = tl.program_id(1) // KV_HEADS, tl.program_id(1) % KV_HEADS
    rows, used, node, row_seen = row_places(seen, batch, nodes, GROUP_HEADS)
    largest, total, weighted = empty_state(BLOCK_D)
    for chunk in range(0, (tl.max(row_seen, 0) + CHUNK_BLOCKS - 1) // CHUNK_BLOCKS):
        states = (tl.program_id(1).to(tl.int64) * chunks + chunk) * nodes * GROUP_HEADS + rows
        wanted = used & (row_seen > chunk * CHUNK_BLOCKS)
        state = load_state(chunk_largest, chunk_total, chunk_weighted, states, wanted, HEAD_DIM, BLOCK_D)
        largest, total, weighted = merge(largest, total, weighted, *state)
    total = tl.where(total == 0.0, 1.0, total)
    head = kv_head * GROUP_HEADS + rows % GROUP_HEADS
    dims = tl.arange(0, BLOCK_D)
    out += batch.to(tl.int64) * stride_out_batch
    offsets = head.to(tl.int64) * stride_out_head + node.to(tl.int64) * stride_out_node
    mask = used[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(out + offsets[:, None] + dims[None, :], (weighted / total[:, None]).to(out.dtype.element_ty), mask=mask)
    lse_rows = (batch.to(tl.int64) * KV_HEADS * GROUP_HEADS + head) * nodes + node
    tl.store(lse + lse_rows, (largest + tl.log2(total)) * LN_2, mask=used)


# ==== launch ====


def side_bytes(key_dim: int, bits: int, group: int, rank: int, outliers: int, key_channels: int) -> int:
    """Of a record's keys: where its values begin."""
    codes = 4 * (128 // group) * key_dim + 16 * key_dim * bits
    return codes + rank * (132 + key_dim) + 3 * outliers * key_dim + key_channels


def compile_options(head_dim: int, dtype: torch.dtype) -> dict:
    """Options of both kernels. The number of nodes must never change them: the row rule."""
    warps = max(4, triton.next_power_of_2(head_dim) * dtype.itemsize // 32)
    return {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": False}


def gear_packed_attention(q, packed, seen, bits, group, rank, outliers, rotate, key_channels, scale):
    """Launches both kernels; arguments and results of torch.ops.pyspec.gear_packed_attention.

    Nothing waits for the device and grids come from shapes alone, so a CUDA graph can capture the call.
    """
    batch, heads, nodes, head_dim = q.shape
    kv_heads, group_heads = packed.shape[1], heads // packed.shape[1]
    key_dim = key_channels or head_dim
    out = torch.empty_like(q)
    lse = q.new_empty((batch, heads, nodes), dtype=torch.float32)
    if not out.numel():
        return out, lse
    if rotate:
        from pyspec.ops.gear_format import rotated

        q = rotated(q).to(q.dtype)
    chunks = triton.cdiv(packed.shape[2], CHUNK_BLOCKS.value)
    states = (batch, kv_heads, chunks, nodes * group_heads)
    chunk_state = [q.new_empty(shape, dtype=torch.float32) for shape in (states, states, (*states, head_dim))]
    seen = seen.contiguous()
    constants = {
        "KV_HEADS": kv_heads,
        "GROUP_HEADS": group_heads,
        "HEAD_DIM": head_dim,
        "BLOCK_D": triton.next_power_of_2(head_dim),
    } | compile_options(head_dim, q.dtype)
    row_sets = triton.cdiv(nodes * group_heads, ROWS.value)
    with torch.cuda.device_of(q):
        if chunks:
            strides = (*q.stride()[:3], *packed.stride()[:3])
            fold_kernel[row_sets, chunks, batch * kv_heads](
                *(q, packed, seen, *chunk_state, nodes, chunks, scale, *strides),
                KEY_DIM=key_dim,
                BLOCK_K=max(16, triton.next_power_of_2(key_dim)),
                VALUE_SIDE=side_bytes(key_dim, bits, group, rank, outliers, key_channels),
                BITS=bits,
                GROUP=group,
                RANK=rank,
                OUTLIERS=outliers,
                UPCAST=not q.is_cuda and q.dtype == torch.bfloat16,  # the interpreter computes on the bits of bf16
                **constants,
            )
        inputs = (seen, *chunk_state, out, lse, nodes, chunks, *out.stride()[:3])
        merge_kernel[row_sets, batch * kv_heads](*inputs, **constants)
    return out, lse
