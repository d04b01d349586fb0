"""tree_attention on the GPU: split flash attention over the prefix, then a short gathered tail per node.

Prefix: one program per (16 query rows, chunk of 8 key tiles, KV head of a sequence). Its queries and its online
softmax state (largest score, sum, [16, D] values) stay in registers; the keys and values of tiles that the prefix
fills are streamed past them once, and every node of the tree shares them. Bound by reading K and V.
Tail: one program per (node, 16 heads of a group, KV head of a sequence). It merges the chunks in order, then gathers
the rest of the prefix and the node's ancestors by depth, so that a row sees the tiles of plain decoding. Bound by
latency: it folds one or two tiles.
Row rule: both kernels fold a tile with the same dots in the same layouts, without contracting a * b + c, so a node
gets the bits of plain decoding. Tile and chunk boundaries are positions, never a function of the number of nodes.
"""

import torch

import triton
import triton.language as tl
from pyspec.kernels.flash import LN_2, ROWS, empty_state, fold_keys, fold_values, load_rows, load_state, merge

__all__ = ["compile_options", "prefix_kernel", "tail_kernel", "tree_attention"]

TILE = tl.constexpr(64)  # the key at position p is in tile p // TILE
CHUNK_TILES = tl.constexpr(8)  # tiles folded in order; chunks are then merged in order


# ==== loads ====


@triton.jit
def locate(slots, wanted, batch, block_table, table_width, PAGE):
    """Page and slot within it of each slot of a sequence; without a block table a sequence is one page."""
    if block_table is None:
        pages, within = tl.zeros_like(slots) + batch, slots
    else:
        table = block_table + batch.to(tl.int64) * table_width
        pages, within = tl.load(table + slots // PAGE, mask=wanted, other=0), slots % PAGE
    return pages, within


# ==== the tree, from its ancestor bits: ancestors in index order are ancestors in depth order ====


@triton.jit
def count_bits(word):
    word = word.to(tl.uint32, bitcast=True)
    pairs = word - ((word >> 1) & 0x55555555)
    nibbles = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    octets = (nibbles + (nibbles >> 4)) & 0x0F0F0F0F
    return ((octets * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def depth_of(bits, WORDS: tl.constexpr):
    """Depth of a node, -1 for padding; bits: pointer to its row, or a tensor of them."""
    count = count_bits(tl.load(bits))
    for index in tl.static_range(1, WORDS):
        count += count_bits(tl.load(bits + index))
    return count - 1


@triton.jit
def ancestor_at(depth, bits, WORDS: tl.constexpr):
    """Node index [N] of the ancestor at each depth [N], any index where there is none; bits: pointer to a row."""
    word = tl.zeros_like(depth)
    rest, node = depth, word
    before = 0
    for index in tl.static_range(WORDS):
        loaded = tl.load(bits + index)
        is_reached = depth >= before
        word = tl.where(is_reached, loaded, word)
        rest = tl.where(is_reached, depth - before, rest)
        node = tl.where(is_reached, index * 32, node)
        before += count_bits(loaded)
    for step in tl.static_range(5):  # the set bit number `rest` of word, by halves
        width = 16 >> step
        low = count_bits(word & ((1 << width) - 1))
        is_high = rest >= low
        rest = tl.where(is_high, rest - low, rest)
        node = tl.where(is_high, node + width, node)
        word = tl.where(is_high, word >> width, word)
    return node


# ==== kernels ====

# The numbers of a call that change from round to round must not compile the kernel anew.
UNSPECIALIZED = ["nodes", "chunks", "table_width", "window"]


@triton.jit(do_not_specialize=UNSPECIALIZED)
def prefix_kernel(
    # Pointers
    q,  # [B, Hq, T, D]
    k,  # [B, Hkv, S, D] or [P, Hkv, page, D]
    v,  # like k
    ancestor_bits,  # [B, T, ceil(T / 32)]
    prefix_lens,  # [B]
    block_table,  # [B, table_width] or None
    chunk_largest,  # [B, Hkv, chunks, T * group], written
    chunk_total,  # [B, Hkv, chunks, T * group], written
    chunk_weighted,  # [B, Hkv, chunks, T * group, D], written
    # Sizes
    nodes,
    chunks,
    table_width,
    # Scores
    scale,
    softcap,
    window,
    # Strides
    stride_q_batch,
    stride_q_head,
    stride_q_node,
    stride_k_batch,  # of a page, with a block table; so too for v
    stride_k_head,
    stride_k_slot,
    stride_v_batch,
    stride_v_head,
    stride_v_slot,
    # Constants
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WORDS: tl.constexpr,
    PAGE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Folds one chunk of whole prefix tiles into the states of 16 rows; row r is node r // group."""
    chunk = tl.program_id(1)
    batch, kv_head = tl.program_id(2) // KV_HEADS, tl.program_id(2) % KV_HEADS
    prefix = tl.load(prefix_lens + batch)
    first_tile = chunk * CHUNK_TILES
    end_tile = tl.minimum(first_tile + CHUNK_TILES, prefix // TILE)
    visible_from = 0  # for the root; deeper nodes see from later on
    if window is not None:
        visible_from = tl.maximum(prefix - window + 1, 0)
        first_tile = tl.maximum(first_tile, visible_from // TILE)
    if first_tile >= end_tile:
        return  # the tail does not read this chunk

    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    used = rows < nodes * GROUP
    node = tl.minimum(rows // GROUP, nodes - 1)
    head = kv_head * GROUP + rows % GROUP
    q += batch.to(tl.int64) * stride_q_batch
    query = load_rows(q, head, node, used, stride_q_head, stride_q_node, HEAD_DIM, BLOCK_D, UPCAST)
    k += kv_head.to(tl.int64) * stride_k_head
    v += kv_head.to(tl.int64) * stride_v_head
    if window is not None:
        bits = ancestor_bits + (batch.to(tl.int64) * nodes + node) * WORDS
        depth = depth_of(bits, WORDS)

    largest, total, weighted = empty_state(BLOCK_D)
    for tile in range(first_tile, end_tile):
        slots = tile * TILE + tl.arange(0, TILE)
        wanted = slots >= visible_from  # no row sees the others, so they may hold anything
        visible = None
        if window is not None:
            visible = slots[None, :] > (prefix + depth - window)[:, None]
        page, slot = locate(slots, wanted, batch, block_table, table_width, PAGE)
        keys = load_rows(k, page, slot, wanted, stride_k_batch, stride_k_slot, HEAD_DIM, BLOCK_D, UPCAST)
        largest, total, weights, keep = fold_keys(query, keys, visible, largest, total, scale, softcap)
        values = load_rows(v, page, slot, wanted, stride_v_batch, stride_v_slot, HEAD_DIM, BLOCK_D, UPCAST)
        weighted = fold_values(weights, keep, values, weighted)

    states = (tl.program_id(2).to(tl.int64) * chunks + chunk) * nodes * GROUP + rows
    dims = tl.arange(0, BLOCK_D)
    tl.store(chunk_largest + states, largest, mask=used)
    tl.store(chunk_total + states, total, mask=used)
    mask = used[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(chunk_weighted + states[:, None] * HEAD_DIM + dims[None, :], weighted, mask=mask)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def tail_kernel(
    # Pointers
    q,  # [B, Hq, T, D]
    k,  # [B, Hkv, S, D] or [P, Hkv, page, D]
    v,  # like k
    ancestor_bits,  # [B, T, ceil(T / 32)]
    prefix_lens,  # [B]
    block_table,  # [B, table_width] or None
    chunk_largest,  # [B, Hkv, chunks, T * group]
    chunk_total,  # [B, Hkv, chunks, T * group]
    chunk_weighted,  # [B, Hkv, chunks, T * group, D]
    out,  # like q, written
    lse,  # [B, Hq, T], written
    # Sizes
    nodes,
    chunks,
    table_width,
    # Scores
    scale,
    softcap,
    window,
    # Strides
    stride_q_batch,
    stride_q_head,
    stride_q_node,
    stride_k_batch,  # of a page, with a block table; so too for v
    stride_k_head,
    stride_k_slot,
    stride_v_batch,
    stride_v_head,
    stride_v_slot,
    stride_out_batch,
    stride_out_head,
    stride_out_node,
    # Constants
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WORDS: tl.constexpr,
    PAGE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Finishes up to 16 heads of one node: merges its chunks, then folds the tiles that the tree reaches into."""
    HEAD_BLOCKS: tl.constexpr = (GROUP + ROWS - 1) // ROWS
    node = tl.program_id(0) // HEAD_BLOCKS
    within_group = tl.program_id(0) % HEAD_BLOCKS * ROWS + tl.arange(0, ROWS)
    batch, kv_head = tl.program_id(2), tl.program_id(1)
    heads = kv_head * GROUP + within_group
    used = within_group < GROUP
    prefix = tl.load(prefix_lens + batch)
    bits = ancestor_bits + (batch.to(tl.int64) * nodes + node) * WORDS
    depth = depth_of(bits, WORDS)
    position = prefix + depth  # of the node itself
    first_tile = prefix // TILE
    end_tile = position // TILE + 1
    whole_chunks = first_tile // CHUNK_TILES
    if depth < 0:  # padding sees nothing
        end_tile = 0
        whole_chunks = 0
    visible_from = 0
    if window is not None:
        visible_from = tl.maximum(position - window + 1, 0)

    q += batch.to(tl.int64) * stride_q_batch + node.to(tl.int64) * stride_q_node
    query = load_rows(q, heads, heads, used, stride_q_head, 0, HEAD_DIM, BLOCK_D, UPCAST)

    states = ((batch.to(tl.int64) * KV_HEADS + kv_head) * chunks * nodes + node) * GROUP + within_group
    largest, total, weighted = empty_state(BLOCK_D)
    for chunk in range(visible_from // (CHUNK_TILES * TILE), whole_chunks):
        chunk_state = load_state(
            chunk_largest, chunk_total, chunk_weighted, states + chunk * nodes * GROUP, used, HEAD_DIM, BLOCK_D
        )
        largest, total, weighted = merge(largest, total, weighted, *chunk_state)

    # The chunk that the prefix ends in goes on where the prefix kernel left it.
    is_open = (depth >= 0) & (first_tile > whole_chunks * CHUNK_TILES) & (first_tile * TILE > visible_from)
    is_stored = within_group < tl.where(is_open, GROUP, 0)
    open_states = states + whole_chunks * nodes * GROUP
    open_largest, open_total, open_weighted = load_state(
        chunk_largest, chunk_total, chunk_weighted, open_states, is_stored, HEAD_DIM, BLOCK_D
    )
    k += kv_head.to(tl.int64) * stride_k_head
    v += kv_head.to(tl.int64) * stride_v_head
    first_tile = tl.maximum(first_tile, visible_from // TILE)
    for chunk in range(whole_chunks, (end_tile + CHUNK_TILES - 1) // CHUNK_TILES):
        chunk_end = tl.minimum((chunk + 1) * CHUNK_TILES, end_tile)
        for tile in range(tl.maximum(chunk * CHUNK_TILES, first_tile), chunk_end):
            positions = tile * TILE + tl.arange(0, TILE)
            ancestors = ancestor_at(tl.maximum(positions - prefix, 0), bits, WORDS)
            slots = tl.where(positions < prefix, positions, prefix + ancestors)
            wanted = (positions >= visible_from) & (positions <= position)
            page, slot = locate(slots, wanted, batch, block_table, table_width, PAGE)
            keys = load_rows(k, page, slot, wanted, stride_k_batch, stride_k_slot, HEAD_DIM, BLOCK_D, UPCAST)
            open_largest, open_total, weights, keep = fold_keys(
                query, keys, wanted[None, :], open_largest, open_total, scale, softcap
            )
            values = load_rows(v, page, slot, wanted, stride_v_batch, stride_v_slot, HEAD_DIM, BLOCK_D, UPCAST)
            open_weighted = fold_values(weights, keep, values, open_weighted)
        largest, total, weighted = merge(largest, total, weighted, open_largest, open_total, open_weighted)
        open_largest, open_total, open_weighted = empty_state(BLOCK_D)

    total = tl.where(total == 0.0, 1.0, total)  # saw nothing: 0 and -inf
    row = (weighted / total[:, None]).to(out.dtype.element_ty)
    dims = tl.arange(0, BLOCK_D)
    out += batch.to(tl.int64) * stride_out_batch + node.to(tl.int64) * stride_out_node
    offsets = heads.to(tl.int64)[:, None] * stride_out_head + dims[None, :]
    tl.store(out + offsets, row, mask=used[:, None] & (dims < HEAD_DIM)[None, :])
    rows = (batch.to(tl.int64) * KV_HEADS * GROUP + heads) * nodes + node
    tl.store(lse + rows, (largest + tl.log2(total)) * LN_2, mask=used)


# ==== launch ====


def compile_options(head_dim: int, dtype: torch.dtype, is_paged: bool) -> tuple[dict, dict]:
    """Options of the prefix and the tail kernel. The number of nodes must never change them: the row rule."""
    row_bytes = triton.next_power_of_2(head_dim) * dtype.itemsize
    both = {"num_warps": max(4, row_bytes // 64), "enable_fp_fusion": False}
    tiles = max(1, min(2, 96 * 1024 // (2 * TILE.value * row_bytes)))  # of keys and values, in flight in 96 KB
    stages = 1 + tiles * (2 if is_paged else 1)  # the block table is read as far ahead of the keys
    return {**both, "num_stages": stages}, {**both, "num_stages": 2}


def tree_attention(q, k, v, ancestor_bits, prefix_lens, scale, softcap, window, block_table):
    """Launches both kernels; arguments and results of torch.ops.pyspec.tree_attention.

    Nothing waits for the device and grids come from shapes alone, so a CUDA graph can capture the call.
    """
    batch, heads, nodes, head_dim = q.shape
    kv_heads, group = k.shape[1], heads // k.shape[1]
    slots = k.shape[2] if block_table is None else block_table.shape[1] * k.shape[2]
    chunks = triton.cdiv(slots // TILE.value, CHUNK_TILES.value)
    out = torch.empty_like(q)
    lse = q.new_empty((batch, heads, nodes), dtype=torch.float32)
    if not out.numel():
        return out, lse
    states = (batch, kv_heads, chunks, nodes * group)
    chunk_state = [q.new_empty(shape, dtype=torch.float32) for shape in (states, states, (*states, head_dim))]
    ancestor_bits, prefix_lens = ancestor_bits.contiguous(), prefix_lens.contiguous()
    if block_table is not None:
        block_table = block_table.contiguous()
    inputs = (q, k, v, ancestor_bits, prefix_lens, block_table, *chunk_state)
    table_width = 0 if block_table is None else block_table.shape[1]
    numbers = (nodes, chunks, table_width, scale, softcap, window)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    constants = {
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "WORDS": ancestor_bits.shape[2],
        "PAGE": None if block_table is None else k.shape[2],
        "UPCAST": not q.is_cuda and q.dtype == torch.bfloat16,  # the interpreter computes on the bits of bf16
    }
    prefix_options, tail_options = compile_options(head_dim, q.dtype, block_table is not None)
    with torch.cuda.device_of(q):
        if chunks:
            grid = (triton.cdiv(nodes * group, ROWS.value), chunks, batch * kv_heads)
            prefix_kernel[grid](*inputs, *numbers, *strides, **constants, **prefix_options)
        grid = (nodes * triton.cdiv(group, ROWS.value), kv_heads, batch)
        tail_kernel[grid](*inputs, out, lse, *numbers, *strides, *out.stride()[:3], **constants, **tail_options)
    return out, lse
