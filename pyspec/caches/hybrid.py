"""HybridCache: recurrent states of some layers and keys and values of the others, of the same sequences."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pyspec.caches.dense import DenseCache
from pyspec.caches.state import StateCache


class HybridCache:
    """A KV cache, `dense`, which keeps a path's keys at once, and a `state` cache, which replays it next."""

    has_keys = has_states = is_recordable = True
    blocks = angles = None
    block, blocks_pass = StateCache.block, True
    unshifted = ()

    def __init__(self, state: StateCache, dense: DenseCache):
        self.state, self.dense = state, dense
        dense.block = self.block
        self.attend, self.check_room = dense.attend, dense.check_room
        self.extent, self.extents = dense.extent, dense.extents
        self.layer, self.plan, self.done = state.layer, state.plan, state.done

    @property
    def lengths(self) -> list[int]:
        return self.dense.lengths

    starts = property(lambda self: self.dense.starts)
    slots = property(lambda self: self.dense.slots)
    capacity = property(lambda self: self.dense.capacity)
    ropes = property(lambda self: self.dense.ropes)
    keys_values = property(lambda self: self.dense.keys_values)
    device = property(lambda self: self.dense.device)
    longest_path = property(lambda self: self.state.longest_path)
    memory = property(lambda self: (self.state.memory, self.dense.memory))

    def view(self, sequences: Sequence[int], extent: int | None) -> HybridCache:
        """The same memory, with some sequences' first slots alone."""
        return HybridCache(self.state, self.dense.view(sequences, extent))

    def restart(self, capacity: int) -> None:
        """Empties all sequences, which may now have capacity slots, at most as many as were allocated."""
        self.state.restart()
        self.dense.restart(capacity)

    def clear(self, sequence: int) -> None:
        """Empties a sequence."""
        self.state.clear(sequence)
        self.dense.clear(sequence)

    def block_of(self, sequence: int, start: int) -> list[Tensor] | None:
        """Copies of the state behind a block and of its keys and values; None unless the sequence stands there."""
        state = self.state.block_of(sequence, start)
        return None if state is None else [*state, *self.dense.block_of(sequence, start)]

    def begin_with(self, sequence: int, blocks: Sequence[Sequence[Tensor]]) -> None:
        """Makes blocks, from the first on, all that a sequence has committed."""
        self.state.begin_with(sequence, [kept[:2] for kept in blocks])
        self.dense.begin_with(sequence, [kept[2:] for kept in blocks])

    def advance(self, sequence: int, count: int) -> None:
        """Counts tokens behind which the state has moved, and keeps their written slots."""
        self.state.advance(sequence, count)
        self.dense.advance(sequence, count)

    def commit(self, sequence: int, path: Sequence[int]) -> None:
        """Adds these nodes of the last tree to the sequence; path ascends."""
        self.state.commit(sequence, path)
        self.dense.commit(sequence, path)
