"""A mask's lists turned around for the backward of block_masked_attention: for each key tile the row blocks with it.

A program has one key tile and looks for it in the ascending lists of many row blocks at a time, by halving.
"""

import torch

import triton
import triton.language as tl

__all__ = ["lists_by_key", "lists_kernel"]

BLOCKS = tl.constexpr(128)  # row blocks that are looked through at a time


@triton.jit
def find(tile, listed, step, ranges, is_block, steps):
    """Where a tile is in the ascending list of each row block, and whether it is there."""
    low = tl.load(ranges, mask=is_block, other=0)
    end = tl.load(ranges + 1, mask=is_block, other=0)
    high = end
    for _ in range(steps):
        middle = (low + high) // 2
        is_before = (tl.load(listed + middle * step, mask=low < high, other=0) < tile) & (low < high)
        low, high = tl.where(is_before, middle + 1, low), tl.where(is_before, high, middle)
    return low, (low < end) & (tl.load(listed + low * step, mask=low < end, other=-1) == tile)


@triton.jit(do_not_specialize=["blocks", "steps"])
def lists_kernel(
    full_ranges,  # [L, blocks, 2]
    full_tiles,  # [F]
    partial_ranges,  # [L, blocks, 2]
    partial_tiles,  # [P, 2]
    counts,  # [L, tiles, 2], written: of full and of partial
    full_blocks,  # [L, tiles, blocks], written
    partial_blocks,  # [L, tiles, blocks, 2], written: row block and where its bits are
    blocks,
    steps,  # of a search through tiles
):
    """One key tile of a mask: the row blocks that have it in their lists, in order."""
    tile, tiles = tl.program_id(0), tl.num_programs(0)
    index = tl.program_id(1).to(tl.int64)
    full_ranges += index * blocks * 2
    partial_ranges += index * blocks * 2
    full_blocks += (index * tiles + tile) * blocks
    partial_blocks += (index * tiles + tile) * blocks * 2
    full_count = tl.zeros([], tl.int32)
    partial_count = tl.zeros([], tl.int32)
    for first in range(0, blocks, BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        is_block = block < blocks
        _, found = find(tile, full_tiles, 1, full_ranges + 2 * block, is_block, steps)
        place = full_count + tl.cumsum(found.to(tl.int32), 0) - 1
        tl.store(full_blocks + place, block, mask=found)
        full_count += tl.sum(found.to(tl.int32), 0)
        at, found = find(tile, partial_tiles, 2, partial_ranges + 2 * block, is_block, steps)
        place = partial_count + tl.cumsum(found.to(tl.int32), 0) - 1
        tl.store(partial_blocks + 2 * place, block, mask=found)
        tl.store(partial_blocks + 2 * place + 1, tl.load(partial_tiles + 2 * at + 1, mask=found), mask=found)
        partial_count += tl.sum(found.to(tl.int32), 0)
    tl.store(counts + (index * tiles + tile) * 2, full_count)
    tl.store(counts + (index * tiles + tile) * 2 + 1, partial_count)


def lists_by_key(full_ranges, full_tiles, partial_ranges, partial_tiles, tiles: int):
    """What lists_kernel writes, for a BlockMask's lists and its number of key tiles; nothing waits for the device."""
    batch, heads, blocks = full_ranges.shape[:3]
    counts = full_ranges.new_empty((batch, heads, tiles, 2))
    full_blocks = full_ranges.new_empty((batch, heads, tiles, blocks))
    partial_blocks = full_ranges.new_empty((batch, heads, tiles, blocks, 2))
    found = (counts, full_blocks, partial_blocks)
    with torch.cuda.device_of(full_ranges):
        lists_kernel[(tiles, batch * heads)](
            *(full_ranges, full_tiles, partial_ranges, partial_tiles, *found, blocks, tiles.bit_length())
        )
    return found
