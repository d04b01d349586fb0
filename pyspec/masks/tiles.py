"""What tiles of a mask hold: bools become bits, and tiles become full, empty or partial.

A tile is WORD keys by the rows of a row block, and its bits are words [W, 64]: bit r of word [w, j] says whether row
64 w + r sees key j. A tile map [B, H, R, C] int32 says of every tile of a mask whether it is FULL or EMPTY, or if
partial where in a table of bits [U, W, 64] its own are.

Rows past a mask's last one are like the last: so they make no full tile partial. Keys past the last one are not seen.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from pyspec.host import compiled

WORD = 64  # keys of a tile, and rows that one word of bits holds
FULL, EMPTY = -1, -2
PREDICATE_PAIRS = 2**19  # of a row and a key, that a predicate is asked about at a time


def words_per_block(rows: int, device) -> int:
    """Words of 64 rows in a block: one suits a CPU; a GPU's tensor cores want two where there are 128 rows."""
    return 2 if torch.device(device).type == "cuda" and rows > WORD else 1


def block_count(rows: int, words: int) -> int:
    return -(-rows // (WORD * words))


@functools.cache
def no_bits(words: int, device) -> Tensor:
    return torch.empty((0, words, WORD), dtype=torch.int64, device=device)


def pack(visible: Tensor) -> Tensor:
    """Words [..., n] of bools [..., 64 n], contiguous: bool i becomes bit i."""
    eights = visible.view(torch.int64)  # 8 bools; the product collects their bits in its highest byte
    octets = ((eights * 0x0102040810204080) >> 56).to(torch.uint8)
    return octets.view(torch.int64)


def unpack(words: Tensor) -> Tensor:
    """Bools [..., n, 64] of words [..., n]: bit i becomes bool i."""
    octets = words.contiguous().view(torch.uint8)[..., None]
    bits = (octets >> torch.arange(8, dtype=torch.uint8, device=words.device)) & 1
    return bits.view(torch.bool).view(*words.shape, WORD)


def classify(words: Tensor) -> tuple[Tensor, Tensor]:
    """States [T] int32 of tiles [T, W, 64], as in a tile map, and the bits of the partial ones, in order."""
    is_full, is_empty = (words == -1).all(-1).all(-1), (words == 0).all(-1).all(-1)
    is_partial = ~(is_full | is_empty)
    states = is_partial.cumsum(0, dtype=torch.int32) - 1
    states = torch.where(is_partial, states, torch.where(is_full, FULL, EMPTY).to(torch.int32))
    return states, words[is_partial]


def of_dense(visible: Tensor, words: int) -> tuple[Tensor, Tensor]:
    """The tile map and bits of visible [B, H, N, M] bool."""
    if visible.device.type == "cpu" and (module := compiled()) is not None:
        tile_map, bits = module.dense_tiles(visible.contiguous().numpy(), words)
        # torch gives an empty array strides that a view as int32 refuses.
        return torch.from_numpy(tile_map), torch.from_numpy(bits) if bits.size else no_bits(words, visible.device)
    by_tile = _words_of_dense(visible, words)
    states, bits = classify(by_tile.flatten(0, 3))
    return states.view(by_tile.shape[:4]), bits


def _words_of_dense(visible: Tensor, words: int) -> Tensor:
    """The words [B, H, R, C, W, 64] of a mask [B, H, N, M]."""
    batch, heads, rows, keys = visible.shape
    blocks, columns = block_count(rows, words), -(-keys // WORD)
    missing_rows, missing_keys = blocks * words * WORD - rows, columns * WORD - keys
    if missing_rows:
        visible = torch.cat([visible, visible[:, :, -1:].expand(-1, -1, missing_rows, -1)], 2)
    if missing_keys:
        visible = torch.nn.functional.pad(visible, (0, missing_keys))
    if not visible.numel():
        return torch.zeros((batch, heads, blocks, columns, words, WORD), dtype=torch.int64, device=visible.device)
    octets = visible.contiguous().view(torch.uint8).view(batch, heads, blocks * words, 8, 8, columns * WORD)
    joined = octets[:, :, :, :, 0].clone()
    for bit in range(1, 8):
        joined |= octets[:, :, :, :, bit] << bit
    joined = joined.view(batch, heads, blocks, words, 8, columns, WORD).permute(0, 1, 2, 5, 3, 6, 4)
    return joined.contiguous().view(torch.int64)[..., 0]


def entries(tile_map: Tensor, table: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Batch entry, row and key of everything that is seen; tile_map [B, R, C], table [U + 2, W, 64] of its entries."""
    batch, block, column = (tile_map != EMPTY).nonzero(as_tuple=True)
    visible = unpack(table[tile_map[batch, block, column].long()])  # [E, W, 64 keys, 64 rows]
    at, word, key, row = visible.nonzero(as_tuple=True)
    row = (block[at] * table.shape[1] + word) * WORD + row
    inside = row < rows
    return batch[at][inside], row[inside], (column[at] * WORD + key)[inside]


def of_entries(
    batch: Tensor, row: Tensor, key: Tensor, batches: int, rows: int, keys: int, words: int
) -> tuple[Tensor, Tensor]:
    """The tile map and bits of what `entries` gives, for all heads, in no more memory than those tiles need."""
    height = WORD * words
    shape = (batches, 1, block_count(rows, words), -(-keys // WORD))
    tile_map = torch.full(shape, EMPTY, dtype=torch.int32, device=row.device)
    tile = (batch * tile_map.shape[2] + row // height) * tile_map.shape[3] + key // WORD
    used, which = torch.unique(tile, return_inverse=True)
    visible = torch.zeros((len(used), WORD, height), dtype=torch.bool, device=row.device)
    visible[which, key % WORD, row % height] = True
    if rows % height:
        is_last = used // tile_map.shape[3] % tile_map.shape[2] == tile_map.shape[2] - 1
        visible[is_last, :, rows % height :] = visible[is_last, :, rows % height - 1, None]
    states, bits = classify(pack(visible).transpose(-1, -2))
    tile_map.view(-1)[used] = states
    return tile_map, bits


def lists(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Ranges [B, H, R, 2] and columns, both int32, of the tiles that are chosen [B, H, R, C] bool."""
    counts = chosen.sum(-1, dtype=torch.int32)
    ends = counts.flatten().cumsum(0, dtype=torch.int32).view_as(counts)
    columns = chosen.flatten().nonzero()[:, 0] % max(chosen.shape[-1], 1)
    return torch.stack([ends - counts, ends], -1), columns.to(torch.int32)


def cut(strips: Tensor, first: int, rows: int, keys: int, words: int) -> Tensor:
    """Tiles [B, H, R, C, W, 64] of some rows; `first` lies within the first of strips [B, H, n, C, 64] of 64 rows."""
    if first and strips.shape[2]:
        above = torch.nn.functional.pad(strips[:, :, 1:], (0, 0, 0, 0, 0, 1))
        low = (strips >> first) & ((1 << (WORD - first)) - 1)
        strips = low | (above << (WORD - first))
    count = block_count(rows, words) * words
    strips = torch.nn.functional.pad(strips[:, :, :count], (0, 0, 0, 0, 0, max(count - strips.shape[2], 0)))
    if rows % (WORD * words):  # as everywhere, what comes after the last row is like it
        at, bit = (rows - 1) // WORD, (rows - 1) % WORD
        like_last = -((strips[:, :, at] >> bit) & 1)
        keep = (1 << (bit + 1)) - 1 if bit < WORD - 1 else -1
        strips[:, :, at] = (strips[:, :, at] & keep) | (like_last & ~keep)
        strips[:, :, at + 1 :] = like_last[:, :, None]
    if keys % WORD:
        strips[..., -1, keys % WORD :] = 0
    return strips.unflatten(2, (count // words, words)).transpose(3, 4)


def of_predicate(predicate: Callable, rows: int, keys: int, batch: int, heads: int, device) -> tuple[Tensor, Tensor]:
    """The tile map and the bits of BlockMask.from_predicate, asked some row blocks at a time.

    Raises:
        TypeError: the predicate's answer is not bool.
    """
    words = words_per_block(rows, device)
    b, h, row, key = (torch.arange(n, dtype=torch.int32, device=device) for n in (batch, heads, rows, keys))
    b, h, row = b[:, None, None, None], h[:, None, None], row[:, None]
    blocks = max(PREDICATE_PAIRS // max(batch * heads * keys * WORD * words, 1), 1)
    maps, all_bits = [], [no_bits(words, device)]
    for some_rows in row.split(blocks * WORD * words):
        visible = predicate(b, h, some_rows, key)
        if visible.dtype != torch.bool:
            raise TypeError(f"predicate must return a bool tensor, got {visible.dtype}")
        tile_map, bits = of_dense(visible.expand(batch, heads, len(some_rows), keys), words)
        maps.append(torch.where(tile_map >= 0, tile_map + sum(map(len, all_bits)), tile_map))
        all_bits.append(bits)
    return torch.cat(maps, 2), torch.cat(all_bits)


def of_lists(
    full_ranges: Tensor, full_tiles: Tensor, partial_ranges: Tensor, partial_tiles: Tensor, keys: int
) -> Tensor:
    """The tile map of a BlockMask's lists."""
    batch, heads, blocks = full_ranges.shape[:3]
    shape = (batch, heads, blocks, -(-keys // WORD))
    tile_map = torch.full(shape, EMPTY, dtype=torch.int32, device=full_ranges.device)
    starts = torch.arange(batch * heads * blocks, device=full_ranges.device) * shape[3]
    for ranges, listed, states in (
        (full_ranges, full_tiles, torch.full_like(full_tiles, FULL)),
        (partial_ranges, *partial_tiles.unbind(-1)),
    ):
        counts = (ranges[..., 1] - ranges[..., 0]).flatten()
        tile_map.view(-1)[torch.repeat_interleave(starts, counts) + listed] = states
    return tile_map


def join(
    mine: Tensor, my_bits: Tensor, theirs: Tensor, their_bits: Tensor, operation: Callable, neutral: int, absorbing: int
) -> tuple[Tensor, Tensor]:
    """The tile map and the bits of two masks joined by a bitwise operation.

    A tile that is neutral leaves the other one as it is; one that is absorbing makes the tile absorbing.
    """
    mine, theirs = torch.broadcast_tensors(mine, theirs)
    theirs = torch.where(theirs >= 0, theirs + len(my_bits), theirs)
    joined = torch.where(mine == neutral, theirs, torch.where(theirs == neutral, mine, absorbing)).to(torch.int32)
    both = (mine >= 0) & (theirs >= 0)
    bits = torch.cat([my_bits, their_bits])
    # Equal pairs of tiles, of which patterns are full, are joined once.
    pairs, which = torch.unique(mine[both].long() * len(bits) + theirs[both], return_inverse=True)
    states, new_bits = classify(operation(bits[pairs // max(len(bits), 1)], bits[pairs % max(len(bits), 1)]))
    joined[both] = torch.where(states >= 0, states + len(bits), states)[which]
    return joined, torch.cat([bits, new_bits])
