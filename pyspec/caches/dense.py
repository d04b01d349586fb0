"""DenseCache: keys and values of every layer in one allocation, a row of slots for each sequence."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyspec.caches.names import CACHES
from pyspec.ops.ragged_attention import ragged_attention
from pyspec.tree import DraftTree

if TYPE_CHECKING:
    from pyspec.architectures.rotary import Rope


FEWEST_SLOTS = 1024  # that attention's grid is made for; doubled until the longest sequence fits


def slots_for(capacity: int) -> int:
    """Slots to allocate for a capacity: padding has one too, and a somewhat longer text should fit as well."""
    slots = capacity + 1
    return slots + -slots % FEWEST_SLOTS


class KeysAndValues:
    """What caches of keys and values share: `keys_values` [layers, 2, B, Hkv, slots, D], lengths and a capacity."""

    has_keys = True
    has_states = False
    longest_path = 0  # nodes to be replayed: a path is moved together at once
    unshifted: Collection[int] = ()  # layers that keep all in full precision where others do not
    blocks_pass = False  # whether a block has to be taken when its end is reached: see `block_of`
    keys_values: Tensor
    lengths: list[int]
    capacity: int  # tokens of a sequence

    @property
    def device(self) -> torch.device:
        return self.keys_values.device

    @property
    def memory(self) -> int:
        """The address that tells apart where the cache lies."""
        return self.keys_values.data_ptr()

    @property
    def slots(self) -> int:
        """Slots that are allocated for a sequence."""
        return self.keys_values.shape[4]

    def done(self, trees: Mapping[int, DraftTree], advances: Collection[int]) -> None:
        """Nothing is to be done after a round: its keys are scratch until they are committed."""

    def check_room(self, sequence: int, count: int) -> None:
        """Raises ValueError unless count more tokens fit behind a sequence's committed ones."""
        if self.lengths[sequence] + count > self.capacity:
            raise ValueError(
                f"sequence {sequence} has {self.lengths[sequence]} of {self.capacity} slots committed "
                f"and needs {count} more: prefill with a larger capacity"
            )

    def advance(self, sequence: int, count: int) -> None:
        """Keeps the first written slots, of a chain that is accepted as a whole."""
        self.commit(sequence, range(count))


class DenseCache(KeysAndValues):
    """Keys and values [layers, 2, B, Hkv, capacity, D] of B sequences, each with its own length.

    The allocation is made once and filled in place; on the CPU, slots that were never written cost no memory.
    Slots from a sequence's length on are scratch: a tree's keys are written there, and `commit` keeps some.
    `angles` is where each sequence's positions begin in `ropes`: some models turn long texts otherwise.
    `keys_values` is that allocation, and `ropes` what every layer's heads are turned by.

    Args:
        layers, sequences, kv_heads, capacity, head_dim: the sizes above, all at least 1. `restart` may allow fewer
            slots than there are.
        dtype, device: of the keys and values.
        ropes: of each layer, for capacity positions at least, where a forward is to read them.
    """

    blocks = None  # that rows see quantised
    block = 64  # tokens that are kept together for other texts
    is_recordable = True  # attention is launches alone

    def __init__(
        self,
        layers: int,
        sequences: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        ropes: Sequence[Rope] = (),
    ):
        self.capacity = capacity
        self.ropes = ropes
        self.lengths, self.angles = [0] * sequences, [0] * sequences
        shape = (layers, 2, sequences, kv_heads, capacity, head_dim)
        self._hold([torch.empty(shape, dtype=dtype, device=device)])

    def _hold(self, parts: list[Tensor]) -> None:
        self._parts, self.keys_values = parts, parts[0]

    @property
    def starts(self) -> list[int]:
        """The position of each sequence's first slot."""
        return [0] * len(self.lengths)

    def extent(self, sequences: Sequence[int], trees: Mapping[int, DraftTree]) -> int:
        """Slots that attention to padded trees of some sequences is launched for: few sizes, for each is a graph."""
        ends = (self.lengths[each] + (len(trees[each]) if each in trees else 0) for each in sequences)
        return self._extent(max(ends) + 1)

    def extents(self, capacity: int) -> list[int]:
        """Those of all trees in texts up to a capacity, the largest first."""
        sizes = [self._extent(1)]
        while sizes[-1] <= capacity:
            sizes.append(self._extent(sizes[-1] + 1))
        return sizes[::-1]

    def _extent(self, needed: int) -> int:
        slots = FEWEST_SLOTS
        while slots < needed:
            slots *= 2
        return min(slots, self.slots)

    def view(self, sequences: Sequence[int], extent: int | None) -> DenseCache:
        """The same memory, as a cache of neighbouring sequences and of their first slots, or of all."""
        view = copy.copy(self)
        view._hold([part[:, :, sequences[0] : sequences[-1] + 1, :, :extent] for part in self._parts])
        return view

    def plan(self, trees, advances) -> None:
        """Nothing is to be done before a round."""

    def attend(
        self,
        layer: int,
        q: Tensor,
        numbers,
        window: int | None,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        chunked: bool = False,
    ) -> Tensor:
        """Attention of rows [R, heads, D], whose keys are written, as [R, heads, D]; numbers as in runners.numbers."""
        k, v = self.keys_values[layer]
        trees = (numbers.ancestor_bits, numbers.starts, numbers.prefix_lens)
        options = {"scale": scale, "softcap": softcap, "sinks": sinks, "chunked": chunked and window is not None}
        return ragged_attention(q, k, v, *trees, window=window, **options)

    def restart(self, capacity: int) -> None:
        """Empties all sequences, which may now have capacity slots, at most as many as were allocated."""
        self.lengths, self.angles = [0] * len(self.lengths), [0] * len(self.lengths)
        self.capacity = capacity

    def clear(self, sequence: int) -> None:
        """Empties a sequence."""
        self.lengths[sequence] = self.angles[sequence] = 0

    def block_of(self, sequence: int, start: int) -> list[Tensor]:
        """Copies of the committed keys and values of `block` tokens from a position on."""
        return [part[:, :, sequence, :, start : start + self.block].clone() for part in self._parts]

    def begin_with(self, sequence: int, blocks: Sequence[Sequence[Tensor]]) -> None:
        """Makes blocks, from the first on, all that a sequence has committed."""
        for start, kept in zip(range(0, len(blocks) * self.block, self.block), blocks, strict=True):
            for part, values in zip(self._parts, kept, strict=True):
                part[:, :, sequence, :, start : start + self.block] = values
        self.lengths[sequence] = len(blocks) * self.block

    def copy_prefix(self, source: int, target: int, count: int) -> None:
        """Makes the first count slots of a sequence, in all layers, those of another, and all it has."""
        for part in self._parts:
            part[:, :, target, :, :count] = part[:, :, source, :, :count]
        self.lengths[target] = count

    def commit(self, sequence: int, path: Sequence[int]) -> None:
        """Keeps the written slots length + path[j], in this order, in all layers; path ascends."""
        if path[-1] >= len(path):  # else it lies there already
            for part in self._parts:
                keep_path(part[:, :, sequence, :, self.lengths[sequence] :], path)
        self.lengths[sequence] += len(path)


class MixedCache(DenseCache):
    """A DenseCache of layers that differ in their key heads, or read the keys of others.

    `keys_values` is a list of each layer's [2, B, Hkv, capacity, D]. Layers of one shape lie in one allocation.

    Args:
        layer_heads: of each layer, its key heads and their width.
        key_layers: of each layer, the one whose keys it reads: itself, or one of the same heads.
        sequences, capacity, dtype, device, ropes: see DenseCache.
    """

    def __init__(
        self,
        layer_heads: Sequence[tuple[int, int]],
        key_layers: Sequence[int],
        sequences: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        ropes: Sequence[Rope] = (),
    ):
        self.capacity, self.ropes = capacity, ropes
        self.lengths, self.angles = [0] * sequences, [0] * sequences
        writers, self._places = by_heads(layer_heads, key_layers)
        self._hold(
            [
                torch.empty(len(layers), 2, sequences, kv_heads, capacity, head_dim, dtype=dtype, device=device)
                for (kv_heads, head_dim), layers in writers.items()
            ]
        )

    def _hold(self, parts: list[Tensor]) -> None:
        self._parts = parts
        self.keys_values = [parts[part][layer] for part, layer in self._places]

    @property
    def device(self) -> torch.device:
        return self._parts[0].device

    @property
    def memory(self) -> int:
        """The address that tells apart where the cache lies."""
        return self._parts[0].data_ptr()

    @property
    def slots(self) -> int:
        """Slots that are allocated for a sequence."""
        return self._parts[0].shape[4]


def by_heads(
    layer_heads: Sequence[tuple[int, int]], key_layers: Sequence[int]
) -> tuple[dict[tuple[int, int], list[int]], list[tuple[int, int]]]:
    """Layers that write keys, by their heads; and where each layer finds its keys: the shape's place, and in it."""
    writers: dict[tuple[int, int], list[int]] = {}
    for layer in sorted(set(key_layers)):
        writers.setdefault(layer_heads[layer], []).append(layer)
    shapes = list(writers)
    heads = [layer_heads[layer] for layer in key_layers]
    return writers, [
        (shapes.index(shape), writers[shape].index(layer)) for shape, layer in zip(heads, key_layers, strict=True)
    ]


def keep_path(slots: torch.Tensor, path: Sequence[int]) -> None:
    """Moves slot path[j] of slots [layers, 2, Hkv, S, D] to slot j, for all j; path ascends."""
    in_place = 0
    while in_place < len(path) and path[in_place] == in_place:
        in_place += 1
    if moved := path[in_place:]:
        # from pinned memory, so that a GPU reads it when it gets there and nobody waits
        nodes = torch.tensor(moved, device="cpu", pin_memory=slots.is_cuda).to(slots.device, non_blocking=True)
        # index_select copies, so rows may move onto slots that other rows still have to be read from
        slots[..., in_place : len(path), :] = slots.index_select(3, nodes)


CACHES.register("dense", lambda: None, "full precision, as the model computes them")
