"""MixedQuantisedCache: a quantised cache of layers that differ in their key heads, or read the keys of others."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from pyspec.caches.blocks import QuantisedCache, QuantisedSettings
from pyspec.caches.dense import DenseCache, by_heads
from pyspec.ops.ragged_attention import ragged_attention
from pyspec.ops.tree_attention import HEAD_DIMS

WIDEST = max(HEAD_DIMS)  # heads that are quantised


class MixedQuantisedCache(QuantisedCache):
    """A QuantisedCache for each shape of heads; heads that are wider than 256 keep full precision.

    Layers of such heads, `unshifted`, keep all tokens from position 0 on, where the others keep the last ones.

    Args:
        settings: how blocks are quantised.
        layer_heads: of each layer, its key heads and their width.
        key_layers: of each layer, the one whose keys it reads: itself, or one of the same heads.
        sequences, capacity, dtype, device: see QuantisedCache.
    """

    def __init__(
        self,
        settings: QuantisedSettings,
        layer_heads: Sequence[tuple[int, int]],
        key_layers: Sequence[int],
        sequences: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.settings, self.span = settings, settings.span
        self.capacity = self.room = capacity
        self._key_layers = key_layers
        writers, self._places = by_heads(layer_heads, key_layers)
        self._parts: list[QuantisedCache | DenseCache] = []
        for (kv_heads, head_dim), layers in writers.items():
            shape = (len(layers), sequences, kv_heads)
            if head_dim > WIDEST:  # with a slot for padding
                self._parts.append(DenseCache(*shape, capacity + 1, head_dim, dtype, device))
                self._parts[-1].block = self.span
                continue
            self._parts.append(QuantisedCache(settings, *shape, capacity, head_dim, dtype, device))
            self._parts[-1].layers = layers
        self._first = next(part for part in self._parts if isinstance(part, QuantisedCache))
        self.unshifted = {layer for layer, (_, head_dim) in enumerate(layer_heads) if head_dim > WIDEST}

    lengths = property(lambda self: self._first.lengths)
    queries = property(lambda self: self._first.queries)
    device = property(lambda self: self._first.device)
    memory = property(lambda self: self._first.memory)
    slots = property(lambda self: self._first.slots)
    nbytes = property(
        lambda self: sum(
            part.nbytes if isinstance(part, QuantisedCache) else part.keys_values.nbytes for part in self._parts
        )
    )

    @property
    def keys_values(self) -> list[Tensor]:
        """Of each layer [2, B, Hkv, slots, D]: what it writes to."""
        return [self._parts[part].keys_values[place] for part, place in self._places]

    def view(self, sequences: Sequence[int], extent: int | None) -> MixedQuantisedCache:
        """The same memory, as a cache of neighbouring sequences, for rows of any trees (None) or of padded ones."""
        view = copy.copy(self)
        view.more = extent
        view._parts = [
            part.view(sequences, extent if isinstance(part, QuantisedCache) else None) for part in self._parts
        ]
        view._first = view._parts[self._parts.index(self._first)]
        return view

    def restart(self, capacity: int) -> None:
        """Empties all sequences, which may now have capacity tokens, at most as many as there is room for."""
        self.capacity = capacity
        for part in self._parts:
            part.restart(capacity)

    def clear(self, sequence: int) -> None:
        """Empties a sequence."""
        for part in self._parts:
            part.clear(sequence)

    def block_of(self, sequence: int, start: int) -> list[Tensor] | None:
        """Copies of what a text that ends with a block has of it, see QuantisedCache."""
        found = [part.block_of(sequence, start) for part in self._parts]
        return None if None in found else list(chain.from_iterable(found))

    def begin_with(self, sequence: int, blocks: Sequence[Sequence[Tensor]]) -> None:
        """Makes blocks, from the first on, all that a sequence has committed."""
        first = 0
        for part in self._parts:
            end = first + (4 if isinstance(part, QuantisedCache) else 1)
            part.begin_with(sequence, [kept[first:end] for kept in blocks])
            first = end

    def attend(
        self, layer: int, q: Tensor, numbers, window: int | None, scale: float | None = None, softcap: None = None
    ) -> Tensor:
        """Attention of rows [R, heads, D], whose keys are written, as [R, heads, D]; numbers as in runners.numbers."""
        number, place = self._places[layer]
        part = self._parts[number]
        if isinstance(part, QuantisedCache):
            return part.attend(place, q, numbers, window, scale, notes=self._key_layers[layer] == layer)
        k, v = part.keys_values[place]
        trees = (numbers.ancestor_bits, numbers.starts, numbers.whole_lens)
        return ragged_attention(q, k, v, *trees, window=window, scale=scale)

    def commit(self, sequence: int, path: Sequence[int]) -> None:
        """Keeps the written slots behind the committed ones in all layers, see QuantisedCache; path ascends."""
        quantised = [part for part in self._parts if isinstance(part, QuantisedCache)]
        settled = [part.settle(sequence, path) for part in quantised]
        for part, blocks in zip(quantised, settled, strict=True):
            part.finish(sequence, path, blocks)
        for part in self._parts:
            if isinstance(part, DenseCache):
                part.commit(sequence, path)
