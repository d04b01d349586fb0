"""DenseCache: keys and values of every layer in one allocation, a row of slots for each sequence."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pyspec.caches.names import CACHES

__all__ = ["DenseCache", "keep_path"]


class DenseCache:
    """Keys and values [layers, 2, B, Hkv, capacity, D] of B sequences, each with its own length.

    The allocation is made once and filled in place; on the CPU, slots that were never written cost no memory.
    Slots from a sequence's length on are scratch: a tree's keys are written there, and `commit` keeps some.
    `keys_values` is that allocation.

    Args:
        layers, sequences, kv_heads, capacity, head_dim: the sizes above, all at least 1. `restart` may allow fewer
            slots than there are.
        dtype, device: of the keys and values.
    """

    def __init__(
        self,
        layers: int,
        sequences: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.capacity = capacity
        self.lengths = [0] * sequences
        self.keys_values = torch.empty(layers, 2, sequences, kv_heads, capacity, head_dim, dtype=dtype, device=device)

    def restart(self, capacity: int) -> None:
        """Empties all sequences, which may now have capacity slots, at most as many as were allocated."""
        self.lengths = [0] * len(self.lengths)
        self.capacity = capacity

    def check_room(self, sequence: int, count: int) -> None:
        """Raises ValueError unless count more slots fit behind a sequence's committed ones."""
        if self.lengths[sequence] + count > self.capacity:
            raise ValueError(
                f"sequence {sequence} has {self.lengths[sequence]} of {self.capacity} slots committed "
                f"and needs {count} more: prefill with a larger capacity"
            )

    def copy_prefix(self, source: int, target: int, count: int) -> None:
        """Makes the first count slots of a sequence, in all layers, those of another, and all it has."""
        self.keys_values[:, :, target, :, :count] = self.keys_values[:, :, source, :, :count]
        self.lengths[target] = count

    def commit(self, sequence: int, path: Sequence[int]) -> None:
        """Keeps the written slots length + path[j], in this order, in all layers; path ascends."""
        if path[-1] >= len(path):  # else it lies there already
            keep_path(self.keys_values[:, :, sequence, :, self.lengths[sequence] :], path)
        self.lengths[sequence] += len(path)


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
