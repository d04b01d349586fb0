"""StateCache: the recurrent states of every layer, and the inputs of the last trees, from which a path is replayed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyspec.ops.selective_state import LANES
from pyspec.tree import DraftTree

FEWEST_NODES = 16  # of a record


class Plan(NamedTuple):
    """What is replayed before a round, by sequence; see pyspec.ops.selective_state.Round."""

    paths: list[list[int]]
    halves: list[int]


class StateCache:
    """States and convolution windows of B sequences, all fp32, with a record of each sequence's last trees.

    Where a layer has a window alone, state_size and record_width are 0.

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

    has_keys = False
    has_states = True
    block = 128  # tokens that are kept together for other texts: a state is as large as the keys of many
    blocks_pass = True  # a state goes on
    blocks = None
    is_recordable = True
    angles = None
    slots = 0

    def _begin(self, sequences: int) -> None:
        self.lengths = [0] * sequences
        self._paths: list[list[int]] = [[] for _ in range(sequences)]  # nodes that are accepted and not yet replayed
        self._halves = [0] * sequences  # of the record, where they lie

    def restart(self) -> None:
        """Empties all sequences."""
        self.states.zero_()
        self.windows.zero_()
        self._begin(len(self.lengths))

    def clear(self, sequence: int) -> None:
        """Empties a sequence."""
        self.states[:, sequence].zero_()
        self.windows[:, sequence].zero_()
        self.lengths[sequence], self._paths[sequence], self._halves[sequence] = 0, [], 0

    def block_of(self, sequence: int, start: int) -> list[Tensor] | None:
        """Copies of the state and the window behind a block; None unless the sequence stands right there."""
        if self.lengths[sequence] != start + self.block or self._paths[sequence]:
            return None
        return [self.states[:, sequence].clone(), self.windows[:, sequence].clone()]

    def begin_with(self, sequence: int, blocks: Sequence[Sequence[Tensor]]) -> None:
        """Makes blocks, from the first on, all that a sequence has committed."""
        self.clear(sequence)
        self.states[:, sequence], self.windows[:, sequence] = blocks[-1]
        self.lengths[sequence] = len(blocks) * self.block

    @classmethod
    def of(cls, config, sequences: int, device: torch.device) -> StateCache:
        """For a model of the shape of a pyspec.architectures.state_space.StateSpaceConfig."""
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

    @property
    def device(self) -> torch.device:
        return self.states.device

    @property
    def memory(self) -> int:
        """Tells apart where the records lie, which grow."""
        return self.conv_records.data_ptr()

    @property
    def starts(self) -> list[int]:
        """A state begins at position 0."""
        return [0] * len(self.lengths)

    @property
    def longest_path(self) -> int:
        """Nodes of a path that is replayed, at most: each of the record's once."""
        return self.records.shape[3]

    def view(self, sequences: Sequence[int], extent: None) -> StateCache:
        """Itself: a round names the sequences that it is of."""
        return self

    def plan(self, trees: Mapping[int, DraftTree], advances: Collection[int]) -> Plan:
        """What is to be replayed before the trees of some sequences, with room in the record for their nodes.

        advances: the sequences whose tree is a chain that is accepted as a whole; the state moves behind it, and
            nothing is recorded.
        """
        self._reserve(max((len(tree) for sequence, tree in trees.items() if sequence not in advances), default=0))
        return Plan(self._paths, self._halves)

    def done(self, trees: Mapping[int, DraftTree], advances: Collection[int]) -> None:
        """All layers have replayed the paths, and have recorded each tree or moved behind it."""
        for sequence in trees:
            self._paths[sequence] = []
            if sequence not in advances:
                self._halves[sequence] = 1 - self._halves[sequence]

    def layer(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """State, window, record and record of the convolution of a layer, as its ops take them."""
        return self.states[index], self.windows[index], self.records[index], self.conv_records[index]

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
