"""QuantisedCache: keys and values in quantised blocks, read as they are; the last tokens stay in full precision.

The commit rule: nothing is quantised before it is committed, and a block is quantised when the committed length passes
its end, whatever was committed with it. So a cache built from one prompt is the one built token by token, bit for bit,
and a rejected draft never touches a quantised block.

A row sees a block quantised from `window` positions behind the block's end on (pyspec.ops.gear.blocks_seen). Its keys
stay in full precision until no nearer row can come any more.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyspec.caches.dense import KeysAndValues, keep_path
from pyspec.caches.eviction import best_channels, shortest_keys
from pyspec.ops.gear import BLOCK, TreeRows, blocks_seen
from pyspec.ops.gear_encode import LARGEST, find_unquantisable
from pyspec.ops.quantised_ragged import by_tree
from pyspec.tree import DraftTree

if TYPE_CHECKING:
    from pyspec.architectures.rotary import Rope

RECENT = 32  # queries that channels of keys are chosen by


class QuantisedSettings:
    """The base of settings of a QuantisedCache, which are also a format of records: `window`, `encode` and `attend`.

    Attributes:
        encode: records [layers, Hkv, S / 128, record] uint8 of checked keys and values [layers, Hkv, S, D] of a block;
            channels [layers, Hkv, S / 128, C] are those that keys keep, None where they keep all.
        attend: attention of trees of one size in one layer, out like q and lse [B, Hq, T]; arguments as for
            attend_tree.
        attend_ragged: attention of ragged rows in one layer, out like q, arguments as for gear_ragged. Tree by tree
            unless a format has one op for it, which a tape can have.
    """

    keep = 1.0
    whole_layers = 0
    key_channels = 0
    is_of_model = False  # whether it is made for the layers of one model

    def attend_ragged(
        self, layer: int, q, quantised, k, v, numbers: tuple, *, records: int, scale: float, window: int | None
    ) -> Tensor:
        return self.attend_by_tree(layer, q, quantised, k, v, numbers, records=records, scale=scale, window=window)

    def attend_by_tree(
        self,
        layer: int,
        q,
        quantised,
        k,
        v,
        numbers: tuple,
        *,
        records: int,
        scale: float,
        window: int | None,
        chunked: bool = False,
    ) -> Tensor:
        """attend_ragged, tree by tree; chunked: rows see their own chunk of `window` positions."""

        def attend(q, quantised, k, v, rows, records):
            return self.attend(layer, q, quantised, k, v, rows, scale, records)

        return by_tree(attend, window, q, quantised, k, v, *numbers, self.span, records, chunked=chunked)

    @property
    def span(self) -> int:
        """Tokens of a block."""
        return round(BLOCK / self.keep)

    @property
    def records(self) -> int:
        """Records of a block, in a layer that keeps all its tokens."""
        return self.span // BLOCK

    @property
    def largest_tree(self) -> int:
        """Nodes of a tree, or tokens of a chunk of a prompt, at most."""
        return self.window + 1

    def check_window(self) -> None:
        """Raises TypeError or ValueError unless window is a positive integer."""
        if isinstance(self.window, bool) or not isinstance(self.window, int):
            raise TypeError(f"window must be an integer, got {self.window!r}")
        if self.window < 1:
            raise ValueError(f"window must be at least 1, got {self.window}")

    def check_model(self, layers: int, kv_heads: int, head_dim: int, fingerprint: str, frequencies: Tensor) -> None:
        """Raises ValueError unless the keys of a model, whose rotary frequencies these are, can be quantised so."""
        self.check_head_dim(head_dim)

    def effective_bits(self, head_dim: int, length: int) -> float:
        """Bits for each number of a text of so many tokens: its records, and what is kept in 16 bits beside them.

        Tokens of a block that a row may see quantised or not are kept in both forms. Scratch slots for a tree's keys
        are not counted; a cache in full precision has them too. The layers that keep all tokens while others do not
        have the bits of keep = 1.
        """
        self.check_head_dim(head_dim)
        quantised = length // self.span * self.record_bytes(head_dim) * 8
        quantised += RECENT * head_dim * 32 if self.key_channels else 0  # queries
        exact = (length - blocks_seen(length, self.window, self.span) * self.span) * 2 * head_dim * 16
        return (quantised + exact) / (2 * head_dim * length)

    def ready(self, capacity: int, device: torch.device) -> QuantisedSettings:
        """The settings with what a cache of so many tokens needs beside them, on its device."""
        return self

    def start(
        self,
        layers: int,
        sequences: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> QuantisedCache:
        """An empty cache of these sizes."""
        return QuantisedCache(
            self.ready(capacity, device), layers, sequences, kv_heads, capacity, head_dim, dtype, device
        )


class QuantisedCache(KeysAndValues):
    """Keys and values of B sequences, each with its own length.

    `quantised` [layers, B, Hkv, blocks, record] uint8 are the blocks of the layers that keep a share of their tokens,
    one record for each block; `whole` [layers, B, Hkv, blocks * span / 128, record] those of the layers before them,
    which keep all. Where all tokens are kept everywhere, `whole` has no layers. `keys_values`
    [layers, 2, B, Hkv, slots, D] are in full precision the tokens from `starts` on, and behind them, as in a
    DenseCache, scratch for a tree's keys and for those of padding. slots does not grow with the text. Where keys keep
    some of their channels, `queries` [layers, B, Hkv, RECENT + nodes + 1, D] fp32 are squares, summed over a group's
    heads, of the last committed tokens' queries, then of a tree's, then of padding; else it has no layers.

    Args:
        settings: how blocks are quantised.
        layers, sequences, kv_heads, capacity, head_dim: sizes, all at least 1; capacity in tokens of a sequence.
        dtype, device: of keys and values in full precision.

    Raises:
        ValueError: settings do not fit the head_dim.
    """

    angles = None  # positions begin where their cosines and sines do
    is_chunked = False  # whether layers see chunks, which takes more than one op
    blocks_pass = True  # keys in full precision are let go of
    more: int | None = None  # of a view for padded trees: see `extent`
    ropes: Sequence[Rope]  # of each layer, for capacity positions at least
    layers: Sequence[int]  # which of the model's they are, for messages

    def __init__(
        self,
        settings: QuantisedSettings,
        layers: int,
        sequences: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        settings.check_head_dim(head_dim)
        self.settings = settings
        self.layers = range(layers)
        self.capacity = self.room = capacity  # which a restart may make smaller, and the tokens that fit
        self.lengths = [0] * sequences
        self.span = settings.span
        slots = min(capacity, settings.window + self.span - 1 + settings.largest_tree) + 1
        self.keys_values = torch.empty(layers, 2, sequences, kv_heads, slots, head_dim, dtype=dtype, device=device)
        record = settings.record_bytes(head_dim)
        blocks, whole_layers = capacity // self.span, min(settings.whole_layers, layers) if settings.keep < 1 else 0
        self.whole, self.quantised = (
            torch.empty(count, sequences, kv_heads, records, record, dtype=torch.uint8, device=device)
            for count, records in ((whole_layers, blocks * settings.records), (layers - whole_layers, blocks))
        )
        query_layers = layers if settings.key_channels else 0
        shape = (query_layers, sequences, kv_heads, RECENT + settings.largest_tree + 1, head_dim)
        self.queries = torch.zeros(shape, dtype=torch.float32, device=device)

    @property
    def starts(self) -> list[int]:
        """The position of each sequence's first slot in full precision."""
        return [blocks_seen(length, self.settings.window, self.span) * self.span for length in self.lengths]

    @property
    def nbytes(self) -> int:
        """Bytes of everything that was allocated."""
        return self.whole.nbytes + self.quantised.nbytes + self.keys_values.nbytes + self.queries.nbytes

    def check_room(self, sequence: int, count: int) -> None:
        """Raises ValueError unless a tree of count nodes fits behind a sequence's committed tokens."""
        if count > self.settings.largest_tree:
            raise ValueError(
                f"a tree must have at most {self.settings.largest_tree} nodes with {self.settings}, got {count}"
            )
        super().check_room(sequence, count)

    @property
    def blocks(self) -> tuple[int, int]:
        """The window and the span of blocks, which say how many a row sees quantised."""
        return self.settings.window, self.span

    @property
    def is_recordable(self) -> bool:
        """Whether a tape can have attention: where keys keep some channels, queries are summed up by PyTorch's ops."""
        is_one_op = type(self.settings).attend_ragged is not QuantisedSettings.attend_ragged
        return is_one_op and not len(self.queries) and not self.is_chunked

    def extent(self, sequences: Sequence[int], trees: Mapping[int, DraftTree]) -> int:
        """What attention to padded trees is launched for: the most blocks that a node sees and its root does not."""

        def seen(position: int) -> int:
            return blocks_seen(position, self.settings.window, self.span)

        lengths = ((self.lengths[each], int(trees[each].depths.max())) for each in sequences if each in trees)
        return max((seen(length + depth) - seen(length) for length, depth in lengths), default=0)

    def view(self, sequences: Sequence[int], extent: int | None) -> QuantisedCache:
        """The same memory, as a cache of neighbouring sequences, for rows of any trees (None) or of padded ones."""
        view, some = copy.copy(self), slice(sequences[0], sequences[-1] + 1)
        view.whole, view.quantised, view.queries = self.whole[:, some], self.quantised[:, some], self.queries[:, some]
        view.keys_values, view.more = self.keys_values[:, :, some], extent
        return view

    def restart(self, capacity: int) -> None:
        """Empties all sequences, which may now have capacity tokens, at most as many as there is room for."""
        self.lengths = [0] * len(self.lengths)
        self.capacity = capacity
        self.queries.zero_()

    @property
    def block(self) -> int:
        """Tokens that are kept together for other texts."""
        return self.span

    def clear(self, sequence: int) -> None:
        """Empties a sequence."""
        self.lengths[sequence] = 0
        self.queries[:, sequence].zero_()

    def block_of(self, sequence: int, start: int) -> list[Tensor] | None:
        """Copies of what a text that ends with a block has of it: its records, what is in full precision, and queries.

        None where keys in full precision, or queries, have been let go of for those of later tokens.
        """
        block, end, first = start // self.span, start + self.span, self.starts[sequence]
        exact = blocks_seen(end, self.settings.window, self.span) * self.span
        if first > exact or (len(self.queries) and self.lengths[sequence] != end):
            return None
        records = self.settings.records
        parts = (
            self.whole[:, sequence, :, block * records : (block + 1) * records],
            self.quantised[:, sequence, :, block],
            self.keys_values[:, :, sequence, :, exact - first : end - first],
            self.queries[:, sequence, :, :RECENT],
        )
        return [part.clone() for part in parts]

    def begin_with(self, sequence: int, blocks: Sequence[Sequence[Tensor]]) -> None:
        """Makes blocks, from the first on, all that a sequence has committed."""
        records = self.settings.records
        for block, (whole, quantised, _, _) in enumerate(blocks):
            self.whole[:, sequence, :, block * records : (block + 1) * records] = whole
            self.quantised[:, sequence, :, block] = quantised
        _, _, exact, queries = blocks[-1]
        self.keys_values[:, :, sequence, :, : exact.shape[3]] = exact
        self.queries[:, sequence, :, :RECENT] = queries
        self.lengths[sequence] = len(blocks) * self.span

    def plan(self, trees, advances) -> None:
        """Nothing is to be done before a round."""

    def attend(
        self,
        layer: int,
        q: Tensor,
        numbers,
        window: int | None,
        scale: float | None = None,
        softcap: None = None,
        chunked: bool = False,
        notes: bool = True,
    ) -> Tensor:
        """Attention of rows [R, heads, D], whose keys are written, as [R, heads, D]; numbers as in runners.numbers.

        chunked: rows see their own chunk of `window` positions. notes: whether queries count for what keys keep.
        """
        scale = scale or q.shape[-1] ** -0.5
        window = None if window is None or window >= self.room else window
        if layer < len(self.whole):
            quantised, records = self.whole[layer], self.settings.records
        else:
            quantised, records = self.quantised[layer - len(self.whole)], 1
        k, v = self.keys_values[layer]
        if notes and len(self.queries):
            self._note_queries(layer, q, numbers)
        if self.more is None:
            trees = (numbers.ancestor_bits, numbers.seen, numbers.starts, numbers.prefix_lens)
            options = {"scale": scale, "records": records, "window": window}
            if chunked and window is not None:
                return self.settings.attend_by_tree(layer, q, quantised, k, v, trees, **options, chunked=True)
            return self.settings.attend_ragged(layer, q, quantised, k, v, trees, **options)
        of_trees = (len(k), len(q) // len(k))
        bits = numbers.ancestor_bits.unflatten(0, of_trees)[..., : (of_trees[1] + 31) // 32]
        seen = numbers.seen.unflatten(0, of_trees)
        rows = TreeRows(bits, seen, seen[:, :1], numbers.prefix_lens, self.more, self.span)
        if window is not None:
            oldest = (numbers.positions.unflatten(0, of_trees) - (window - 1)).clamp_min(0)
            rows = replace(rows, window=window, oldest=oldest)
        q = q.unflatten(0, of_trees).transpose(1, 2)
        out, _ = self.settings.attend(layer, q, quantised, k, v, rows, scale, records)
        return out.transpose(1, 2).flatten(0, 1)

    def _note_queries(self, layer: int, q: Tensor, numbers) -> None:
        """Puts the squares of the nodes' queries behind those of committed tokens."""
        grouped = q.float().square().unflatten(1, (self.queries.shape[2], -1)).unbind(2)
        rows = numbers.row_sequences.long()
        nodes = (numbers.slots - numbers.prefix_lens[rows]).clamp_max(self.settings.largest_tree)
        # sum() adds head by head: an order that the number of nodes cannot change
        self.queries[layer][rows, :, RECENT + nodes.long()] = sum(grouped[1:], grouped[0])

    def commit(self, sequence: int, path: Sequence[int]) -> None:
        """Keeps the written slots behind the committed ones, path[j] being the j-th, in all layers; path ascends.

        Raises:
            ValueError: a key or value of a block that is now whole is NaN, infinite or too large; nothing is committed.
        """
        self.finish(sequence, path, self.settle(sequence, path))

    def settle(self, sequence: int, path: Sequence[int]) -> list[Tensor]:
        """The first half of a commit: moves the path together and gives the blocks that are whole then, checked."""
        before, start = self.lengths[sequence], self.starts[sequence]
        slots = self.keys_values[:, :, sequence]
        keep_path(slots[..., before - start :, :], path)
        blocks = range(before // self.span, (before + len(path)) // self.span)
        parts = [slots[..., block * self.span - start :, :][..., : self.span, :] for block in blocks]
        for block, part in zip(blocks, parts, strict=True):
            self._check(sequence, block, part)
        return parts

    def finish(self, sequence: int, path: Sequence[int], parts: Sequence[Tensor]) -> None:
        """The second half: quantises the blocks, and lets go of keys that no row will see in full precision."""
        before, start = self.lengths[sequence], self.starts[sequence]
        after, slots = before + len(path), self.keys_values[:, :, sequence]
        recent = None
        if len(self.queries):
            queries = self.queries[:, sequence]
            nodes = torch.tensor([*range(RECENT), *(RECENT + node for node in path)], device=queries.device)
            recent = queries[:, :, nodes]  # of the positions from before - RECENT on
            queries[:, :, :RECENT] = recent[:, :, len(path) :]
        for block, part in enumerate(parts, before // self.span):  # one by one: the bits of a block are its own
            channels = None
            if recent is not None:
                end = (block + 1) * self.span - before
                channels = best_channels(recent[:, :, end : end + RECENT], part[:, 0], self.settings.key_channels)
            self._quantise(sequence, block, part, channels)
        self.lengths[sequence] = after
        if (past := self.starts[sequence] - start) > 0:
            kept = slots[..., past : after - start, :].clone()
            slots[..., : after - start - past, :] = kept

    def _quantise(self, sequence: int, block: int, part: Tensor, channels: Tensor | None) -> None:
        """Makes the records of a block, keys and values [layers, 2, Hkv, span, D] with channels [layers, Hkv, C]."""

        def encode(layers: slice, kept: Tensor) -> Tensor:
            records = kept.shape[3] // BLOCK
            wanted = None if channels is None else channels[layers, :, None].expand(-1, -1, records, -1)
            return self.settings.encode(kept[:, 0], kept[:, 1], wanted, block)

        first = len(self.whole)
        if first:
            records = self.settings.records
            self.whole[:, sequence, :, block * records : (block + 1) * records] = encode(slice(first), part[:first])
        rest = part[first:]
        if self.span > BLOCK:
            rest = shortest_keys(rest)
        self.quantised[:, sequence, :, block] = encode(slice(first, None), rest)[:, :, 0]

    def _check(self, sequence: int, block: int, part: Tensor) -> None:
        bad = find_unquantisable(part[:, 0], part[:, 1])
        if bad is not None:
            name, (layer, head, token, channel), value = bad
            layer = self.layers[layer]
            what = "keys" if name == "k" else "values"
            raise ValueError(
                f"{what} must be at most {LARGEST:.0f} in magnitude to be quantised, got {value} in layer {layer}, "
                f"head {head}, position {block * self.span + token}, channel {channel} of sequence {sequence}"
            )
