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


class StateCache:
    """States and convolution windows of B sequences, all fp32, with a record of each sequence's last trees.

    A commit only notes the path: the next round's kernels replay it before they begin and store what comes of it, so
    until then `states` and `windows` lie behind `lengths`.

    Attributes:
        states: [layers, sequences, channels / 16, N, 16].
        windows: [layers, sequences, taps - 1, conv_channels].
        records: [layers, 2, sequences, nodes, record_width], with room for as many nodes as the largest tree so far.
        conv_records: [layers, 2, sequences, nodes, conv_channels].

    Args:
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
    ):
        shape = (layers, sequences, channels // LANES, state_size, LANES)
        self.states = torch.zeros(shape, dtype=torch.float32, device=device)
        self.windows = self.states.new_zeros(layers, sequences, taps - 1, conv_channels)
        self.records = self.states.new_empty(layers, 2, sequences, 0, record_width)
        self.conv_records = self.states.new_empty(layers, 2, sequences, 0, conv_channels)
        self._begin(sequences)

    def _begin(self, sequences: int) -> None:
        self.lengths = [0] * sequences
        self._paths: list[list[int]] = [[] for _ in range(sequences)]  # nodes that are accepted and not yet replayed
        self._halves = [0] * sequences  # of the record, where they lie

    def restart(self) -> None:
        """Empties all sequences."""
        self.states.zero_()
        self.windows.zero_()
        self._begin(len(self.lengths))

    @classmethod
    def of(cls, config, sequences: int, device: torch.device) -> StateCache:
        """A cache for a model of the shape of a pyspec.runners.recurrent.StateSpaceConfig."""
        return cls(
            config.layers,
            sequences,
            channels=config.channels,
            state_size=config.state_size,
            taps=config.conv_taps,
            conv_channels=config.conv_channels,
            record_width=config.record_width,
            device=device,
        )

    def plan(self, trees: Sequence[DraftTree], sequences: Sequence[int], advances: Sequence[bool]) -> Plan:
        """The plan of a round: what `round` tells the kernels of these trees beside the trees."""
        self._reserve(max((len(tree) for tree, moves in zip(trees, advances, strict=True) if not moves), default=0))
        paths = [self._paths[sequence] for sequence in sequences]
        return Plan(paths, [self._halves[sequence] for sequence in sequences])

    def round(self, trees: Sequence[DraftTree], sequences: Sequence[int], advances: Sequence[bool]) -> Round:
        """The round of these trees, as kernels take it; `done` says that all layers have run it.

        Args:
            sequences: of each tree, whose state it starts from.
            advances: whether the tree is a chain that is accepted as a whole, so that the state moves behind it.
        """
        plan = self.plan(trees, sequences, advances)
        return Round.of(trees, sequences, *plan, advances=advances, device=self.states.device)

    def done(self, sequences: Sequence[int], advances: Sequence[bool]) -> None:
        """Notes that all layers have replayed the paths, and have recorded each tree or moved behind it."""
        for sequence, moves in zip(sequences, advances, strict=True):
            self._paths[sequence] = []
            if not moves:
                self._halves[sequence] = 1 - self._halves[sequence]

    def check_room(self, sequence: int, count: int) -> None:
        """Does nothing: a state has room for any text."""

    def advance(self, sequence: int, count: int) -> None:
        """Counts tokens behind which the state has moved."""
        self.lengths[sequence] += count

    def commit(self, sequence: int, path: Sequence[int]) -> None:
        """Adds these nodes of the last tree to the sequence."""
        self._paths[sequence] = list(path)
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
