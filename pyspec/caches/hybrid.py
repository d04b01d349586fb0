"""HybridCache: recurrent states of some layers and keys and values of the others, of the same sequences."""

from __future__ import annotations

from collections.abc import Sequence

from pyspec.caches.dense import DenseCache
from pyspec.caches.state import StateCache

__all__ = ["HybridCache"]


class HybridCache:
    """A KV cache, `dense`, which keeps a path's keys at once, and a `state` cache, which replays it next."""

    def __init__(self, state: StateCache, dense: DenseCache):
        self.state, self.dense = state, dense

    @property
    def lengths(self) -> list[int]:
        return self.dense.lengths

    def check_room(self, sequence: int, count: int) -> None:
        """Raises ValueError unless count more tokens fit behind a sequence."""
        self.dense.check_room(sequence, count)

    def advance(self, sequence: int, count: int) -> None:
        """Counts tokens behind which the state has moved, and keeps their written slots."""
        self.state.advance(sequence, count)
        self.dense.commit(sequence, range(count))

    def commit(self, sequence: int, path: Sequence[int]) -> None:
        """Adds these nodes of the last tree to the sequence; path ascends."""
        self.state.commit(sequence, path)
        self.dense.commit(sequence, path)
