"""The controller that drafts as many nodes as pay.

A round gives one token and its accepted drafts, and takes as long as verifying its nodes. The best number of nodes m
maximises

    (1 + sum of the chances of the first m - 1 drafts) / seconds(m)

over trees that drafters grow best node first. m = 1 is plain decoding, so speculation that does not pay is left out.
Drafting takes time too: while rounds with it lose against plain decoding, it is tried rarely (PayingController).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np

from pyspec.caches import QuantisedSettings
from pyspec.controllers import CONTROLLERS, LARGEST, Controller
from pyspec.drafters import Drafter
from pyspec.drafters.pace import Pace
from pyspec.machine.running_costs import NODES, RunningCosts, running_costs
from pyspec.runners import Runner
from pyspec.tree import DraftTree

FEWEST = 8  # nodes that are asked for, so that a tree which was not worth it lately gets its chance
TRUST = 8.0  # accepted drafts that the drafter's own word is worth
MEMORY = 0.98  # of what earlier rounds showed, from round to round
RECENT = 0.1  # what the last round counts in the mean of what rounds with drafts lost
MOST_LOST = 2.0  # plain rounds that one round is taken to have lost at most: a machine may hang
LEARNING = 0.1  # plain rounds that a round may lose for what is learned from it
TRIALS = 0.02  # share of the time that drafting may lose


class PayingController(ABC):
    """Decides how many nodes of a round pay from what earlier rounds cost and gave.

    When rounds with drafts give much less than plain decoding would in their time, drafting with it, as many plain
    rounds follow each of them as keep the loss at about TRIALS of the time.

    Args:
        costs: gives what a verification costs now.
        largest: nodes of a tree, at most.
        pace: of the drafter, which is told what tokens take.
    """

    def __init__(self, costs: Callable[[], RunningCosts], largest: int = LARGEST, pace: Pace | None = None):
        self.largest = largest
        self._costs, self._pace = costs, pace
        self._called: set[int] = set()  # numbers of nodes: a first call may be recorded, which takes longer
        self._trial: int | None = None  # nodes of the next round, for the sake of what they cost
        self._lost = 0.0  # plain rounds that a round with drafts loses, lately; negative where it wins
        self._resting = 0  # plain rounds that are left

    @property
    def nodes(self) -> int:
        """Nodes that a drafter should propose; 1 while drafting rests."""
        if self._resting:
            return 1
        return min(self._wanted(), self.largest) if self._trial is None else min(self._trial, self.largest)

    def learn(
        self,
        trees: Sequence[DraftTree],
        paths: Sequence[Sequence[int]],
        draft_seconds: float,
        verify_seconds: float,
    ) -> None:
        """Learns how much of a round's trees was accepted, and what proposing and verifying them took."""
        for tree, path in zip(trees, paths, strict=True):
            self._learn(tree, path)
        nodes, costs = sum(map(len, trees)), self._costs()
        trial, self._trial = self._trial, None
        if len(trees) == 1:  # the nodes of several texts cost something else
            if nodes in self._called:
                costs.learn(nodes, verify_seconds)
            self._called.add(nodes)
            if not self._resting:
                self._trial = costs.size_to_try()
        if self._resting:
            self._resting -= 1
            return
        if trial is not None:
            return
        if self._pace is not None:
            self._pace.took_token((draft_seconds + verify_seconds) / sum(map(len, paths)))
        seconds = costs.up_to(nodes)
        plain_rounds = seconds[nodes] / seconds[len(trees)] * (1 + draft_seconds / verify_seconds)
        lost = plain_rounds - sum(map(len, paths)) / len(trees)
        self._lost += RECENT * (min(lost, MOST_LOST) - self._lost)
        self._resting = max(0, int((self._lost - LEARNING) / TRIALS))

    @abstractmethod
    def cut(self, trees: Sequence[DraftTree]) -> list[DraftTree]:
        """Cuts the trees of a round to what is verified."""

    @abstractmethod
    def _wanted(self) -> int: ...

    @abstractmethod
    def _learn(self, tree: DraftTree, path: Sequence[int]) -> None: ...


class CuttingController(PayingController):
    """Cuts the trees of a round to the nodes that pay.

    Drafters state chances for greedy text and are sometimes wrong; what they promised is therefore scaled by what was
    accepted of it lately.
    """

    def __init__(self, costs: Callable[[], RunningCosts], largest: int = LARGEST, pace: Pace | None = None):
        super().__init__(costs, largest, pace)
        self._promised = self._accepted = 0.0
        self._largest_kept = largest

    def _wanted(self) -> int:
        # twice what was worth it last time, for growing costs time too
        return max(2 * self._largest_kept, FEWEST)

    def cut(self, trees: Sequence[DraftTree]) -> list[DraftTree]:
        """Keeps the first nodes of each tree, and all of a tree that has no chances."""
        if self._trial is not None and len(trees) == 1:
            return list(trees)
        scale = (self._accepted + TRUST) / (self._promised + TRUST)
        drafts = []  # (chance, tree) of all that may be left out
        for index, tree in enumerate(trees):
            chance = 1.0
            for stated in [] if tree.chances is None else tree.chances[1:].tolist():
                chance = min(chance, stated * scale)
                drafts.append((chance, index))
        if len(trees) > 1:
            drafts.sort(key=lambda draft: draft[0], reverse=True)  # the drafts of one tree stay in their order
        nodes = sum(len(tree) if tree.chances is None else 1 for tree in trees)
        seconds = self._costs().up_to(nodes + len(drafts))
        tokens = float(len(trees))
        best, most = 0, tokens / seconds[nodes]
        for taken, (chance, _) in enumerate(drafts, start=1):
            tokens += chance
            if len(trees) == 1 and nodes + taken not in NODES:  # the first round of every other size is recorded
                continue
            if tokens / seconds[nodes + taken] > most:
                best, most = taken, tokens / seconds[nodes + taken]
        kept = [len(tree) if tree.chances is None else 1 for tree in trees]
        for _, index in drafts[:best]:
            kept[index] += 1
        self._largest_kept = max(kept)
        return [tree.first(count) for tree, count in zip(trees, kept, strict=True)]

    def _learn(self, tree: DraftTree, path: Sequence[int]) -> None:
        if tree.chances is not None:
            self._promised = self._promised * MEMORY + sum(tree.chances[1:].tolist())
            self._accepted = self._accepted * MEMORY + len(path) - 1


class SizingController(PayingController):
    """Decides the number of nodes before they are drawn, for drafters that draw: no drawn node may be left out.

    How likely the i-th node of a tree is to be accepted is learned from earlier rounds, whose draws are over.
    """

    def __init__(self, costs: Callable[[], RunningCosts], largest: int = LARGEST, pace: Pace | None = None):
        super().__init__(costs, largest, pace)
        # until more is known, a tree of m nodes gives about log(m) + 1 tokens
        self._promised = 1 / (1 + np.arange(1, LARGEST))
        self._accepted, self._tried = (np.zeros(LARGEST - 1) for _ in range(2))
        self._trees = 1

    def _wanted(self) -> int:
        tried = self._tried @ self._promised
        scale = (self._accepted.sum() + TRUST) / (tried + TRUST)
        chances = (self._accepted + TRUST * scale * self._promised) / (self._tried + TRUST)
        tokens = 1 + np.concatenate(([0.0], np.cumsum(chances)))
        seconds = self._costs().up_to(LARGEST * self._trees)
        return 1 + int(np.argmax(tokens / seconds[self._trees : (LARGEST + 1) * self._trees : self._trees]))

    def cut(self, trees: Sequence[DraftTree]) -> list[DraftTree]:
        """Keeps the trees whole."""
        self._trees = len(trees)
        return list(trees)

    def _learn(self, tree: DraftTree, path: Sequence[int]) -> None:
        self._accepted *= MEMORY
        self._tried *= MEMORY
        self._tried[: len(tree) - 1] += 1
        self._accepted[np.array(path[1:], int) - 1] += 1


def new_controller(model: Runner, drafter: Drafter, cache: QuantisedSettings | None, largest: int) -> Controller:
    """The controller for a drafter, by the costs of a model: drawn trees may not be cut, chosen ones may."""
    kind = SizingController if drafter.proposal == "sampled" else CuttingController
    return kind(running_costs(model, cache), largest, getattr(drafter, "pace", None))


CONTROLLERS.register("auto", new_controller, "as many as pay")
