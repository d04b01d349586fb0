"""Numbers: all that changes from round to round, int32 in one buffer of fixed address that recorded kernels read."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyspec.caches.state import Plan
from pyspec.ops.selective_state import Round
from pyspec.tree import DraftTree


class Numbers:
    """The trees of a round, and where their rows lie in a batch of B sequences.

    On a GPU the host writes to pinned memory and sends it in one copy. It never waits for the device: memory is written
    to again when its copy has been read, and until then there is more.

    Attributes:
        tokens, positions, slots, parents: [R], of each node; 0 in padding. slots are where the cache keeps its key.
        seen: [R], blocks of a quantised cache that each node sees quantised.
        whole_slots: [R], what slots are in those layers of a quantised cache that keep all in full precision.
        row_sequences: [R], each row's sequence of the batch.
        ancestor_bits: [R, words]; 0 in padding.
        starts: [B + 1], of each tree's rows, padding included.
        prefix_lens: [B], committed tokens that attention sees in the cache; 0 for a sequence that sits out.
        whole_lens: [B], what prefix_lens are where slots are whole_slots.
        round: the same trees and the paths to be replayed, as recurrent ops take them.

    Args:
        sequences: the sequences of the batch that it is for, B of them.
        rows: R, of all trees.
        words: of a row's ancestor bits.
        longest: nodes of a path to be replayed, at most.
        device: where the ops run.
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    parents: Tensor
    seen: Tensor
    whole_slots: Tensor
    row_sequences: Tensor
    ancestor_bits: Tensor
    starts: Tensor
    prefix_lens: Tensor
    whole_lens: Tensor

    def __init__(self, sequences: Sequence[int], rows: int, words: int, longest: int, device: torch.device):
        count = len(sequences)
        self._sequences = sequences
        of_rows = ("tokens", "positions", "slots", "parents", "row_sequences", "seen", "whole_slots")
        self._shapes = dict.fromkeys(of_rows, (rows,))
        self._shapes |= {"ancestor_bits": (rows, words), "paths": (count, longest)}
        self._shapes |= dict.fromkeys(("starts", "round_starts"), (count + 1,))
        self._shapes |= dict.fromkeys(("prefix_lens", "whole_lens", "places", "halves", "advances"), (count,))
        self._buffer = torch.zeros(sum(map(_aligned, self._shapes.values())), dtype=torch.int32, device=device)
        views = _views(self._buffer, self._shapes)
        self.round = Round(
            *(views[name] for name in ("places", "round_starts", "parents", "paths", "halves", "advances"))
        )
        vars(self).update(views)
        self._each = np.arange(rows, dtype=np.int32)
        self._hosts: deque[_Host] = deque()  # those that were sent first come first

    def fill(
        self,
        trees: Mapping[int, DraftTree],
        lengths: Sequence[int],
        starts: Sequence[int],
        *,
        padded: int = 0,
        plan: Plan | None = None,
        blocks: tuple[int, int] | None = None,
        angles: Sequence[int] | None = None,
        advances: Collection[int] = (),
    ) -> None:
        """Describes the trees of some sequences; the others sit out. Does not wait for the device.

        Args:
            trees: by sequence; or the later nodes of one, whose ancestor_bits name the `earlier` ones too.
            lengths: committed tokens of every sequence of the batch.
            starts: the position of each sequence's first slot.
            padded: rows of every sequence, padding included; 0 puts the trees' rows one after another.
            plan: what to replay before, where there are recurrent layers.
            blocks: window and span of a quantised cache, see blocks_seen.
            angles: by sequence, what is added to positions: where they begin in the cosines and sines.
            advances: the sequences whose tree is a chain that is accepted as a whole.
        """
        host = self._host()
        end = 0
        host["places"][:] = self._sequences
        host["paths"].fill(-1)
        for index, sequence in enumerate(self._sequences):
            tree, length, first = trees.get(sequence), lengths[sequence], padded * index if padded else end
            if padded:
                rows = slice(first, first + padded)
                host["row_sequences"][rows] = index
                count = 0 if tree is None else len(tree)
                begin = length - starts[sequence] + (0 if tree is None else tree.earlier)
                np.add(np.minimum(self._each[:padded], count), begin, out=host["slots"][rows])
            if tree is not None:
                nodes, words = tree.ancestor_bits.shape
                rows = slice(first, first + nodes)
                host["tokens"][rows] = tree.tokens
                host["parents"][rows] = tree.parents
                np.add(tree.depths, length, out=host["positions"][rows])
                host["ancestor_bits"][rows, :words] = tree.ancestor_bits
                host["prefix_lens"][index] = length - starts[sequence]
                if blocks is not None:
                    window, span = blocks
                    np.maximum((host["positions"][rows] - window) // span, 0, out=host["seen"][rows])
                if angles is not None:
                    host["positions"][rows] += angles[sequence]
                if not padded:
                    host["row_sequences"][rows] = index
                    np.add(self._each[:nodes], length - starts[sequence] + tree.earlier, out=host["slots"][rows])
                if plan is not None:
                    path = plan.paths[sequence]
                    host["paths"][index, : len(path)] = path
                    host["halves"][index] = plan.halves[sequence]
                    host["advances"][index] = sequence in advances
                end = rows.stop
            if blocks is not None:
                rows = slice(first, first + padded if padded else end)
                np.add(host["slots"][rows], starts[sequence], out=host["whole_slots"][rows])
                host["whole_lens"][index] = 0 if tree is None else length
            host["starts"][index + 1] = padded * (index + 1) or end
            host["round_starts"][index + 1] = end
        self._send()

    def _host(self) -> dict[str, np.ndarray]:
        """Arrays of zeros by name, to be written to and sent."""
        if not self._buffer.is_cuda:
            if not self._hosts:
                self._hosts.append(_Host(self._buffer, _views(self._buffer.numpy(), self._shapes), None))
            self._buffer.numpy().fill(0)
            return self._hosts[0].arrays
        if self._hosts and self._hosts[0].is_read():
            self._next = self._hosts.popleft()
            self._next.memory.numpy().fill(0)
        else:
            memory = torch.zeros(len(self._buffer), dtype=torch.int32, device="cpu", pin_memory=True)
            self._next = _Host(memory, _views(memory.numpy(), self._shapes), torch.cuda.Event())
        return self._next.arrays

    def _send(self) -> None:
        """Copies what was written to the device, behind all that was launched before."""
        if self._buffer.is_cuda:
            self._buffer.copy_(self._next.memory, non_blocking=True)
            self._next.read.record(torch.cuda.current_stream(self._buffer.device))
            self._hosts.append(self._next)


class _Host(NamedTuple):
    memory: Tensor
    arrays: dict[str, np.ndarray]
    read: torch.cuda.Event | None  # behind the copy

    def is_read(self) -> bool:
        return self.read.query()


def _aligned(shape: tuple[int, ...]) -> int:
    """Numbers that a shape takes: to 16 bytes, for Triton would compile a kernel again for another alignment."""
    return math.prod(shape) + -math.prod(shape) % 4


def _views(buffer, shapes: dict[str, tuple[int, ...]]) -> dict:
    views, start = {}, 0
    for name, shape in shapes.items():
        views[name] = buffer[start : start + math.prod(shape)].reshape(shape)
        start += _aligned(shape)
    return views
