"""StateCache: the recurrent states of every layer, and the inputs of the last trees, from which a path is replayed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pyspec.ops.selective_state import LANES, Round
from pyspec.trees import DraftTree

__all__ = ["StateCache"]

FEWEST_NODES = 16  # of a record


class StateCache:
    """States and convolution windows of B sequences, all fp32, with a record of each sequence's last two trees.

    A commit only notes the path: the next round's kernels replay it before they begin, so until then `states` and
    `windows` lie behind `lengths`.

    states: [layers, B, channels / 16, N, 16]; windows: [layers, B, taps - 1, conv_channels].
    records: [layers, 2, B, nodes, record_width] and conv_records: [layers, 2, B, nodes, conv_channels], with room for
    as many nodes as the largest tree so far.

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
        self.states = torch.zeros(layers, sequences, channels // LANES, state_size, LANES, device=device)
        self.windows = torch.zeros(layers, sequences, taps - 1, conv_channels, device=device)
        self.records = torch.empty(layers, 2, sequences, 0, record_width, device=device)
        self.conv_records = torch.empty(layers, 2, sequences, 0, conv_channels, device=device)
        self.lengths = [0] * sequences
        self._paths: list[list[int]] = [[] for _ in range(sequences)]  # accepted and not yet replayed
        self._halves = [0] * sequences  # of the record, where they lie

    def round(self, trees: Sequence[DraftTree], sequences: Sequence[int], *, advance: bool = False) -> Round:
        """What the kernels are told of these trees; `done` says that all layers have run it."""
        if not advance:
            self._reserve(max(map(len, trees)))
        paths = [self._paths[sequence] for sequence in sequences]
        halves = [self._halves[sequence] for sequence in sequences]
        return Round.of(trees, sequences, paths, halves, advance=advance, device=self.states.device)

    def done(self, trees: Sequence[DraftTree], sequences: Sequence[int], *, advance: bool = False) -> None:
        """All layers have replayed the paths, and have recorded the trees or, with advance, moved behind them."""
        for tree, sequence in zip(trees, sequences, strict=True):
            self._paths[sequence] = []
            if advance:
                self.lengths[sequence] += len(tree)
            else:
                self._halves[sequence] = 1 - self._halves[sequence]

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
