"""How tree_attention cuts a row's keys, at positions alone, and how what was found of each part becomes one.

Whole tiles lie in chunks, each folded by itself from an empty state; the states are then merged in order, by fours
first. The state of a row is its largest score (in units of log2), the sum of its weights and its weighted values.
"""

import triton
import triton.language as tl

TILE = tl.constexpr(64)  # the key at position p is in tile p // TILE
# Short chunks first, to fill the machine with few rows; then long ones, whose states cost less memory.
SHORT, SHORT_CHUNKS, LONG = tl.constexpr(4), tl.constexpr(16), tl.constexpr(16)  # tiles, how many, tiles
SPAN = tl.constexpr(4)  # states that are merged among themselves first, or each would wait for all before it
AT_ONCE = tl.constexpr(8)  # states that are loaded at once


@triton.jit
def chunk_of(tile):
    return tl.minimum(tile, SHORT * SHORT_CHUNKS) // SHORT + tl.maximum(tile - SHORT * SHORT_CHUNKS, 0) // LONG


@triton.jit
def first_tile_of(chunk):
    return tl.minimum(chunk, SHORT_CHUNKS) * SHORT + tl.maximum(chunk - SHORT_CHUNKS, 0) * LONG


def chunks_of(tiles: int) -> int:
    """How many chunks so many tiles are in."""
    short = SHORT.value * SHORT_CHUNKS.value
    return triton.cdiv(min(tiles, short), SHORT.value) + triton.cdiv(max(tiles - short, 0), LONG.value)


@triton.jit
def empty_state(ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    largest, total = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    return largest, total, tl.zeros([ROWS, BLOCK_D], tl.float32)


@triton.jit
def merge(state, other):
    """Of two states one. An empty one changes no bit of the other, whichever it is."""
    largest, total, weighted = state
    other_largest, other_total, other_weighted = other
    now = tl.maximum(largest, other_largest)
    shift = tl.where(now == float("-inf"), 0.0, now)
    keep, take = tl.exp2(largest - shift), tl.exp2(other_largest - shift)
    return now, total * keep + other_total * take, weighted * keep[:, None] + other_weighted * take[:, None]


@triton.jit
def merge_chunks(
    state,
    # Pointers
    chunk_largest,
    chunk_total,
    chunk_weighted,
    # Where the first state of each row is, how far the next, and which chunks a row has
    states,
    stride,
    first_chunk,
    end_chunk,
    # Constants
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The state merged with those of all chunks of the rows: of a span among themselves, then span after span."""
    dims = tl.arange(0, BLOCK_D)
    begin = tl.min(tl.where(first_chunk < end_chunk, first_chunk, tl.max(end_chunk, 0)), 0) // SPAN * SPAN
    for first in range(begin, tl.max(end_chunk, 0), AT_ONCE):
        for span in tl.static_range(AT_ONCE // SPAN):
            of_span = empty_state(states.shape[0], BLOCK_D)
            for step in tl.static_range(SPAN):
                chunk = first + span * SPAN + step
                wanted = (chunk >= first_chunk) & (chunk < end_chunk)
                places = states + chunk * stride
                largest = tl.load(chunk_largest + places, mask=wanted, other=float("-inf"))
                total = tl.load(chunk_total + places, mask=wanted, other=0.0)
                mask = wanted[:, None] & (dims < HEAD_DIM)[None, :]
                weighted = tl.load(chunk_weighted + places[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0)
                of_span = merge(of_span, (largest, total, weighted))
            state = merge(state, of_span)
    return state
