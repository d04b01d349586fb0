"""Rounds of fixed shape: how a state space model verifies on a GPU, and the CUDA graphs that replay it.

Whatever a round changes (tokens, trees, paths, where the record is) is numbers in one buffer on the device, which one
copy from pinned memory fills; so the same launches serve every round of a shape. Rows beyond the last tree's belong to
nobody: the recurrence passes them over, and no other op looks from row to row. A sequence that sits out has a tree
without nodes and a path without any, which is no work at all, down to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from itertools import accumulate

import torch
from torch import Tensor

from pyspec.caches.state import Plan, StateCache
from pyspec.ops.selective_state import Round
from pyspec.runners.static_inputs import StaticInputs
from pyspec.runners.static_steps import GraphedHead, Recorder, Rows
from pyspec.tree import DraftTree

__all__ = ["ROWS", "RoundInputs", "StaticRounds"]

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)  # of a round with a graph; larger ones run launch by launch

Step = Callable[[Tensor, Round], Tensor]


class RoundInputs(StaticInputs):
    """What a round reads beside weights and states.

    Args:
        places, rows, longest: of states, of all trees with padding, and of the nodes of a path.
        device: where the round runs.
    """

    tokens: Tensor  # [rows]; 0 in padding, and so are parents
    round: Round

    def __init__(self, places: int, rows: int, longest: int, device: torch.device):
        per_row, per_place = dict.fromkeys(("tokens", "parents"), (rows,)), (places,)
        shapes = {"sequences": per_place, "starts": (places + 1,), "paths": (places, longest)}
        shapes |= dict.fromkeys(("halves", "advances"), per_place)
        super().__init__(device, **per_row, **shapes)
        self.round = Round(*(getattr(self, field.name) for field in fields(Round)))

    def fill(
        self,
        trees: Sequence[DraftTree],
        places: Sequence[int],
        advances: Sequence[bool],
        plan: Plan,
    ) -> None:
        """Describes the trees of some places, and what StateCache.plan says of each. Does not wait for the device."""
        host, end = self.host(), 0
        host["sequences"][:] = range(len(host["sequences"]))
        host["paths"].fill(-1)
        for tree, place, moves, path, half in zip(trees, places, advances, *plan, strict=True):
            rows = slice(end, end + len(tree))
            host["tokens"][rows], host["parents"][rows] = tree.tokens, tree.parents
            end = rows.stop
            host["starts"][place + 1 :] = end
            host["paths"][place, : len(path)] = path
            host["halves"][place], host["advances"][place] = half, moves
        self.send()


class StaticRounds:
    """Runs the layers over the trees of a batch, with everything that changes on the device.

    A step is a function of (tokens [rows], round) that gives [rows, hidden] by launches that take their sizes from
    shapes alone. It is passed to every call and not kept, because its model keeps the rounds.

    Args:
        cache: of the batch. Graphs know its address and serve no other.
        record: makes a function that repeats a step's launches, such as GraphRecorder.
        head: what a recorded step ends with.
    """

    def __init__(self, cache: StateCache, record: Recorder, head: GraphedHead):
        self.cache = cache
        self._record = record
        self._head = head
        self._records = cache.records  # that the graphs know
        self._replays: dict[int, tuple[RoundInputs, Callable[[], Rows]]] = {}  # by rows

    def warm(self, step: Step, nodes: int) -> None:
        """Records all rounds with a graph, with room for trees of so many nodes. The cache must be empty."""
        self._plan([DraftTree.chain([0] * nodes)], [0], [False])  # which makes the room
        for rows in reversed(ROWS):  # the largest first: the others find room in the memory that it needs
            self._replay(step, rows)

    def run(
        self, step: Step, trees: Sequence[DraftTree], places: Sequence[int], advances: Sequence[bool]
    ) -> Rows | None:
        """What the layers give for the nodes of all trees; None if they are too many.

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
        found = replay()
        self.cache.done(places, advances)
        ends = accumulate(map(len, trees))
        return found._replace(places=[slice(end - len(tree), end) for tree, end in zip(trees, ends, strict=True)])

    def _plan(self, trees: Sequence[DraftTree], places: Sequence[int], advances: Sequence[bool]) -> Plan:
        plan = self.cache.plan(trees, places, advances)
        if self.cache.records is not self._records:  # the plan has made room
            self._records, self._replays = self.cache.records, {}
        return plan

    def _replay(self, step: Step, rows: int) -> tuple[RoundInputs, Callable[[], Rows]]:
        if rows not in self._replays:
            longest = self._records.shape[3]  # of which a path takes each node once: more places cost nothing
            inputs = RoundInputs(self.cache.states.shape[1], rows, longest, self.cache.states.device)
            inputs.fill((), (), (), Plan([], []))  # recording runs the step too, which must not replay a path twice
            self._replays[rows] = inputs, self._record(lambda: self._head(step(inputs.tokens, inputs.round)))
        return self._replays[rows]
