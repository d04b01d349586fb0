"""tree_attention on the GPU: split flash attention over the prefix; then each node's own tile, and one short merge.

fold_kernel: one program per (block of query rows, chunk of key tiles, KV head of a sequence). Its queries and its
online softmax state (largest score, sum, [rows, D] values) stay in registers; keys and values are streamed past them
once, and all nodes of a block share those of the prefix. Bound by reading K and V; with 64 rows the tensor cores take a
third of that time.
finish_kernel: one program per (node, KV head of a sequence) folds the tile that the node itself is in, of few rows and
from few keys, while fold_kernel is still running; then it merges the chunks of its rows to that. Bound by latency.

A row's keys at positions 0 .. p are cut by position alone: whole tiles lie in chunks, and the tile of p itself is
folded apart, so that no node's gathering delays the prefix's programs. Whole tiles that the prefix fills are read in
place. The others are gathered by depth for one node, as plain decoding would see them; where a block's nodes are a
chain (a prompt, T = 1) nothing needs gathering, and the block is folded as one, masked by position.
Row rule: a tile is folded by one binary whether it lies in place or is gathered, a warp's rows beside each other,
without contracting a * b + c; a masked key has weight 0 and changes no bit. So a node gets the bits of plain decoding.
"""

import torch

import triton
import triton.language as tl
from pyspec.kernels.early_launch import launch_options, wait_for_earlier
from pyspec.kernels.flash import LN_2, fold_keys, fold_values, load_rows

__all__ = ["compile_options", "finish_kernel", "fold_kernel", "program_rows", "tree_attention"]

TILE = tl.constexpr(64)  # the key at position p is in tile p // TILE
# Chunks are cut at positions: short ones first, to fill the machine; then long ones, whose states cost less memory.
SHORT, SHORT_CHUNKS, LONG = tl.constexpr(4), tl.constexpr(16), tl.constexpr(16)  # tiles, how many, tiles
FEW = tl.constexpr(16)  # query rows of a program of finish_kernel
SPAN = tl.constexpr(4)  # chunks that are merged among themselves first
AT_ONCE = tl.constexpr(8)  # states that are loaded at once


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


# ==== states ====


@triton.jit
def merge(largest, total, weighted, one_largest, one_total, one_weighted):
    """One state of rows and another. An empty one, whose largest is -inf, changes no bit of the other."""
    now = tl.maximum(largest, one_largest)
    shift = tl.where(now == float("-inf"), 0.0, now)
    keep, take = tl.exp2(largest - shift), tl.exp2(one_largest - shift)
    return now, total * keep + one_total * take, weighted * keep[:, None] + one_weighted * take[:, None]


@triton.jit
def empty_state(ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    return (
        tl.full([ROWS], float("-inf"), tl.float32),
        tl.zeros([ROWS], tl.float32),
        tl.zeros([ROWS, BLOCK_D], tl.float32),
    )


# ==== rows ====


@triton.jit
def block_rows(root, head_block, nodes, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """Node, head within its group and whether there is such a row, [ROWS] each; of a block of nodes from `root` on."""
    HEADS: tl.constexpr = GROUP if GROUP < ROWS else ROWS
    local = tl.arange(0, ROWS)
    node, head = root + local // HEADS, head_block * HEADS + local % HEADS
    there = (local < ROWS // HEADS * HEADS) & (node < nodes) & (head < GROUP)
    return tl.minimum(node, nodes - 1), tl.minimum(head, GROUP - 1), there


@triton.jit
def is_a_chain(node, depth, used):
    """Whether the block's nodes are the tree's first, each the child of the one before."""
    return tl.max((used & (depth != node)).to(tl.int32), 0) == 0


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
    chunk_largest,  # [B, Hkv, chunks / CHUNKS, T * group], written
    chunk_total,  # [B, Hkv, chunks / CHUNKS, T * group], written
    chunk_weighted,  # [B, Hkv, chunks / CHUNKS, T * group, D], written
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
    CHUNKS: tl.constexpr,  # of a state: 1 or SPAN
    PAGE: tl.constexpr,
    UPCAST: tl.constexpr,
    IS_EARLY: tl.constexpr,
):
    """Folds one chunk, or one after another those of a span, into the states of a block of rows."""
    HEADS: tl.constexpr = GROUP if GROUP < ROWS else ROWS  # of a block
    NODES: tl.constexpr = ROWS // HEADS  # of a block
    HEAD_BLOCKS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    wait_for_earlier(IS_EARLY)
    batch, kv_head = tl.program_id(1) // KV_HEADS, tl.program_id(1) % KV_HEADS
    prefix = tl.load(prefix_lens + batch)
    blocks = (nodes + NODES - 1) // NODES
    root = tl.program_id(0) // HEAD_BLOCKS % blocks * NODES
    index = tl.program_id(0) // HEAD_BLOCKS // blocks  # of the states
    node, head, there = block_rows(root, tl.program_id(0) % HEAD_BLOCKS, nodes, GROUP, ROWS)
    q += batch.to(tl.int64) * stride_q_batch
    query = load_rows(q, kv_head * GROUP + head, node, there, stride_q_head, stride_q_node, HEAD_DIM, BLOCK_D, UPCAST)
    bits = ancestor_bits + batch.to(tl.int64) * nodes * WORDS
    depth = tl.where(there, depth_of(bits + node * WORDS, WORDS), -1)
    used = depth >= 0  # padding sees nothing
    deepest = tl.max(depth, 0)
    if deepest < 0:
        return
    is_chain = is_a_chain(node, depth, used)
    position = prefix + depth  # of the row itself
    end_position = position // TILE * TILE  # of the row's whole tiles

    nearest = prefix + tl.where(is_chain, root, 0)  # no row is before it
    visible_from = 0
    if window is not None:
        visible_from = tl.maximum(nearest - window + 1, 0)
    first_of_all = tl.maximum(first_tile_of(index * CHUNKS), visible_from // TILE)
    end_of_all = tl.minimum(first_tile_of((index + 1) * CHUNKS), (prefix + deepest) // TILE)
    if first_of_all >= end_of_all:
        return  # no row has such a chunk
    k += kv_head.to(tl.int64) * stride_k_head
    v += kv_head.to(tl.int64) * stride_v_head
    all_largest, all_total, all_weighted = empty_state(ROWS, BLOCK_D)
    for chunk in range(index * CHUNKS, (index + 1) * CHUNKS):
        first = tl.maximum(first_of_all, first_tile_of(chunk))
        end = tl.minimum(end_of_all, first_tile_of(chunk + 1))
        flat_end = tl.maximum(tl.minimum(end, nearest // TILE), first)  # all rows see those before it where they lie
        largest, total, weighted = empty_state(ROWS, BLOCK_D)
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

        # Tiles with keys of the tree, which few rounds have: for one node after another, or for a chain at once.
        for member in range(root, tl.where(is_chain | (flat_end >= end), root + 1, tl.minimum(root + NODES, nodes))):
            path = bits + tl.where(is_chain, deepest, member) * WORDS
            path_depth = depth_of(path, WORDS)
            for tile in range(flat_end, tl.minimum(end, (prefix + path_depth) // TILE)):
                positions = tile * TILE + tl.arange(0, TILE)
                ancestors = ancestor_at(tl.maximum(positions - prefix, 0), path, WORDS)
                slots = tl.where(positions < prefix, positions, prefix + ancestors)
                wanted = (positions >= visible_from) & (positions <= prefix + path_depth)
                end_visible = tl.where(is_chain | (node == member), end_position, 0)
                visible = positions[None, :] < end_visible[:, None]
                if window is not None:
                    visible &= positions[None, :] > (position - window)[:, None]
                page, slot = locate(slots, wanted, batch, block_table, table_width, PAGE)
                keys = load_rows(k, page, slot, wanted, stride_k_batch, stride_k_slot, HEAD_DIM, BLOCK_D, UPCAST)
                largest, total, weights, keep = fold_keys(query, keys, visible, largest, total, scale, softcap)
                values = load_rows(v, page, slot, wanted, stride_v_batch, stride_v_slot, HEAD_DIM, BLOCK_D, UPCAST)
                weighted = fold_values(weights, keep, values, weighted)
        if CHUNKS == 1:
            all_largest, all_total, all_weighted = largest, total, weighted
        else:
            all_largest, all_total, all_weighted = merge(all_largest, all_total, all_weighted, largest, total, weighted)

    states = (tl.program_id(1).to(tl.int64) * tl.cdiv(chunks, CHUNKS) + index) * nodes * GROUP + node * GROUP + head
    dims = tl.arange(0, BLOCK_D)
    tl.store(chunk_largest + states, all_largest, mask=used)
    tl.store(chunk_total + states, all_total, mask=used)
    mask = used[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(chunk_weighted + states[:, None] * HEAD_DIM + dims[None, :], all_weighted, mask=mask)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def finish_kernel(
    # Pointers
    q,  # [B, Hq, T, D]
    k,  # [B, Hkv, S, D] or [P, Hkv, page, D]
    v,  # like k
    ancestor_bits,  # [B, T, ceil(T / 32)]
    prefix_lens,  # [B]
    block_table,  # [B, table_width] or None
    chunk_largest,  # [B, Hkv, chunks / CHUNKS, T * group]
    chunk_total,  # [B, Hkv, chunks / CHUNKS, T * group]
    chunk_weighted,  # [B, Hkv, chunks / CHUNKS, T * group, D]
    out,  # [B, Hq, T, D], written
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
    CHUNKS: tl.constexpr,  # of a state: 1 or SPAN
    PAGE: tl.constexpr,
    UPCAST: tl.constexpr,
    IS_EARLY: tl.constexpr,
):
    """Folds what is a node's own tile, or those of a chain of a few nodes; then the chunks, some at a time.

    It waits for fold_kernel only before it merges. Until then it reads what was written before fold_kernel: programs
    of the two run beside each other only after all of fold_kernel's have waited for that.
    """
    HEADS: tl.constexpr = GROUP if GROUP < FEW else FEW  # of a block
    NODES: tl.constexpr = FEW // HEADS  # of a block
    HEAD_BLOCKS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    batch, kv_head = tl.program_id(1) // KV_HEADS, tl.program_id(1) % KV_HEADS
    prefix = tl.load(prefix_lens + batch)
    program = tl.program_id(0) // HEAD_BLOCKS
    root = program // NODES * NODES
    node, head, there = block_rows(root, tl.program_id(0) % HEAD_BLOCKS, nodes, GROUP, FEW)
    bits = ancestor_bits + batch.to(tl.int64) * nodes * WORDS
    depth = tl.where(there, depth_of(bits + node * WORDS, WORDS), -1)
    is_chain = is_a_chain(node, depth, depth >= 0)
    if is_chain & (program != root):
        return
    there = there & (node == tl.where(is_chain, node, program))
    depth = tl.where(there, depth, -1)
    used = depth >= 0  # padding sees nothing
    q += batch.to(tl.int64) * stride_q_batch
    query = load_rows(q, kv_head * GROUP + head, node, used, stride_q_head, stride_q_node, HEAD_DIM, BLOCK_D, UPCAST)
    k += kv_head.to(tl.int64) * stride_k_head
    v += kv_head.to(tl.int64) * stride_v_head

    deepest = tl.max(depth, 0)
    path = bits + tl.where(is_chain, tl.maximum(deepest, 0), program) * WORDS  # of the deepest node
    position = prefix + depth
    row_tile = position // TILE
    low = row_tile * TILE  # the first position that a row sees here
    nearest = prefix + tl.where(is_chain, root, deepest)
    visible_from = 0
    if window is not None:
        low = tl.maximum(low, position - window + 1)
        visible_from = tl.maximum(nearest - window + 1, 0)
    largest, total, weighted = empty_state(FEW, BLOCK_D)
    for tile in range(nearest // TILE, tl.where(deepest < 0, 0, (prefix + deepest) // TILE + 1)):
        positions = tile * TILE + tl.arange(0, TILE)
        ancestors = ancestor_at(tl.maximum(positions - prefix, 0), path, WORDS)
        slots = tl.where(positions < prefix, positions, prefix + ancestors)
        wanted = (positions >= visible_from) & (positions <= prefix + deepest)
        visible = (positions[None, :] >= low[:, None]) & (positions[None, :] <= position[:, None]) & used[:, None]
        page, slot = locate(slots, wanted, batch, block_table, table_width, PAGE)
        keys = load_rows(k, page, slot, wanted, stride_k_batch, stride_k_slot, HEAD_DIM, BLOCK_D, UPCAST)
        values = load_rows(v, page, slot, wanted, stride_v_batch, stride_v_slot, HEAD_DIM, BLOCK_D, UPCAST)
        largest, total, weights, keep = fold_keys(query, keys, visible, largest, total, scale, softcap)
        weighted = fold_values(weights, keep, values, weighted)

    wait_for_earlier(IS_EARLY)
    first_chunk, end_chunk = tl.zeros_like(row_tile), tl.where(used & (row_tile > 0), chunk_of(row_tile - 1) + 1, 0)
    if window is not None:
        first_tile = tl.maximum(position - window + 1, 0) // TILE
        first_chunk = chunk_of(first_tile)
        end_chunk = tl.where(first_tile < row_tile, end_chunk, 0)
    states = tl.program_id(1).to(tl.int64) * tl.cdiv(chunks, CHUNKS) * nodes * GROUP + node * GROUP + head
    dims = tl.arange(0, BLOCK_D)
    SPANS: tl.constexpr = AT_ONCE * CHUNKS // SPAN  # at once
    begin = tl.min(tl.where(first_chunk < end_chunk, first_chunk, chunks), 0) // SPAN
    for first in range(begin, tl.cdiv(tl.max(end_chunk, 0), SPAN), SPANS):
        for span in tl.static_range(SPANS):
            span_largest, span_total, span_weighted = empty_state(FEW, BLOCK_D)
            for one in tl.static_range(SPAN // CHUNKS):
                index = (first + span) * (SPAN // CHUNKS) + one
                wanted = (index >= first_chunk // CHUNKS) & (index * CHUNKS < end_chunk)
                places = states + index.to(tl.int64) * nodes * GROUP
                mask = wanted[:, None] & (dims < HEAD_DIM)[None, :]
                one_largest = tl.load(chunk_largest + places, mask=wanted, other=float("-inf"))
                one_total = tl.load(chunk_total + places, mask=wanted, other=0.0)
                one_weighted = tl.load(
                    chunk_weighted + places[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0
                )
                span_largest, span_total, span_weighted = merge(
                    span_largest, span_total, span_weighted, one_largest, one_total, one_weighted
                )
            largest, total, weighted = merge(largest, total, weighted, span_largest, span_total, span_weighted)

    total = tl.where(total == 0.0, 1.0, total)  # saw nothing: 0 and -inf
    head += kv_head * GROUP
    out += batch.to(tl.int64) * stride_out_batch
    places = head.to(tl.int64) * stride_out_head + node.to(tl.int64) * stride_out_node
    mask = there[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(out + places[:, None] + dims[None, :], (weighted / total[:, None]).to(out.dtype.element_ty), mask=mask)
    rows = (batch.to(tl.int64) * KV_HEADS * GROUP + head) * nodes + node
    tl.store(lse + rows, (largest + tl.log2(total)) * LN_2, mask=there)


# ==== launch ====


def program_rows(head_dim: int, dtype: torch.dtype) -> int:
    """Query rows of a program of fold_kernel. The number of nodes must never change them: the row rule.

    Unused rows cost tensor-core time, of which there is enough. Without tensor cores they would cost too much, and
    with wide heads too many registers.
    """
    return 64 if dtype.itemsize == 2 and head_dim <= 128 else 16


def chunks_of_a_state(rows: int) -> int:
    """1, or with many query rows all of a span: enough programs there are then, and states are what costs memory."""
    return 1 if rows <= 64 else SPAN.value


def compile_options(head_dim: int, dtype: torch.dtype, is_paged: bool) -> tuple[dict, dict]:
    """Options of fold_kernel and of finish_kernel. The number of nodes must never change them: the row rule."""
    row_bytes = triton.next_power_of_2(head_dim) * dtype.itemsize
    rows = program_rows(head_dim, dtype)
    tiles = max(1, min(2, 96 * 1024 // (2 * TILE.value * row_bytes)))  # of keys and values, on their way
    stages = 1 + tiles * (2 if is_paged else 1)  # the block table is read as far ahead of the keys
    few = {"num_warps": max(4, row_bytes // 64), "num_stages": 1, "enable_fp_fusion": False}
    return {**few, "num_warps": 4, "num_stages": stages} if rows == 64 else {**few, "num_stages": stages}, few


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
    group_chunks = chunks_of_a_state(nodes * min(group, program_rows(head_dim, q.dtype)))
    states = (batch, kv_heads, triton.cdiv(chunks, group_chunks), nodes * group)
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
        "CHUNKS": group_chunks,
        "PAGE": None if block_table is None else k.shape[2],
        "UPCAST": not q.is_cuda and q.dtype == torch.bfloat16,  # the interpreter computes on the bits of bf16
        **launch_options(q.device),
    }
    rows = program_rows(head_dim, q.dtype)
    blocks = triton.cdiv(nodes, max(1, rows // group)) * triton.cdiv(group, rows)
    fold_options, finish_options = compile_options(head_dim, q.dtype, block_table is not None)
    inputs = (q, k, v, ancestor_bits, prefix_lens, block_table, *chunk_state)
    numbers = (nodes, chunks, table_width, scale, softcap, window)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    with torch.cuda.device_of(q):
        fold_kernel[max(states[2], 1) * blocks, batch * kv_heads](
            *inputs, *numbers, *strides, ROWS=rows, **tree, **fold_options
        )
        finish_kernel[nodes * triton.cdiv(group, FEW.value), batch * kv_heads](
            *inputs, out, lse, *numbers, *strides, *out.stride()[:3], **tree, **finish_options
        )
    return out, lse
