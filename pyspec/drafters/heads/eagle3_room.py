"""Where an EAGLE-3 head works: a cache for some sequences, and the calls of the head that are recorded for it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial

import torch
from torch import Tensor

from pyspec.caches.dense import DenseCache, slots_for
from pyspec.runners.replay import Replays, Rows, Step, TapeRecorder

__all__ = ["HeadRoom"]

# What a call takes in for its rows, and what it tells: true rows are made of the target's taps, guessed ones of what
# the head gave before; a text that is read is told nothing of but its end.
READ, END, GUESS = "read", "end", "guess"


class HeadRoom:
    """A head's cache, and what is recorded for it: it outlives a batch, and serves the next one of so many sequences.

    Args:
        head: an Eagle3Head.
        sequences: of the batch.
        slots: of each, at least.
    """

    def __init__(self, head, sequences: int, slots: int):
        shape, slots = head.config.layers, slots_for(slots)
        self.sequences, self._head = sequences, head
        size = (shape.layers, sequences, shape.kv_heads, slots, shape.head_dim)
        self.cache = DenseCache(*size, head.dtype, head.device, shape.ropes(slots, head.device))
        self._replays = Replays(self.cache, TapeRecorder())  # on a GPU, launch by launch
        self._steps = {kind: Step(partial(self._take_in, kind), partial(self._call, kind), (kind,)) for kind in
                       (READ, END, GUESS)}  # fmt: skip
        self._inputs: dict[tuple[str, int], tuple[Tensor, ...]] = {}  # by kind and rows: all, and the parts of it
        self._given: Mapping[int, Tensor] = {}  # by sequence, taps or hidden rows of the call that is made

    def run(self, kind: str, trees: Mapping, given: Mapping[int, Tensor], advances: Collection[int] = ()) -> Rows:
        """What the head says of the rows of some trees, by sequence in ascending order, in `taps`.

        Those are of READ nothing of use, else the [R, H] that the next guess takes in and Eagle3Head.guesses.
        """
        self._given = given
        return self._replays.run(self._steps[kind], trees, advances)

    def _take_in(self, kind: str, tokens: Tensor) -> Tensor:
        """Puts what a call takes in where it reads it: the same tensor for a kind and number of rows."""
        count, key = len(tokens), (kind, len(tokens))
        if key not in self._inputs:
            self._inputs[key] = self._parts(kind, count)
        inputs, embedded, rows = self._inputs[key]
        embedded.copy_(self._head.embed(tokens))
        given = list(self._given.values())
        if len(given) == 1 and len(given[0]) == count:
            rows.copy_(given[0])
        else:  # on a GPU all sequences are padded to one number of rows
            is_padded = sum(map(len, given)) < count
            first, padded = 0, count // self.sequences
            for sequence, part in self._given.items():
                first = padded * sequence if is_padded else first
                rows[first : first + len(part)] = part
                first += len(part)
        return inputs

    def _parts(self, kind: str, count: int) -> tuple[Tensor, Tensor, Tensor]:
        config, width = self._head.config, self._head.config.layers.hidden_size
        shape = (width,) if kind == GUESS else (len(config.taps), config.target_hidden_size)
        sizes = [count * width, count * torch.Size(shape).numel()]
        inputs = torch.zeros(sum(sizes), device=self._head.device)
        embedded, rows = inputs.split(sizes)
        return inputs, embedded.view(count, width), rows.view(count, *shape)

    def _call(self, kind: str, inputs: Tensor, cache, numbers) -> list[Tensor]:
        head, (_, embedded, rows) = self._head, self._inputs[kind, len(numbers.tokens)]
        hidden = rows if kind == GUESS else head.joined(rows)
        normed, given = head.forward(embedded, hidden, cache, numbers)
        return [normed] if kind == READ else [normed, given, *head.guesses(normed)]
