"""Rows sorted by the expert that they chose, in blocks of one expert each, for the kernels of linear.

Numbers of blocks come from shapes alone, so that a CUDA graph can capture a launch: as many as any choice may take;
those that a choice leaves over belong to no expert, and their programs do nothing. One program per expert sorts: it
reads all choices, which are few.
"""

import triton
import triton.language as tl
from pyspec.kernels.early_launch import launch_options, wait_for_earlier

__all__ = ["OPTIONS", "block_rows", "count_kernel", "sort_kernel", "sort_rows"]

CHUNK = tl.constexpr(1024)  # choices that are read at a time
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def block_rows(order, experts, choices, rows, tiles, ROWS: tl.constexpr, IS_EARLY: tl.constexpr):
    """A program's rows of out, `rows` where it has none; those of x; its expert; and how many tiles it has."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    x_row = row
    expert = tl.zeros([], tl.int64)
    if order is not None:
        wait_for_earlier(IS_EARLY)
        owner = tl.load(experts + tl.program_id(0))
        row = tl.where(owner >= 0, tl.load(order + row), rows)
        x_row = tl.minimum(row, rows - 1) // choices
        expert, tiles = tl.maximum(owner, 0).to(tl.int64), tl.where(owner >= 0, tiles, 0)
    return row, x_row, expert, tiles


@triton.jit
def count_kernel(
    ids,  # int32 [pairs]
    counts,  # int32 [experts], written
    pairs,
    IS_EARLY: tl.constexpr,
):
    wait_for_earlier(IS_EARLY)
    expert = tl.program_id(0)
    count = tl.zeros([], tl.int32)
    for first in range(0, pairs, CHUNK):
        pair = first + tl.arange(0, CHUNK)
        count += tl.sum((tl.load(ids + pair, mask=pair < pairs, other=-1) == expert).to(tl.int32), 0)
    tl.store(counts + expert, count)


@triton.jit
def sort_kernel(
    ids,  # int32 [pairs]
    counts,  # int32 [experts]
    order,  # int32 [blocks * ROWS], written: pairs, and `pairs` where a block has none
    experts,  # int32 [blocks], written: the expert of each block, -1 for none
    pairs,
    blocks,
    ROWS: tl.constexpr,
    MOST: tl.constexpr,  # experts, as a power of two
    IS_EARLY: tl.constexpr,
):
    wait_for_earlier(IS_EARLY)
    expert, others = tl.program_id(0), tl.arange(0, MOST)
    taken = tl.load(counts + others, mask=others < tl.num_programs(0), other=0)
    taken = (taken + ROWS - 1) // ROWS
    first = tl.sum(tl.where(others < expert, taken, 0), 0)
    end = first + tl.sum(tl.where(others == expert, taken, 0), 0)
    within = tl.arange(0, ROWS)
    for block in range(first, end):
        tl.store(experts + block, expert)
        tl.store(order + block * ROWS + within, tl.zeros([ROWS], tl.int32) + pairs)
    if expert == tl.num_programs(0) - 1:
        for block in range(end, blocks):
            tl.store(experts + block, -1)
    tl.debug_barrier()
    found = first * ROWS
    for start in range(0, pairs, CHUNK):
        pair = start + tl.arange(0, CHUNK)
        is_own = (tl.load(ids + pair, mask=pair < pairs, other=-1) == expert).to(tl.int32)
        place = found + tl.cumsum(is_own, 0) - 1
        tl.store(order + place, pair, mask=is_own > 0)
        found += tl.sum(is_own, 0)


def sort_rows(ids, experts, height):
    """Blocks of `height` rows for choices ids [R, C]: their rows of out [blocks * height], and their experts."""
    pairs = ids.numel()
    blocks = triton.cdiv(pairs, height) + min(pairs, experts)
    counts = ids.new_empty(experts)
    order, owners = ids.new_empty(blocks * height), ids.new_empty(blocks)
    early = launch_options(ids.device)
    count_kernel[(experts,)](ids, counts, pairs, **OPTIONS, **early)
    most = max(2, triton.next_power_of_2(experts))
    sort_kernel[(experts,)](ids, counts, order, owners, pairs, blocks, ROWS=height, MOST=most, **OPTIONS, **early)
    return order, owners
