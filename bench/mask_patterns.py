"""The masks of bench_block_masked_attention: what a user calls to make each, and the same as a predicate.

They are those of the paper (Binary Block Masking, arXiv 2409.15097), but nodes of a tree see all ancestors and a
prefix. The predicates are what FlexAttention is given.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyspec import BlockMask
from pyspec.masks.tiles import FULL, WORD, words_per_block

PATTERNS = ("causal", "all ones", "window", "dilated", "global", "documents", "prefix-LM", "tree", "sparse")
DOCUMENTS, GLOBAL_TOKENS = 16, 64


def window_of(size: int) -> int:
    return min(256, size // 4)


def document_length(size: int) -> int:
    return max(size // DOCUMENTS, 1)


def builder(pattern: str, size: int, device: str) -> Callable[[], BlockMask]:
    """What a user calls to make the mask."""
    window, documents = window_of(size), [document_length(size)] * DOCUMENTS
    if pattern == "tree":
        nodes = size // 3  # 1,365 at 4,096: a complete 4-ary tree of depth 5
        parents = [-1] + [(node - 1) // 4 for node in range(1, nodes)]
        return lambda: BlockMask.from_tree(parents, size // 2, device=device)
    if pattern == "sparse":
        dense = sparse_dense(size).to(device)
        return lambda: BlockMask.from_dense(dense)
    return {
        "causal": lambda: BlockMask.from_documents([size], device=device),
        "all ones": lambda: BlockMask.from_documents([size], causal=False, device=device),
        "window": lambda: BlockMask.from_window(size, window=window, device=device),
        "dilated": lambda: BlockMask.from_window(size, window=window // 2, dilation=2, device=device),
        "global": lambda: BlockMask.from_window(
            size, window=window, global_tokens=GLOBAL_TOKENS, causal=False, device=device
        ),
        "documents": lambda: BlockMask.from_documents(documents, device=device),
        "prefix-LM": lambda: BlockMask.from_documents(documents, inputs=[n // 2 for n in documents], device=device),
    }[pattern]


def predicate(pattern: str, size: int, dense: Tensor) -> Callable:
    """sees(b, h, row, key) of the same mask; one that is not arithmetic is looked up in dense [N, M] bool."""
    window, length = window_of(size), document_length(size)

    def near(row, key):
        return (row - key < window) & (key - row < window)

    def same_document(row, key):
        return row // length == key // length

    return {
        "causal": lambda b, h, row, key: row >= key,
        "all ones": lambda b, h, row, key: row >= 0,
        "window": lambda b, h, row, key: (row >= key) & (row - key < window),
        "dilated": lambda b, h, row, key: (row >= key) & (row - key <= 2 * (window // 2 - 1)) & ((row - key) % 2 == 0),
        "global": lambda b, h, row, key: near(row, key) | (row < GLOBAL_TOKENS) | (key < GLOBAL_TOKENS),
        "documents": lambda b, h, row, key: same_document(row, key) & (row >= key),
        "prefix-LM": lambda b, h, row, key: same_document(row, key) & ((row >= key) | (key % length < length // 2)),
    }.get(pattern, lambda b, h, row, key: dense[row, key])


def sparse_dense(size: int) -> Tensor:
    """A symmetric band that is 2% of all, in a random order that hides it."""
    generator = torch.Generator().manual_seed(size)
    back = (torch.arange(size)[:, None] - torch.arange(size)).abs()
    shuffle = torch.randperm(size, generator=generator)
    return (back <= size // 100)[shuffle][:, shuffle]


def random_tiles(size: int, share: float, device: str) -> BlockMask:
    """Full tiles at random places, as many in each row block."""
    generator = torch.Generator().manual_seed(size)
    height = WORD * words_per_block(size, device)
    places = torch.rand(-(-size // height), -(-size // WORD), generator=generator).argsort(1)
    full = torch.zeros(places.shape, dtype=torch.bool)
    full.scatter_(1, places[:, : max(round(share * places.shape[1]), 1)], True)
    dense = full.repeat_interleave(height, 0).repeat_interleave(WORD, 1)[:size, :size]
    return BlockMask.from_dense(dense.to(device))


def as_variant(mask: BlockMask, variant: str) -> BlockMask:
    """The mask with full tiles made partial: all of them ("base"), or all but the first run in each row block."""
    tile_map = mask._tile_map()
    full = tile_map == FULL
    first = full.to(torch.int8).argmax(-1, keepdim=True)
    gaps = (~full & (torch.arange(full.shape[-1], device=full.device) >= first)).cumsum(-1)
    demoted = full if variant == "base" else full & (gaps > 0)
    ones = torch.full((int(demoted.sum()), *mask.bits.shape[1:]), -1, device=mask.device)  # each reads bits of its own
    tile_map[demoted] = len(mask.bits) + torch.arange(len(ones), dtype=torch.int32, device=mask.device)
    return BlockMask._from_map(tile_map, torch.cat([mask.bits, ones]), mask.rows, mask.keys)
