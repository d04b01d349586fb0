"""Slots: the keys and values of a batch, where transformers' forward writes them through a cache of its own kind."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Slots:
    """Keys and values of all layers, each [B, H, capacity + 1, D], made when a layer first writes.

    `rows`, `written` and `end` say where the next forward writes, and the end of what it sees. There is one slot more
    than asked for, for the node that takes a call behind the switch.
    """

    def __init__(self, sequences: int, capacity: int):
        from transformers.cache_utils import Cache

        self.sequences = sequences
        self.ahead = 0  # how much longer the cache says that it is
        self.before: Tensor | None = None  # [T] instead of that: what is added to 0 .. T - 1 for a call's positions
        self.capacity = capacity
        self.place(range(sequences), 0, 0)
        layer_class = _layer_class()
        self.cache = Cache(layer_class_to_replicate=lambda: layer_class(self))

    def place(self, rows: Sequence[int], start: int, end: int, nodes: Tensor | None = None) -> None:
        """The next forward writes to slots start .. end - 1 of neighbouring rows, or to `start + nodes` among them."""
        self.rows = slice(rows[0], rows[-1] + 1)
        self.start, self.end = start, end
        self.written = slice(start, end) if nodes is None else start + nodes

    def move(self, sequence: int, path: Sequence[int], start: int, length: int) -> None:
        """Moves the slots start + path[j] of a sequence to length + j, in all layers."""
        if length == start and list(path) == list(range(len(path))):
            return
        source = start + torch.tensor(path, device="cpu")
        for layer in self.cache.layers:
            if not layer.is_initialized:  # it sees the keys of another
                continue
            for slots in (layer.keys, layer.values):
                slots[sequence, :, length : length + len(path)] = slots[sequence, :, source.to(slots.device)]


def _layer_class() -> type:
    """A cache layer that writes into the slots; defined on first use because its base is in transformers."""
    from transformers.cache_utils import DynamicLayer

    class SlotLayer(DynamicLayer):
        def __init__(self, slots: Slots):
            super().__init__()
            self._slots = slots

        def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
            slots = self._slots
            if not self.is_initialized:
                self.keys, self.values = (
                    states.new_zeros(slots.sequences, states.shape[1], slots.capacity + 1, states.shape[3])
                    for states in (key_states, value_states)
                )
                self.dtype, self.device = key_states.dtype, key_states.device
                self.is_initialized = True
            for all_slots, states in ((self.keys, key_states), (self.values, value_states)):
                all_slots[slots.rows, :, slots.written] = states
            return self.keys[slots.rows, :, : slots.end], self.values[slots.rows, :, : slots.end]

        def get_seq_length(self) -> int | Tensor:
            slots = self._slots
            return slots.start + slots.ahead if slots.before is None else slots.before

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return self._slots.end, 0

    return SlotLayer
