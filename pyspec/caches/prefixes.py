"""Prefixes: beginnings of texts that were read before, as copies of what they left in a cache, block by block."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from torch import Tensor

from pyspec.arguments import read_integer


class _Block(NamedTuple):
    number: int  # its own; a block behind it is found by this and by its own tokens
    parts: list[Tensor]
    nbytes: int


class Prefixes:
    """Blocks of texts by their tokens and by all tokens before them, within so many bytes; the least recent go first.

    A block is what some tokens left in a cache: keys and values, or the state behind them. It is a copy, and is copied
    into the slot of the next text that begins so. A memcpy of keys is far cheaper than a prompt (some kilobytes a token
    where the model reads all its weights), and a slot stays one run of memory, as the kernels and their recorded
    addresses want it. Nothing is told by hashes alone: the tokens themselves are compared.

    Args:
        memory: bytes that blocks may take, at least 0.
    """

    def __init__(self, memory: int):
        self.memory = read_memory("prefix_memory", memory)
        self.nbytes = 0
        self.spared = 0  # tokens that texts began with
        # a block is never more recent than those before it, so what goes first has nothing behind it
        self._blocks: OrderedDict[tuple, _Block] = OrderedDict()
        self._made = 0
        self._offered: dict[int, int] = {}  # tokens of each slot's text

    def begin(self, cache, slot: int, tokens: Sequence[int]) -> int:
        """Fills an empty slot with the longest known beginning of a text, without its last token; returns its length.

        cache: has `block`, tokens of one, and copies them with `begin_with` and `block_of`.
        """
        found = self._known(_kind(cache, slot), tokens[:-1], cache.block)
        self._touch(found)
        if found:
            cache.begin_with(slot, [self._blocks[key].parts for key in found])
        self._offered[slot] = cache.lengths[slot]
        self.spared += cache.lengths[slot]
        return cache.lengths[slot]

    def keep(self, cache, slot: int, tokens: Sequence[int]) -> None:
        """Keeps the whole blocks that a slot has committed of a text that began with `begin`.

        It ends where the cache has let go of a block, or where no other text's blocks are left to make room.
        """
        size, whole = cache.block, cache.lengths[slot] // cache.block * cache.block
        if whole <= self._offered.get(slot, 0):
            return
        self._offered[slot] = whole
        kind = _kind(cache, slot)
        chain = self._known(kind, tokens[:whole], size)
        self._touch(chain)
        for start in range(len(chain) * size, whole, size):
            parts = cache.block_of(slot, start)
            if parts is None:
                return
            nbytes = sum(part.nbytes for part in parts)
            if not self._make_room(nbytes, set(chain)):
                return
            key = (self._blocks[chain[-1]].number if chain else kind, tuple(tokens[start : start + size]))
            self._made += 1
            self._blocks[key] = _Block(self._made, parts, nbytes)
            self.nbytes += nbytes
            chain.append(key)
            self._touch(chain)

    def _known(self, kind: Hashable, tokens: Sequence[int], size: int) -> list[tuple]:
        """The keys of the known blocks that tokens begin with."""
        chain, before = [], kind
        for start in range(0, len(tokens) - size + 1, size):
            key = (before, tuple(tokens[start : start + size]))
            if key not in self._blocks:
                break
            chain.append(key)
            before = self._blocks[key].number
        return chain

    def _touch(self, chain: Sequence[tuple]) -> None:
        for key in reversed(chain):
            self._blocks.move_to_end(key)

    def _make_room(self, nbytes: int, needed: set[tuple]) -> bool:
        while self.nbytes + nbytes > self.memory:
            oldest = next(iter(self._blocks), None)
            if oldest is None or oldest in needed:
                return False
            self.nbytes -= self._blocks.pop(oldest).nbytes
        return True


def read_memory(name: str, memory: int) -> int:
    """Checks a number of bytes; raises TypeError or ValueError for what is none, or below 0."""
    memory = read_integer(name, memory, "a number of bytes")
    if memory < 0:
        raise ValueError(f"{name} must be a number of bytes of at least 0, got {memory}")
    return memory


def _kind(cache, slot: int) -> Hashable:
    """Tells apart keys that are none of each other's: quantised otherwise, or turned otherwise."""
    return getattr(cache, "settings", None), bool(cache.angles and cache.angles[slot])
