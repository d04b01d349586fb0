"""BlockMask: which keys each query row sees, as tiles that are empty, full or partial."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from pyspec.arguments import described, is_scalar, read_integer
from pyspec.host import compiled
from pyspec.masks import orders, picture, tiles
from pyspec.masks.spans import Span, dense_of_spans, document_spans, read_sizes, window_spans
from pyspec.masks.tiles import EMPTY, FULL, WORD
from pyspec.masks.trees import TreeAndPrefix, dense_of_trees, parents_of


class BlockMask:
    """Which of M keys each of N query rows sees, by tiles; block_masked_attention visits only those with something.

    Full tiles are named by a list for each row block; so are partial tiles, with 64 x 64 bits that equal tiles share. A
    mask is made by a `from_...` method, and joined with `&` and `|`. It describes one attention pattern for all batch
    entries and heads, or one for each (stack). It is a snapshot and never changes.

    Attributes:
        rows: N.
        keys: M.
        full_ranges: [B or 1, Hq or 1, blocks, 2] int32, begin and end of each row block's list of full tiles.
        partial_ranges: the same of partial tiles.
        full_tiles: [F] int32, key tiles all of whose keys every row of the block sees.
        partial_tiles: [P, 2] int32, key tiles and where their bits are.
        bits: [U, W, 64] int64; bit r of word [u, w, j] says whether row 64 w + r of the tile sees its key j. A row
            block has 64 W rows: 64 on a CPU, 128 on a GPU.
        row_order: [B or 1, N] int32, or None; place i of the tiles holds row row_order[i].
        key_order: [B or 1, M] int32, or None; the same of keys.
    """

    rows: int
    keys: int
    full_ranges: Tensor
    full_tiles: Tensor
    partial_ranges: Tensor
    partial_tiles: Tensor
    bits: Tensor
    row_order: Tensor | None
    key_order: Tensor | None

    def __init__(self, rows, keys, full_ranges, full_tiles, partial_ranges, partial_tiles, bits):
        self.rows, self.keys = rows, keys
        self.full_ranges, self.full_tiles = full_ranges, full_tiles
        self.partial_ranges, self.partial_tiles, self.bits = partial_ranges, partial_tiles, bits
        self.row_order = self.key_order = None
        self._trees: list[TreeAndPrefix] | None = None  # parents and prefix, for depth-first order
        self._dense: list[tuple[weakref.ref, int]] = []  # dense tensors it was built from, and their versions

    # ==== patterns ====

    @classmethod
    def from_dense(cls, visible: Tensor) -> BlockMask:
        """The mask of visible [N, M], [B, N, M] or [B, H, N, M] bool; a B or H of 1 serves all.

        An edit of visible after this makes the mask unusable: check_current, and so attention, raises ValueError.
        """
        if not isinstance(visible, Tensor) or visible.dtype != torch.bool:
            raise TypeError(f"visible must be bool, got {described(visible)}")
        if not 2 <= visible.dim() <= 4:
            raise ValueError(f"visible must be [N, M], [B, N, M] or [B, H, N, M], got shape {tuple(visible.shape)}")
        rows, keys = visible.shape[-2:]
        missing = (1,) * (4 - visible.dim())
        dense = visible.reshape(*visible.shape[:-2], *missing, rows, keys)
        mask = cls._from_map(*tiles.of_dense(dense, tiles.words_per_block(rows, visible.device)), rows, keys)
        if not visible.is_inference():
            mask._dense.append((weakref.ref(visible), visible._version))
        return mask

    @classmethod
    def from_predicate(
        cls, predicate: Callable, rows: int, keys: int, *, batch: int = 1, heads: int = 1, device="cpu"
    ) -> BlockMask:
        """The mask whose row i sees key j where predicate(b, h, i, j) is true.

        predicate is given int32 tensors that broadcast against one another and returns a bool tensor, like a mask_mod
        of FlexAttention. It is asked about every pair: the other constructors are faster.
        """
        rows, keys, batch, heads = read_sizes(rows=rows, keys=keys, batch=batch, heads=heads)
        return cls._from_map(*tiles.of_predicate(predicate, rows, keys, batch, heads, device), rows, keys)

    @classmethod
    def from_documents(
        cls,
        lengths: Sequence[int],
        *,
        causal: bool = True,
        inputs: Sequence[int] | None = None,
        prefix: int = 0,
        device="cpu",
    ) -> BlockMask:
        """Documents one after another: a row sees its own document, up to itself if causal.

        Args:
            lengths: of the documents; N is their sum. [n] is plain causal attention.
            inputs: for each document, how many of its first tokens all of its rows see, also if causal (prefix-LM).
            prefix: keys before the documents that every row sees, such as a cached shared prompt; M is N + prefix.

        Raises:
            ValueError: a length is negative or does not fit.
        """
        (prefix,) = read_sizes(prefix=prefix)
        spans = document_spans(lengths, causal, inputs, prefix)
        rows = len(spans[0][0])
        return cls._from_spans(spans, rows, rows + prefix, device)

    @classmethod
    def from_window(
        cls,
        rows: int,
        keys: int | None = None,
        *,
        window: int | None = None,
        dilation: int = 1,
        global_tokens: int = 0,
        causal: bool = True,
        device="cpu",
    ) -> BlockMask:
        """Sliding windows, as Longformer has them: plain, dilated, with global tokens.

        Row i stands at position p = i + M - N. It sees itself and window - 1 keys before it, dilation apart, and unless
        causal as many after it. The first global_tokens positions see all and are seen by all, but if causal only from
        behind. Without a window: all keys, or if causal all up to p.

        Raises:
            ValueError: a size is negative, window or dilation is below 1, or M is below N.
        """
        keys = rows if keys is None else keys
        rows, keys, global_tokens = read_sizes(rows=rows, keys=keys, global_tokens=global_tokens)
        if keys < rows:
            raise ValueError(f"keys must be at least rows ({rows}), got {keys}")
        window = None if window is None else read_integer("window", window)
        dilation = read_integer("dilation", dilation)
        for name, value in (("window", 1 if window is None else window), ("dilation", dilation)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        return cls._from_spans(window_spans(rows, keys, window, dilation, global_tokens, causal), rows, keys, device)

    @classmethod
    def _from_spans(cls, spans: list[Span], rows: int, keys: int, device) -> BlockMask:
        words = tiles.words_per_block(rows, device)
        if (module := compiled()) is None:
            visible = dense_of_spans(spans, keys)[None, None].to(device)
            return cls._from_map(*tiles.of_dense(visible, words), rows, keys)
        mask = cls(rows, keys, *(torch.from_numpy(array) for array in module.span_tiles(spans, rows, keys, words)))
        return mask if torch.device(device).type == "cpu" else mask.to(device)

    @classmethod
    def from_tree(cls, trees, prefix: int | Sequence[int] = 0, *, device="cpu") -> BlockMask:
        """Nodes of a draft tree see a committed prefix and their own ancestors, like tree_attention.

        Args:
            trees: a DraftTree or its parents [T], or for a batch a list of them. N is the largest T; the rows that a
                smaller tree lacks see nothing.
            prefix: committed keys before the tree's; a list for a list of trees. M is the largest prefix + T.

        Raises:
            ValueError: parents are not topological, or prefix is negative or not one for each tree.
        """
        if isinstance(trees, (list, tuple)) and trees and not is_scalar(trees[0]):
            prefixes = [prefix] * len(trees) if is_scalar(prefix) else list(prefix)
        else:
            trees, prefixes = [trees], [prefix]
        if len(prefixes) != len(trees):
            raise ValueError(f"prefix must be one for each of {len(trees)} trees, got {len(prefixes)}")
        sizes = [read_sizes(prefix=n)[0] for n in prefixes]
        return cls._from_parents([(parents_of(tree), n) for tree, n in zip(trees, sizes, strict=True)], device)

    @classmethod
    def _from_parents(cls, described: list[TreeAndPrefix], device) -> BlockMask:
        rows = max(len(parents) for parents, _ in described)
        keys = max(len(parents) + n for parents, n in described)
        words = tiles.words_per_block(rows, device)
        if (module := compiled()) is None:
            visible = dense_of_trees(described, rows, keys).to(device)
            mask = cls._from_map(*tiles.of_dense(visible, words), rows, keys)
        else:
            lists = module.tree_tiles(described, rows, keys, words)
            mask = cls(rows, keys, *(torch.from_numpy(array) for array in lists))
            if device != "cpu":
                mask = mask.to(device)
        mask._trees = described
        return mask

    @staticmethod
    def stack(masks: Sequence[BlockMask], *, heads: bool = False) -> BlockMask:
        """One mask for each batch entry, or for each query head, from masks of one shape."""
        if not masks:
            raise ValueError("masks must not be empty")
        first = masks[0]
        maps, start = [], 0
        for mask in masks:
            first._check_like(mask, "masks")
            if mask.full_ranges.shape[:2] != (1, 1):
                raise ValueError("masks must each be for all batch entries and heads")
            tile_map = mask._tile_map()
            maps.append(torch.where(tile_map >= 0, tile_map + start, tile_map))
            start += len(mask.bits)
        bits = torch.cat([mask.bits for mask in masks])
        stacked = BlockMask._from_map(torch.cat(maps, 1 if heads else 0), bits, first.rows, first.keys)
        stacked._dense = [source for mask in masks for source in mask._dense]
        return stacked

    # ==== what it holds ====

    @property
    def device(self) -> torch.device:
        return self.bits.device

    @property
    def density(self) -> float:
        """The share of tiles that are visited, because they are not empty."""
        blocks = self.full_ranges.shape[:3].numel()
        count = blocks * -(-self.keys // WORD)
        return (len(self.full_tiles) + len(self.partial_tiles)) / count if count else 0.0

    def to_dense(self) -> Tensor:
        """The mask as a tensor [B or 1, Hq or 1, N, M] bool."""
        dense = self._dense_in_order()
        if self.row_order is None:
            return dense.contiguous()
        rows = torch.argsort(self.row_order.long(), -1)[:, None, :, None].expand(dense.shape)
        keys = torch.argsort(self.key_order.long(), -1)[:, None, None].expand(dense.shape)
        return dense.gather(2, rows).gather(3, keys)

    def _dense_in_order(self) -> Tensor:
        """to_dense, rows and keys in the order that the tiles have them in."""
        visible = tiles.unpack(self._words())  # [B, H, R, C, W, 64 keys, 64 rows]
        batch, heads, blocks, columns, per_block = visible.shape[:5]
        shape = (batch, heads, blocks * per_block * WORD, columns * WORD)
        return visible.permute(0, 1, 2, 4, 6, 3, 5).reshape(shape)[..., : self.rows, : self.keys]

    def to(self, device) -> BlockMask:
        """This mask on another device."""
        moved = copy.copy(self)
        moved._dense = self._dense
        for name in ("full_ranges", "full_tiles", "partial_ranges", "partial_tiles", "bits", "row_order", "key_order"):
            tensor = getattr(self, name)
            setattr(moved, name, None if tensor is None else tensor.to(device))
        return moved

    def check_current(self) -> None:
        """Raises ValueError if the dense tensor that this mask was built from has been edited since."""
        for reference, version in self._dense:
            visible = reference()
            if visible is not None and visible._version != version:
                raise ValueError("mask must be built again: the dense tensor that it was built from has been edited")

    def plot(self, axis=None):
        """Draws the tiles with matplotlib (full blue, partial orange) and what rows see (dark); returns the axis."""
        height = WORD * self.bits.shape[1]
        tile_map = self._tile_map()[0, 0].cpu()
        kinds = torch.where(tile_map == FULL, 2, torch.where(tile_map == EMPTY, 0, 1))
        seen = self._dense_in_order()[0, 0].float().cpu()
        axis = picture.draw(kinds.numpy(), seen.numpy(), height, WORD, axis)
        axis.set_title(f"{self.density:.1%} of tiles of {height} x {WORD} visited")
        return axis

    def __repr__(self) -> str:
        batch, heads = self.full_ranges.shape[:2]
        return (
            f"BlockMask(rows={self.rows}, keys={self.keys}, batch={batch}, heads={heads}, "
            f"full_tiles={len(self.full_tiles)}, partial_tiles={len(self.partial_tiles)}, density={self.density:.3f})"
        )

    def __getstate__(self) -> dict:
        """The state that pickle and copy keep: all but the dense tensor that the mask was built from.

        A copy does not look at later edits of that tensor. Raises ValueError where it has been edited already.
        """
        self.check_current()
        return vars(self) | {"_dense": []}

    # ==== masks from masks ====

    def __and__(self, other: BlockMask) -> BlockMask:
        """The mask of the keys that both masks let a row see."""
        return self._combine(other, torch.bitwise_and, FULL, EMPTY)

    def __or__(self, other: BlockMask) -> BlockMask:
        """The mask of the keys that either mask lets a row see."""
        return self._combine(other, torch.bitwise_or, EMPTY, FULL)

    def _combine(self, other: BlockMask, operation: Callable, neutral: int, absorbing: int) -> BlockMask:
        if not isinstance(other, BlockMask):
            return NotImplemented
        self._check_like(other, "other")
        joined = tiles.join(self._tile_map(), self.bits, other._tile_map(), other.bits, operation, neutral, absorbing)
        mask = BlockMask._from_map(*joined, self.rows, self.keys)
        mask._dense = self._dense + other._dense
        return mask

    def slice_rows(self, start: int, stop: int, keys: int | None = None) -> BlockMask:
        """The mask of rows start to stop - 1 and of the first keys, for a cache that has grown no further."""
        keys = self.keys if keys is None else keys
        if not 0 <= start <= stop <= self.rows:
            raise ValueError(f"start and stop must be in order and within {self.rows} rows, got {start} and {stop}")
        if not 0 <= keys <= self.keys:
            raise ValueError(f"keys must be in [0, {self.keys}], got {keys}")
        self._check_unordered("slice_rows")
        per_block, height = self.bits.shape[1], WORD * self.bits.shape[1]
        first, last = start // height, -(-stop // height)
        words = self._words(first, last).transpose(3, 4)[..., : -(-keys // WORD), :]  # [B, H, R, W, C, 64]
        strips = words.flatten(2, 3)[:, :, (start - first * height) // WORD :]
        words = tiles.cut(strips, start % WORD, stop - start, keys, per_block)
        mask = BlockMask._from_words(words, stop - start, keys)
        mask._dense = self._dense
        return mask

    def permuted(self, order: str | None = None) -> BlockMask:
        """The mask with rows and keys worked on in another order, so that fewer tiles have something.

        Args:
            order: "dfs", depth first, for a mask of from_tree, and the default there; or "rcm", reverse Cuthill-McKee
                by scipy, for a mask with as many rows as keys, whose pattern is taken as symmetric.

        The op reads rows and keys where they are and writes rows where they belong: nothing is copied.
        """
        order = order or ("rcm" if self._trees is None else "dfs")
        self._check_unordered("permuted")
        if order == "dfs":
            if self._trees is None:
                raise ValueError('order must be "rcm" for a mask that was not built by from_tree, got "dfs"')
            described, row_order, key_order = orders.depth_first_trees(self._trees, self.rows, self.keys)
            mask = BlockMask._from_parents(described, self.device)
            mask._trees = self._trees
        elif order == "rcm":
            if self.rows != self.keys or self.full_ranges.shape[1] != 1:
                raise ValueError(f'order "rcm" must be for as many rows as keys and all heads, got {self!r}')
            tile_map = self._tile_map()[:, 0]
            moved, row_order = orders.cuthill_mckee_tiles(tile_map, self._table(), self.rows, self.bits.shape[1])
            mask = BlockMask._from_map(*moved, self.rows, self.keys).to(self.device)
            key_order = row_order
        else:
            raise ValueError(f'order must be "dfs" or "rcm", got {order!r}')
        mask.row_order = torch.from_numpy(np.stack(row_order).astype(np.int32)).to(self.device)
        mask.key_order = torch.from_numpy(np.stack(key_order).astype(np.int32)).to(self.device)
        mask._dense = self._dense
        return mask

    # ==== tile maps [B, H, R, C], words [B, H, R, C, W, 64], and lists ====

    @classmethod
    def _from_map(cls, tile_map: Tensor, bits: Tensor, rows: int, keys: int) -> BlockMask:
        is_partial = tile_map >= 0
        partial_ranges, columns = tiles.lists(is_partial)
        partial_tiles = torch.stack([columns, tile_map[is_partial]], -1)
        return cls(rows, keys, *tiles.lists(tile_map == FULL), partial_ranges, partial_tiles, bits.contiguous())

    @classmethod
    def _from_words(cls, words: Tensor, rows: int, keys: int) -> BlockMask:
        states, bits = tiles.classify(words.flatten(0, 3))
        return cls._from_map(states.view(words.shape[:4]), bits, rows, keys)

    def _tile_map(self) -> Tensor:
        return tiles.of_lists(self.full_ranges, self.full_tiles, self.partial_ranges, self.partial_tiles, self.keys)

    def _table(self) -> Tensor:
        """The meaning [U + 2, W, 64] of a tile map's entries; the last two are empty and full."""
        ends = torch.stack([torch.zeros_like(self.bits[:1].sum(0)), torch.full_like(self.bits[:1].sum(0), -1)])
        return torch.cat([self.bits, ends])

    def _words(self, first: int = 0, last: int | None = None) -> Tensor:
        """The words [B, H, R, C, W, 64] of row blocks first to last - 1."""
        return self._table()[self._tile_map()[:, :, first:last].long()]

    # ==== checks ====

    def _check_like(self, other: BlockMask, name: str) -> None:
        mine = (self.rows, self.keys, self.bits.shape[1], self.device)
        theirs = (other.rows, other.keys, other.bits.shape[1], other.device)
        if mine != theirs:
            raise ValueError(
                f"{name} must have {mine[0]} rows and {mine[1]} keys in blocks of {WORD * mine[2]} rows on {mine[3]}, "
                f"got {theirs[0]} and {theirs[1]} in blocks of {WORD * theirs[2]} on {theirs[3]}"
            )
        self._check_unordered("a combination")
        other._check_unordered("a combination")
        self.check_current()
        other.check_current()

    def _check_unordered(self, use: str) -> None:
        if self.row_order is not None:
            raise ValueError(f"mask must be permuted last: {use} needs one that is not")
