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
from pyspec.kernels.flash import LN_2, LOG2_E, fold_keys, fold_values, load_rows
from pyspec.kernels.tree_chunks import TILE, chunk_of, chunks_of, empty_state, first_tile_of, merge_chunks
from pyspec.kernels.tree_paths import depth_of, rows_of_block, slots_of

__all__ = ["compile_options", "finish_kernel", "fold_kernel", "program_rows", "tree_attention"]

FEW = tl.constexpr(16)  # query rows of a program of finish_kernel


@triton.jit
def fold_tile(state, query, tokens, slots, wanted, visible, HEAD_DIM, BLOCK_D: tl.constexpr, UPCAST):
    """Of a sequence's tokens, those at slots [TILE]; wanted and visible: None if all are to all rows."""
    largest, total, weighted = state
    k, v, batch, block_table, table_width, page_size, scale, softcap, strides = tokens
    pages, within = tl.zeros_like(slots) + batch, slots  # without a block table a sequence is one page
    if block_table is not None:
        places = block_table + batch.to(tl.int64) * table_width + slots // page_size
        pages = tl.load(places) if wanted is None else tl.load(places, mask=wanted, other=0)
        within = slots % page_size
    keys = load_rows(k, pages, within, wanted, strides[0], strides[1], HEAD_DIM, BLOCK_D, UPCAST)
    values = load_rows(v, pages, within, wanted, strides[2], strides[3], HEAD_DIM, BLOCK_D, UPCAST)
    largest, total, weights, keep = fold_keys(query, keys, visible, largest, total, scale, softcap)
    return largest, total, fold_values(weights, keep, values, weighted)


@triton.jit
def lowest_of(position, window, CHUNKED: tl.constexpr):
    """The first position that a row sees with a window, which slides or begins at a multiple of its length."""
    return position // window * window if CHUNKED else position - window + 1


@triton.jit
def fold_sink(score, used, largest, total, weighted):
    """One more key into the states of used rows, with a score in units of log2 and no value."""
    most = tl.where(used, tl.maximum(largest, score), 0.0)
    keep = tl.where(used, tl.exp2(largest - most), 1.0)
    total = tl.where(used, total * keep + tl.exp2(score - most), total)
    return tl.where(used, most, largest), total, weighted * keep[:, None]


# ==== kernels ====

# The numbers of a call that change from round to round must not compile the kernel anew.
UNSPECIALIZED = ["nodes", "chunks", "table_width", "window"]


@triton.jit(do_not_specialize=UNSPECIALIZED)
def fold_kernel(
    # Pointers
    q,  # [B, Hq, T, D]
    k,  # [B, Hkv, S, D] or [P, Hkv, page, D]
    v,  # like k
    ancestor_bits,  # [B, T, WORDS]
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
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    PAGE: tl.constexpr,
    CHUNKED: tl.constexpr,  # whether windows begin at multiples of their length
    UPCAST: tl.constexpr,
    IS_EARLY: tl.constexpr,
):
    """Folds one chunk into the states of a block of rows."""
    NODES: tl.constexpr = ROWS // GROUP if GROUP < ROWS else 1  # of a block
    HEAD_BLOCKS: tl.constexpr = (GROUP + ROWS - 1) // ROWS
    wait_for_earlier(IS_EARLY)
    batch, kv_head = tl.program_id(1) // KV_HEADS, tl.program_id(1) % KV_HEADS
    prefix = tl.load(prefix_lens + batch)
    root = tl.program_id(0) // HEAD_BLOCKS % tl.cdiv(nodes, NODES) * NODES
    chunk = tl.program_id(0) // HEAD_BLOCKS // tl.cdiv(nodes, NODES)
    bits = ancestor_bits + batch.to(tl.int64) * nodes * WORDS
    head_block = tl.program_id(0) % HEAD_BLOCKS
    node, head, depth, there, is_chain = rows_of_block(root, head_block, bits, nodes, GROUP, ROWS, WORDS)
    q += batch.to(tl.int64) * stride_q_batch + kv_head * GROUP * stride_q_head
    query = load_rows(q, head, node, there, stride_q_head, stride_q_node, HEAD_DIM, BLOCK_D, UPCAST)
    deepest = tl.max(depth, 0)
    if deepest < 0:
        return  # padding sees nothing
    position = prefix + depth  # of the row itself
    row_end = position // TILE * TILE  # of what lies in whole tiles for it
    nearest = prefix + tl.where(is_chain, root, 0)  # no row is before it
    visible_from = 0
    if window is not None:
        visible_from = tl.maximum(lowest_of(nearest, window, CHUNKED), 0)
    first = tl.maximum(first_tile_of(chunk), visible_from // TILE)
    end = tl.minimum(first_tile_of(chunk + 1), (prefix + deepest) // TILE)
    if first >= end:
        return  # no row has such a chunk
    flat_end = tl.maximum(tl.minimum(end, nearest // TILE), first)  # all rows see the tiles before it where they lie
    k += kv_head.to(tl.int64) * stride_k_head
    v += kv_head.to(tl.int64) * stride_v_head
    strides = (stride_k_batch, stride_k_slot, stride_v_batch, stride_v_slot)
    tokens = (k, v, batch, block_table, table_width, PAGE, scale, softcap, strides)
    state = empty_state(ROWS, BLOCK_D)
    for tile in range(first, flat_end):
        positions = tile * TILE + tl.arange(0, TILE)
        wanted, visible = None, None
        if window is not None:
            wanted = positions >= visible_from  # no row sees the others, so they may hold anything
            visible = positions[None, :] >= lowest_of(position, window, CHUNKED)[:, None]
        state = fold_tile(state, query, tokens, positions, wanted, visible, HEAD_DIM, BLOCK_D, UPCAST)

    # Tiles with keys of the tree, which few rounds have: for one node after another, or for a chain at once.
    for tile in range(flat_end, end):
        for member in range(root, tl.where(is_chain, root + 1, tl.minimum(root + NODES, nodes))):
            path = bits + tl.where(is_chain, deepest, member) * WORDS
            last = prefix + depth_of(path, WORDS)
            positions = tile * TILE + tl.arange(0, TILE)
            slots = slots_of(positions, prefix, path, WORDS)
            wanted = (positions >= visible_from) & (positions <= last)
            visible = positions[None, :] < tl.where(is_chain | (node == member), row_end, 0)[:, None]
            if window is not None:
                visible &= positions[None, :] >= lowest_of(position, window, CHUNKED)[:, None]
            state = fold_tile(state, query, tokens, slots, wanted, visible, HEAD_DIM, BLOCK_D, UPCAST)

    largest, total, weighted = state
    states = (tl.program_id(1).to(tl.int64) * chunks + chunk) * nodes * GROUP + node * GROUP + head
    dims = tl.arange(0, BLOCK_D)
    tl.store(chunk_largest + states, largest, mask=depth >= 0)
    tl.store(chunk_total + states, total, mask=depth >= 0)
    mask = (depth >= 0)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(chunk_weighted + states[:, None] * HEAD_DIM + dims[None, :], weighted, mask=mask)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def finish_kernel(
    # Pointers
    q,  # [B, Hq, T, D]
    k,  # [B, Hkv, S, D] or [P, Hkv, page, D]
    v,  # like k
    ancestor_bits,  # [B, T, WORDS]
    prefix_lens,  # [B]
    block_table,  # [B, table_width] or None
    chunk_largest,  # [B, Hkv, chunks, T * group]
    chunk_total,  # [B, Hkv, chunks, T * group]
    chunk_weighted,  # [B, Hkv, chunks, T * group, D]
    sinks,  # [Hq], scores of a key without a value; or None
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
    PAGE: tl.constexpr,
    CHUNKED: tl.constexpr,  # whether windows begin at multiples of their length
    UPCAST: tl.constexpr,
    IS_EARLY: tl.constexpr,
):
    """Folds what is a node's own tile, or those of a chain of a few nodes; then the chunks, some at a time.

    It waits for fold_kernel only before it merges. Until then it reads what was written before fold_kernel: programs
    of the two run beside each other only after all of fold_kernel's have waited for that.
    """
    NODES: tl.constexpr = FEW // GROUP if GROUP < FEW else 1  # of a block
    HEAD_BLOCKS: tl.constexpr = (GROUP + FEW - 1) // FEW
    batch, kv_head = tl.program_id(1) // KV_HEADS, tl.program_id(1) % KV_HEADS
    prefix = tl.load(prefix_lens + batch)
    program, head_block = tl.program_id(0) // HEAD_BLOCKS, tl.program_id(0) % HEAD_BLOCKS
    root = program // NODES * NODES
    bits = ancestor_bits + batch.to(tl.int64) * nodes * WORDS
    node, head, depth, there, is_chain = rows_of_block(root, head_block, bits, nodes, GROUP, FEW, WORDS)
    if is_chain & (program != root):
        return
    there &= node == tl.where(is_chain, node, program)
    depth = tl.where(there, depth, -1)
    used = depth >= 0  # padding sees nothing
    q += batch.to(tl.int64) * stride_q_batch + kv_head * GROUP * stride_q_head
    query = load_rows(q, head, node, used, stride_q_head, stride_q_node, HEAD_DIM, BLOCK_D, UPCAST)
    k += kv_head.to(tl.int64) * stride_k_head
    v += kv_head.to(tl.int64) * stride_v_head
    strides = (stride_k_batch, stride_k_slot, stride_v_batch, stride_v_slot)
    tokens = (k, v, batch, block_table, table_width, PAGE, scale, softcap, strides)

    deepest = tl.max(depth, 0)
    path = bits + tl.where(is_chain, tl.maximum(deepest, 0), program) * WORDS  # of the deepest node
    position = prefix + depth  # of the row itself
    row_tile = position // TILE
    row_first, visible_from = row_tile * TILE, 0
    nearest = prefix + tl.where(is_chain, root, deepest)  # no row is before it
    if window is not None:
        row_first = tl.maximum(row_first, lowest_of(position, window, CHUNKED))
        visible_from = tl.maximum(lowest_of(nearest, window, CHUNKED), 0)
    state = empty_state(FEW, BLOCK_D)
    for tile in range(nearest // TILE, tl.where(deepest < 0, 0, (prefix + deepest) // TILE + 1)):
        positions = tile * TILE + tl.arange(0, TILE)
        slots = slots_of(positions, prefix, path, WORDS)
        wanted = (positions >= visible_from) & (positions <= prefix + deepest)
        visible = (positions[None, :] >= row_first[:, None]) & (positions[None, :] <= position[:, None])
        visible &= used[:, None]
        state = fold_tile(state, query, tokens, slots, wanted, visible, HEAD_DIM, BLOCK_D, UPCAST)

    wait_for_earlier(IS_EARLY)
    first_tile, end_chunk = tl.zeros_like(row_tile), tl.where(row_tile > 0, chunk_of(row_tile - 1) + 1, 0)
    if window is not None:
        first_tile = tl.maximum(lowest_of(position, window, CHUNKED), 0) // TILE
    end_chunk = tl.where(used & (first_tile < row_tile), end_chunk, 0)
    states = tl.program_id(1).to(tl.int64) * chunks * nodes * GROUP + node * GROUP + head
    largest, total, weighted = merge_chunks(
        *(state, chunk_largest, chunk_total, chunk_weighted),
        *(states, nodes * GROUP, chunk_of(first_tile), end_chunk),
        *(HEAD_DIM, BLOCK_D),
    )
    if sinks is not None:
        score = tl.load(sinks + kv_head * GROUP + head, mask=used, other=0.0) * LOG2_E
        largest, total, weighted = fold_sink(score, used, largest, total, weighted)
    total = tl.where(total == 0.0, 1.0, total)  # saw nothing: 0 and -inf
    dims = tl.arange(0, BLOCK_D)
    out += batch.to(tl.int64) * stride_out_batch
    places = (kv_head * GROUP + head).to(tl.int64) * stride_out_head + node.to(tl.int64) * stride_out_node
    mask = there[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(out + places[:, None] + dims[None, :], (weighted / total[:, None]).to(out.dtype.element_ty), mask=mask)
    rows = (tl.program_id(1).to(tl.int64) * GROUP + head) * nodes + node
    tl.store(lse + rows, (largest + tl.log2(total)) * LN_2, mask=there)


# ==== launch ====


def program_rows(head_dim: int, dtype: torch.dtype) -> int:
    """Query rows of a program of fold_kernel. The number of nodes must never change them: the row rule.

    Unused rows cost tensor-core time, of which there is enough. Without tensor cores they would cost too much, and
    with wide heads too many registers.
    """
    return 64 if dtype.itemsize == 2 and head_dim <= 128 else 16


def compile_options(head_dim: int, dtype: torch.dtype, is_paged: bool) -> tuple[dict, dict]:
    """Options of fold_kernel and of finish_kernel. The number of nodes must never change them: the row rule."""
    row_bytes = triton.next_power_of_2(head_dim) * dtype.itemsize
    rows = program_rows(head_dim, dtype)
    tiles = max(1, min(2, 96 * 1024 // (2 * TILE.value * row_bytes)))  # of keys and values, on their way
    stages = 1 + tiles * (2 if is_paged else 1)  # the block table is read as far ahead of the keys
    warps = max(4, row_bytes // 64)
    fold = {"num_warps": 4 if rows == 64 else warps, "num_stages": stages}
    return {**fold, "enable_fp_fusion": False}, {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": False}


def tree_attention(q, k, v, ancestor_bits, prefix_lens, scale, softcap, window, block_table, sinks=None, chunked=False):
    """Launches both kernels; arguments and results of torch.ops.pyspec.tree_attention.

    Nothing waits for the device and grids come from shapes alone, so a CUDA graph can capture the call.
    """
    batch, heads, nodes, head_dim = q.shape
    if head_dim > 256 and q.dtype.itemsize > 2 and q.is_cuda:  # two tiles of these are more than shared memory
        raise ValueError(f"q must be float16 or bfloat16 for a head_dim of {head_dim} on a GPU, got {q.dtype}")
    kv_heads, group = k.shape[1], heads // k.shape[1]
    slots = k.shape[2] if block_table is None else block_table.shape[1] * k.shape[2]
    chunks = chunks_of(slots // TILE.value)
    out = torch.empty_like(q)
    lse = q.new_empty((batch, heads, nodes), dtype=torch.float32)
    if not out.numel():
        return out, lse
    states = (batch, kv_heads, chunks, nodes * group)
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
        "PAGE": None if block_table is None else k.shape[2],
        "CHUNKED": chunked,
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
        fold_kernel[max(chunks, 1) * blocks, batch * kv_heads](
            *inputs, *numbers, *strides, ROWS=rows, **tree, **fold_options
        )
        finish_kernel[nodes * triton.cdiv(group, FEW.value), batch * kv_heads](
            *inputs, sinks, out, lse, *numbers, *strides, *out.stride()[:3], **tree, **finish_options
        )
    return out, lse
