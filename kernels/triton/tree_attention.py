"""tree_attention on the GPU: split flash attention over the prefix, its tree folded beside it, then one short merge.

fold_kernel: one program per (block of query rows, chunk of key tiles, KV head of a sequence), and one per (node, KV
head of a sequence) for what only that node sees. Its queries and its online softmax state (largest score, sum,
[rows, D] values) stay in registers; keys and values are streamed past them once, and all nodes of a block share those
of the prefix. Bound by reading K and V; with 64 rows the tensor cores take a third of that time.
merge_kernel: one warp per row merges its chunks, 16 loaded at a time. Bound by latency.

A row's keys at positions 0 .. p are cut by position alone: whole tiles lie in chunks, and the tile of p itself is
folded apart, so that a node of the tree waits for nothing that the prefix's programs do. Whole tiles that the prefix
fills are read in place. The others are gathered by depth for one node, as plain decoding would see them; where a
block's nodes are a chain (a prompt, T = 1) nothing needs gathering, and the block is folded as one, masked by position.
Row rule: one binary folds every tile, a warp's rows beside each other, without contracting a * b + c; a masked key has
weight 0 and changes no bit. So a node gets the bits of plain decoding.
"""

import torch

import triton
import triton.language as tl
from pyspec.kernels.early_launch import launch_options, wait_for_earlier
from pyspec.kernels.flash import LN_2, fold_keys, fold_values, load_rows

__all__ = ["compile_options", "fold_kernel", "merge_kernel", "program_rows", "tree_attention"]

TILE = tl.constexpr(64)  # the key at position p is in tile p // TILE
# Chunks are cut at positions: short ones first, to fill the machine; then long ones, whose states cost less memory.
SHORT, SHORT_CHUNKS, LONG = tl.constexpr(4), tl.constexpr(16), tl.constexpr(16)  # tiles, how many, tiles
AT_ONCE = tl.constexpr(16)  # chunks that are merged at once


@triton.jit
def chunk_of(tile):
    return tl.minimum(tile, SHORT * SHORT_CHUNKS) // SHORT + tl.maximum(tile - SHORT * SHORT_CHUNKS, 0) // LONG


@triton.jit
def first_tile_of(chunk):
    return tl.minimum(chunk, SHORT_CHUNKS) * SHORT + tl.maximum(chunk - SHORT_CHUNKS, 0) * LONG


# ==== loads ====


@triton.jit
def locate(slots, wanted, batch, block_table, table_width, PAGE):
    """Page and slot within it of each wanted slot (None: all); without a block table a sequence is one page."""
    if block_table is None:
        pages, within = tl.zeros_like(slots) + batch, slots
    else:
        places = block_table + batch.to(tl.int64) * table_width + slots // PAGE
        pages = tl.load(places) if wanted is None else tl.load(places, mask=wanted, other=0)
        within = slots % PAGE
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
def fold_kernel(
    # Pointers
    q,  # [B, Hq, T, D]
    k,  # [B, Hkv, S, D] or [P, Hkv, page, D]
    v,  # like k
    ancestor_bits,  # [B, T, ceil(T / 32)]
    prefix_lens,  # [B]
    block_table,  # [B, table_width] or None
    chunk_largest,  # [B, Hkv, chunks + 1, T * group], written; the last is of the rows' own tiles
    chunk_total,  # [B, Hkv, chunks + 1, T * group], written
    chunk_weighted,  # [B, Hkv, chunks + 1, T * group, D], written
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
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    PAGE: tl.constexpr,
    UPCAST: tl.constexpr,
    IS_EARLY: tl.constexpr,
):
    """Folds one chunk into the states of a block of rows, or what is one node's own into its heads' states."""
    HEADS: tl.constexpr = GROUP if GROUP < ROWS else ROWS  # of a block
    NODES: tl.constexpr = ROWS // HEADS  # of a block
    HEAD_BLOCKS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    wait_for_earlier(IS_EARLY)
    batch, kv_head = tl.program_id(1) // KV_HEADS, tl.program_id(1) % KV_HEADS
    prefix = tl.load(prefix_lens + batch)
    whole_tiles = prefix // TILE
    program, own_programs = tl.program_id(0) // HEAD_BLOCKS, nodes
    head_block = tl.program_id(0) % HEAD_BLOCKS
    is_own = program < own_programs
    blocks = (nodes + NODES - 1) // NODES
    block = tl.where(is_own, program // NODES, (program - own_programs) % blocks)
    chunk = (program - own_programs) // blocks  # of a program that is not one node's

    # The rows: who they are, and whether the nodes of the block are the tree's first, each the child of the one before.
    local = tl.arange(0, ROWS)
    root = block * NODES
    node, head = root + local // HEADS, head_block * HEADS + local % HEADS
    used = (local < NODES * HEADS) & (node < nodes) & (head < GROUP)
    node, head = tl.minimum(node, nodes - 1), kv_head * GROUP + tl.minimum(head, GROUP - 1)
    q += batch.to(tl.int64) * stride_q_batch
    query = load_rows(q, head, node, used, stride_q_head, stride_q_node, HEAD_DIM, BLOCK_D, UPCAST)
    bits = ancestor_bits + batch.to(tl.int64) * nodes * WORDS
    depth = tl.where(used, depth_of(bits + node * WORDS, WORDS), -1)
    used = depth >= 0  # padding sees nothing
    is_chain = tl.max((used & (depth != node)).to(tl.int32), 0) == 0
    if is_own:
        if is_chain:
            if program != root:
                return
        used = used & (node == tl.where(is_chain, node, program))
    deepest = tl.max(tl.where(used, depth, -1), 0)
    if deepest < 0:
        return
    position = prefix + depth  # of the row itself
    row_tile = position // TILE

    # Whole tiles: all rows see those below `flat` where they lie, and some row sees those below `reach`.
    nearest = prefix + tl.where(is_chain, root, tl.where(is_own, deepest, 0))  # no row is before it
    own_tile = nearest // TILE
    flat = tl.where(is_chain, own_tile, whole_tiles)
    reach = tl.where(is_chain | is_own, (prefix + deepest) // TILE, whole_tiles)
    visible_from = 0
    if window is not None:
        visible_from = tl.maximum(nearest - window + 1, 0)
    first_chunk, end_chunk = chunk, chunk + 1
    if is_own:  # of chunks, those that go on in the tree; then the own tile
        first_chunk = chunk_of(whole_tiles)
        end_chunk = tl.where((not is_chain) & (reach > whole_tiles), chunk_of(reach - 1) + 1, first_chunk) + 1
    elif tl.maximum(first_tile_of(chunk), visible_from // TILE) >= tl.minimum(first_tile_of(chunk + 1), reach):
        return  # no row has such a chunk

    k += kv_head.to(tl.int64) * stride_k_head
    v += kv_head.to(tl.int64) * stride_v_head
    path = bits + tl.where(is_chain, deepest, program) * WORDS  # of the deepest node
    for piece in range(first_chunk, end_chunk):
        is_tile = is_own & (piece == end_chunk - 1)
        first = tl.where(is_tile, own_tile, tl.maximum(first_tile_of(piece), visible_from // TILE))
        end = tl.where(is_tile, reach + 1, tl.minimum(first_tile_of(piece + 1), reach))
        flat_end = tl.where(is_tile, first, tl.maximum(tl.minimum(end, flat), first))

        largest = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        weighted = tl.zeros([ROWS, BLOCK_D], tl.float32)
        for tile in range(first, flat_end):
            positions = tile * TILE + tl.arange(0, TILE)
            wanted, visible = None, None
            if window is not None:
                wanted = positions >= visible_from  # no row sees the others, so they may hold anything
                visible = positions[None, :] > (position - window)[:, None]
            page, slot = locate(positions, wanted, batch, block_table, table_width, PAGE)
            keys = load_rows(k, page, slot, wanted, stride_k_batch, stride_k_slot, HEAD_DIM, BLOCK_D, UPCAST)
            largest, total, weights, keep = fold_keys(query, keys, visible, largest, total, scale, softcap)
            values = load_rows(v, page, slot, wanted, stride_v_batch, stride_v_slot, HEAD_DIM, BLOCK_D, UPCAST)
            weighted = fold_values(weights, keep, values, weighted)

        low = tl.where(is_tile, row_tile * TILE, 0)  # the first and the last position that a row sees here
        high = tl.where(is_tile, position, row_tile * TILE - 1)
        if window is not None:
            low = tl.maximum(low, position - window + 1)
        for tile in range(flat_end, end):
            positions = tile * TILE + tl.arange(0, TILE)
            ancestors = ancestor_at(tl.maximum(positions - prefix, 0), path, WORDS)
            slots = tl.where(positions < prefix, positions, prefix + ancestors)
            wanted = (positions >= visible_from) & (positions <= prefix + deepest)
            visible = (positions[None, :] >= low[:, None]) & (positions[None, :] <= high[:, None])
            page, slot = locate(slots, wanted, batch, block_table, table_width, PAGE)
            keys = load_rows(k, page, slot, wanted, stride_k_batch, stride_k_slot, HEAD_DIM, BLOCK_D, UPCAST)
            largest, total, weights, keep = fold_keys(query, keys, visible, largest, total, scale, softcap)
            values = load_rows(v, page, slot, wanted, stride_v_batch, stride_v_slot, HEAD_DIM, BLOCK_D, UPCAST)
            weighted = fold_values(weights, keep, values, weighted)

        # A node whose chunk goes on in the tree folds it whole in its own program.
        is_shared = is_own | is_chain | (first_tile_of(piece + 1) <= whole_tiles)
        stored = used & (row_tile <= tl.where(is_shared, row_tile, whole_tiles))
        state = tl.program_id(1).to(tl.int64) * (chunks + 1) + tl.where(is_tile, chunks, piece)
        states = state * nodes * GROUP + node * GROUP + (head - kv_head * GROUP)
        dims = tl.arange(0, BLOCK_D)
        tl.store(chunk_largest + states, largest, mask=stored)
        tl.store(chunk_total + states, total, mask=stored)
        mask = stored[:, None] & (dims < HEAD_DIM)[None, :]
        tl.store(chunk_weighted + states[:, None] * HEAD_DIM + dims[None, :], weighted, mask=mask)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def merge_kernel(
    # Pointers
    ancestor_bits,  # [B, T, ceil(T / 32)]
    prefix_lens,  # [B]
    chunk_largest,  # [B, Hkv, chunks + 1, T * group]; the last is of the rows' own tiles
    chunk_total,  # [B, Hkv, chunks + 1, T * group]
    chunk_weighted,  # [B, Hkv, chunks + 1, T * group, D]
    out,  # [B, Hq, T, D], written
    lse,  # [B, Hq, T], written
    # Sizes
    nodes,
    chunks,
    # Scores
    window,
    # Strides
    stride_out_batch,
    stride_out_head,
    stride_out_node,
    # Constants
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WORDS: tl.constexpr,
    IS_EARLY: tl.constexpr,
):
    """Finishes one row: its own tile, then its chunks, 16 at a time from a multiple of 16 on."""
    wait_for_earlier(IS_EARLY)
    row = tl.program_id(0)
    batch, kv_head = tl.program_id(1) // KV_HEADS, tl.program_id(1) % KV_HEADS
    node, head = row // GROUP, kv_head * GROUP + row % GROUP
    prefix = tl.load(prefix_lens + batch)
    depth = depth_of(ancestor_bits + (batch.to(tl.int64) * nodes + node) * WORDS, WORDS)
    position = prefix + depth
    first_tile, end_tile = 0, position // TILE
    if window is not None:
        first_tile = tl.maximum(position - window + 1, 0) // TILE
    first_chunk, end_chunk = chunk_of(first_tile), chunk_of(end_tile - 1) + 1
    if (depth < 0) | (first_tile >= end_tile):
        end_chunk = 0

    dims = tl.arange(0, BLOCK_D)
    there = dims < HEAD_DIM
    states = tl.program_id(1).to(tl.int64) * (chunks + 1) * nodes * GROUP + row
    own = states + chunks.to(tl.int64) * nodes * GROUP
    is_node = depth >= 0  # padding has stored nothing
    largest = tl.where(is_node, tl.load(chunk_largest + own), float("-inf"))
    total = tl.where(is_node, tl.load(chunk_total + own), 0.0)
    weighted = tl.load(chunk_weighted + own * HEAD_DIM + dims, mask=dims < tl.where(is_node, HEAD_DIM, 0), other=0.0)
    for first in range(first_chunk // AT_ONCE * AT_ONCE, end_chunk, AT_ONCE):
        chunk = first + tl.arange(0, AT_ONCE)
        wanted = (chunk >= first_chunk) & (chunk < end_chunk)
        places = states + chunk.to(tl.int64) * nodes * GROUP
        chunk_max = tl.load(chunk_largest + places, mask=wanted, other=float("-inf"))
        chunk_sum = tl.load(chunk_total + places, mask=wanted, other=0.0)
        mask = wanted[:, None] & there[None, :]
        values = tl.load(chunk_weighted + places[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0)
        now = tl.maximum(largest, tl.max(chunk_max, 0))
        shift = tl.where(now == float("-inf"), 0.0, now)
        keep, weights = tl.exp2(largest - shift), tl.exp2(chunk_max - shift)
        total = total * keep + tl.sum(chunk_sum * weights, 0)
        weighted = weighted * keep + tl.sum(values * weights[:, None], 0)
        largest = now

    total = tl.where(total == 0.0, 1.0, total)  # saw nothing: 0 and -inf
    out += (
        batch.to(tl.int64) * stride_out_batch
        + head.to(tl.int64) * stride_out_head
        + node.to(tl.int64) * stride_out_node
    )
    tl.store(out + dims, (weighted / total).to(out.dtype.element_ty), mask=there)
    tl.store(lse + (batch.to(tl.int64) * KV_HEADS * GROUP + head) * nodes + node, (largest + tl.log2(total)) * LN_2)


# ==== launch ====


def program_rows(head_dim: int, dtype: torch.dtype) -> int:
    """Query rows of a program. The number of nodes must never change them: the row rule.

    Unused rows cost tensor-core time, of which there is enough. Without tensor cores they would cost too much, and
    with wide heads too many registers.
    """
    return 64 if dtype.itemsize == 2 and head_dim <= 128 else 16


def compile_options(head_dim: int, dtype: torch.dtype, is_paged: bool) -> tuple[dict, dict]:
    """Options of fold_kernel and of merge_kernel. The number of nodes must never change them: the row rule."""
    row_bytes = triton.next_power_of_2(head_dim) * dtype.itemsize
    rows = program_rows(head_dim, dtype)
    tiles = max(1, min(2, 96 * 1024 // (2 * TILE.value * row_bytes)))  # of keys and values, on their way
    stages = 1 + tiles * (2 if is_paged else 1)  # the block table is read as far ahead of the keys
    fold = {"num_warps": 4 if rows == 64 else max(4, row_bytes // 64), "num_stages": stages}
    return {**fold, "enable_fp_fusion": False}, {"num_warps": 1, "num_stages": 1, "enable_fp_fusion": False}


def tree_attention(q, k, v, ancestor_bits, prefix_lens, scale, softcap, window, block_table):
    """Launches both kernels; arguments and results of torch.ops.pyspec.tree_attention.

    Nothing waits for the device and grids come from shapes alone, so a CUDA graph can capture the call.
    """
    batch, heads, nodes, head_dim = q.shape
    kv_heads, group = k.shape[1], heads // k.shape[1]
    slots = k.shape[2] if block_table is None else block_table.shape[1] * k.shape[2]
    tiles = slots // TILE.value
    short = SHORT.value * SHORT_CHUNKS.value
    chunks = triton.cdiv(min(tiles, short), SHORT.value) + triton.cdiv(max(tiles - short, 0), LONG.value)
    out = torch.empty_like(q)
    lse = q.new_empty((batch, heads, nodes), dtype=torch.float32)
    if not out.numel():
        return out, lse
    states = (batch, kv_heads, chunks + 1, nodes * group)
    chunk_state = [q.new_empty(shape, dtype=torch.float32) for shape in (states, states, (*states, head_dim))]
    ancestor_bits, prefix_lens = ancestor_bits.contiguous(), prefix_lens.contiguous()
    if block_table is not None:
        block_table = block_table.contiguous()
    table_width = 0 if block_table is None else block_table.shape[1]
    tree = {
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "WORDS": ancestor_bits.shape[2],
        **launch_options(q.device),
    }
    rows = program_rows(head_dim, q.dtype)
    block_heads = min(group, rows)
    programs = nodes + chunks * triton.cdiv(nodes, rows // block_heads)
    fold_options, merge_options = compile_options(head_dim, q.dtype, block_table is not None)
    with torch.cuda.device_of(q):
        fold_kernel[programs * triton.cdiv(group, block_heads), batch * kv_heads](
            *(q, k, v, ancestor_bits, prefix_lens, block_table, *chunk_state),
            *(nodes, chunks, table_width, scale, softcap, window),
            *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3]),
            ROWS=rows,
            PAGE=None if block_table is None else k.shape[2],
            UPCAST=not q.is_cuda and q.dtype == torch.bfloat16,  # the interpreter computes on the bits of bf16
            **tree,
            **fold_options,
        )
        merge_kernel[nodes * group, batch * kv_heads](
            *(ancestor_bits, prefix_lens, *chunk_state, out, lse, nodes, chunks, window, *out.stride()[:3]),
            **tree,
            **merge_options,
        )
    return out, lse
