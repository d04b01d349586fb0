"""Rounds of fixed shape: how a state space model verifies on a GPU, and the CUDA graphs that replay it.

Whatever a round changes (tokens, trees, paths, where the record is) is numbers in one buffer on the device, which one
copy from pinned memory fills; so the same launches serve every round of a shape. Rows beyond the last tree's belong to
nobody: the recurrence passes them over, and no other op looks from row to row. A sequence that sits out has a tree
without nodes and a path without any, which is no work at all, down to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyspec.caches.state import Plan, StateCache
from pyspec.models.static_steps import Recorder
from pyspec.ops.selective_state import Round
from pyspec.trees import DraftTree

__all__ = ["ROWS", "RoundInputs", "StaticRounds"]

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)  # of a round with a graph; larger ones run launch by launch

Step = Callable[[Tensor, Round], Tensor]


class RoundInputs:
    """What a round reads beside weights and states, as views of one int32 buffer.

    Args:
        places, rows, longest: of states, of all trees with padding, and of the nodes of a path.
        device: where the round runs.
        pin_memory: for the host's copy of a buffer on a GPU.
    """

    tokens: Tensor  # [rows]; 0 in padding, and so are parents
    round: Round

    def __init__(self, places: int, rows: int, longest: int, device: torch.device, pin_memory: bool = False):
        self._shape = places, rows, longest
        each = (places,)
        shapes = [(rows,), each, (places + 1,), (rows,), (places, longest), each, each, each]
        sizes = [math.prod(shape) for shape in shapes]
        aligned = [size + -size % 4 for size in sizes]  # to 16 bytes
        self.buffer = torch.zeros(sum(aligned), dtype=torch.int32, device=device, pin_memory=pin_memory)
        parts = zip(shapes, sizes, self.buffer.split(aligned), strict=True)
        self.tokens, *rest = (part[:size].view(shape) for shape, size, part in parts)
        self.round = Round(*rest)

    def fill(
        self,
        trees: Sequence[DraftTree],
        places: Sequence[int],
        advances: Sequence[bool],
        plan: Plan,
    ) -> None:
        """Describes the trees of some places, and what StateCache.plan says of each. Does not wait for the device."""
        host = RoundInputs(*self._shape, torch.device("cpu"), pin_memory=self.buffer.is_cuda)
        round, end = host.round, 0
        round.sequences.copy_(torch.arange(self._shape[0], dtype=torch.int32, device="cpu"))
        round.paths.fill_(-1)
        round.keeps.fill_(-1)
        for tree, place, moves, path, half, keep in zip(trees, places, advances, *plan, strict=True):
            host.tokens[end : end + len(tree)] = tree.tokens
            round.parents[end : end + len(tree)] = tree.parents
            end += len(tree)
            round.starts[place + 1 :] = end
            round.paths[place, : len(path)] = torch.tensor(path, dtype=torch.int32, device="cpu")
            round.halves[place], round.keeps[place], round.advances[place] = half, keep, moves
        self.buffer.copy_(host.buffer, non_blocking=True)


class StaticRounds:
    """Runs the layers over the trees of a batch, with everything that changes on the device.

    A step is a function of (tokens [rows], round) that gives [rows, hidden] by launches that take their sizes from
    shapes alone. It is passed to every call and not kept, because its model keeps the rounds.

    Args:
        cache: of the batch. Graphs know its address and serve no other.
        record: makes a function that repeats a step's launches, such as GraphRecorder.
    """

    def __init__(self, cache: StateCache, record: Recorder):
        self.cache = cache
        self._record = record
        self._records = cache.records  # that the graphs know
        self._replays: dict[int, tuple[RoundInputs, Callable[[], Tensor]]] = {}  # by rows

    def warm(self, step: Step, nodes: int) -> None:
        """Records all rounds with a graph, with room for trees of so many nodes. The cache must be empty."""
        self._plan([DraftTree.chain([0] * nodes)], [0], [False])  # which makes the room
        for rows in reversed(ROWS):  # the largest first: the others find room in the memory that it needs
            self._replay(step, rows)

    def run(
        self, step: Step, trees: Sequence[DraftTree], places: Sequence[int], advances: Sequence[bool]
    ) -> Tensor | None:
        """[R, hidden] of the nodes of all trees, tree after tree; None if they are too many.

        For prompts, chains that are accepted as a whole, nothing is recorded, because they are read once: None unless
        it was before.

        Args:
            places, advances: of the trees, as in StateCache.round, but places ascend.
        """
        nodes = sum(map(len, trees))
        rows = next((rows for rows in ROWS if rows >= nodes), None)
        if rows is None or (all(advances) and rows not in self._replays):
            return None
        plan = self._plan(trees, places, advances)
        inputs, replay = self._replay(step, rows)
        inputs.fill(trees, places, advances, plan)
        hidden = replay()[:nodes].clone()  # the next replay's goes where this one lies
        self.cache.done(places, advances)
        return hidden

    def _plan(self, trees: Sequence[DraftTree], places: Sequence[int], advances: Sequence[bool]) -> Plan:
        plan = self.cache.plan(trees, places, advances)
        if self.cache.records is not self._records:  # the plan has made room
            self._records, self._replays = self.cache.records, {}
        return plan

    def _replay(self, step: Step, rows: int) -> tuple[RoundInputs, Callable[[], Tensor]]:
        if rows not in self._replays:
            longest = self._records.shape[3]  # of which a path takes each node once: more places cost nothing
            inputs = RoundInputs(self.cache.states.shape[1], rows, longest, self.cache.states.device)
            inputs.fill((), (), (), Plan([], [], []))  # recording runs the step too, which must not replay a path twice
            self._replays[rows] = inputs, self._record(lambda: step(inputs.tokens, inputs.round))
        return self._replays[rows]
