"""StateCache: the recurrent states of every layer, and the inputs of the last trees, from which a path is replayed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from pyspec.ops.selective_state import LANES, Round
from pyspec.tree import DraftTree

__all__ = ["Plan", "StateCache"]

FEWEST_NODES = 16  # of a record


class Plan(NamedTuple):
    """Of some trees, see Round."""

    paths: list[list[int]]
    halves: list[int]
    keeps: list[int]


class StateCache:
    """States and convolution windows of B sequences, all fp32, with a record of each sequence's last trees.

    A commit only notes the path: the next round's kernels replay it before they begin, so until then `states` and
    `windows` lie behind `lengths`. They store what they replayed, unless the path is short enough to be kept: then
    states and windows stay what they are, a checkpoint, and later rounds replay the longer path.

    Attributes:
        states: [layers, places, channels / 16, N, 16].
        windows: [layers, places, taps - 1, conv_channels].
        records: [layers, 2, places, nodes, record_width], with room for as many nodes as the largest tree so far, and
            the history.
        conv_records: [layers, 2, places, nodes, conv_channels].

    Args:
        history: the longest path that is kept, in nodes; 0 folds every path into the state. May be set at any time.
        copies: places for each sequence's state: those of sequence b are b, B + b and so on.
        layers, sequences, channels, state_size, taps, conv_channels, record_width: the sizes above.
        device: where it lies.
    """

    def __init__(
        self,
        layers: int,
        sequences: int,
        *,
        channels: int,
        state_size: int,
        taps: int,
        conv_channels: int,
        record_width: int,
        device: torch.device,
        copies: int = 1,
        history: int = 0,
    ):
        places = sequences * copies
        shape = (layers, places, channels // LANES, state_size, LANES)
        self.states = torch.zeros(shape, dtype=torch.float32, device=device)
        self.windows = self.states.new_zeros(layers, places, taps - 1, conv_channels)
        self.records = self.states.new_empty(layers, 2, places, 0, record_width)
        self.conv_records = self.states.new_empty(layers, 2, places, 0, conv_channels)
        self.history = history
        self._begin(sequences, places)

    def _begin(self, sequences: int, places: int) -> None:
        self.lengths = [0] * sequences
        self._paths: list[list[int]] = [[] for _ in range(places)]  # accepted and not yet folded
        self._halves = [0] * places  # of the record, where they lie
        self._starts = [0] * places  # where the nodes of the last tree begin there
        self._keeps: list[int] = []  # of the trees of a round, see Round

    def restart(self) -> None:
        """Empties all sequences."""
        self.states.zero_()
        self.windows.zero_()
        self._begin(len(self.lengths), self.states.shape[1])

    @classmethod
    def of(cls, config, sequences: int, device: torch.device, copies: int = 1) -> StateCache:
        """For a model of the shape of a pyspec.runners.recurrent.StateSpaceConfig."""
        return cls(
            config.layers,
            sequences,
            channels=config.channels,
            state_size=config.state_size,
            taps=config.conv_taps,
            conv_channels=config.conv_channels,
            record_width=config.record_width,
            device=device,
            copies=copies,
        )

    def plan(self, trees: Sequence[DraftTree], places: Sequence[int], advances: Sequence[bool]) -> Plan:
        """What `round` tells the kernels of these trees beside the trees."""
        largest = max((len(tree) for tree, moves in zip(trees, advances, strict=True) if not moves), default=0)
        self._reserve(largest + self.history if largest else 0)
        paths = [self._paths[place] for place in places]
        self._keeps = [
            self._keep(path, 0 if moves else len(tree))
            for path, tree, moves in zip(paths, trees, advances, strict=True)
        ]
        return Plan(paths, [self._halves[place] for place in places], self._keeps)

    def round(self, trees: Sequence[DraftTree], places: Sequence[int], advances: Sequence[bool]) -> Round:
        """What the kernels are told of these trees; `done` says that all layers have run it.

        Args:
            places: of each tree, whose state it starts from.
            advances: whether the tree is a chain that is accepted as a whole, so that the state moves behind it.
        """
        paths, halves, keeps = self.plan(trees, places, advances)
        return Round.of(trees, places, paths, halves, keeps=keeps, advances=advances, device=self.states.device)

    def _keep(self, path: list[int], nodes: int) -> int:
        """Where nodes go that are recorded behind a path that is kept; -1 if it is folded."""
        end = max(path, default=-1) + 1
        fits = end + nodes <= self.records.shape[3]
        return end if nodes and 0 < len(path) <= self.history and fits else -1

    def done(self, places: Sequence[int], advances: Sequence[bool]) -> None:
        """All layers have replayed the paths, and have recorded each tree or moved behind it."""
        for place, moves, keep in zip(places, advances, self._keeps, strict=True):
            self._starts[place] = max(keep, 0)
            if keep >= 0:
                continue
            self._paths[place] = []
            if not moves:
                self._halves[place] = 1 - self._halves[place]

    def copy(self, source: int, target: int) -> None:
        """Copies a place's state and window to another's."""
        for values in (self.states, self.windows):
            values[:, target].copy_(values[:, source])

    def check_room(self, sequence: int, count: int) -> None:
        """Does nothing: a state has room for any text."""

    def advance(self, sequence: int, count: int) -> None:
        """Counts tokens behind which the state has moved."""
        self.lengths[sequence] += count

    def commit(self, sequence: int, path: Sequence[int]) -> None:
        """Adds these nodes of the last tree to the sequence."""
        self._paths[sequence] += [self._starts[sequence] + node for node in path]
        self.lengths[sequence] += len(path)

    def _reserve(self, nodes: int) -> None:
        """Makes the records long enough; what they hold is kept."""
        room = self.records.shape[3]
        if nodes <= room:
            return
        room = max(FEWEST_NODES, 1 << (nodes - 1).bit_length())
        for name in ("records", "conv_records"):
            old = getattr(self, name)
            new = old.new_empty(*old.shape[:3], room, old.shape[4])
            new[:, :, :, : old.shape[3]] = old
            setattr(self, name, new)
