"""As many nodes as gave most by windows of the last rounds, place by place. SGLang's "throughput_aware".

    argmax over sizes m of  (1 + sum over i < m of p_i) / (cost(m) + drafting)

with p_i the share of the last 20 rounds with an i-th draft in which it was accepted, and one more in which it was not.
Places that no round has had are taken to fall as the last ones did, and no tree is more than twice as large as one of
these rounds: what was always right for a while would be taken to be right for ever. SGLang counts positions of a chain
and profiles costs at its start; here they are places in the order in which nodes were proposed, so a tree's count too,
and costs are those that rounds had lately.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pyspec.controllers import CONTROLLERS, Controller
from pyspec.machine.running_costs import NODES, running_costs
from pyspec.tree import DraftTree

WINDOW = 20  # rounds, SGLang's
EVERY = 10  # rounds between two decisions, SGLang's
FIRST = 8  # nodes, before anything is known
FEWEST = 2  # nodes: a window without drafts would never change
LEAST = 1e-3  # of a chance that is carried on


class Throughput(Controller):
    """Sizes the trees of all texts of a call by what the last rounds accepted, place by place.

    Args:
        model, drafter, cache, largest: as every controller that has a name gets them.
    """

    shared = frozenset({"_costs"})

    def __init__(self, model, drafter, cache, largest: int):
        super().__init__(largest)
        self._costs = running_costs(model, cache)
        self._window: list[tuple[int, list[int]]] = []  # drafts of a round, and the places of accepted ones
        self._rounds, self._drafting = 0, 0.0
        self._nodes = min(FIRST, largest)

    @property
    def nodes(self) -> int:
        """What gave most lately."""
        return self._nodes

    def learn(
        self,
        trees: Sequence[DraftTree],
        paths: Sequence[Sequence[int]],
        draft_seconds: float,
        verify_seconds: float,
    ) -> None:
        """Learns what was accepted, place by place, and decides anew now and then."""
        for tree, path in zip(trees, paths, strict=True):
            if len(tree) > 1:
                self._window.append((len(tree) - 1, [node - 1 for node in path[1:]]))
        self._window = self._window[-WINDOW * len(trees) :]
        costs, nodes = self._costs(), sum(map(len, trees))
        if len(trees) == 1 and self._rounds:  # the first one is recorded
            costs.learn(nodes, verify_seconds)
        if verify_seconds > 0 and nodes > len(trees):
            steps = costs.seconds[nodes] / costs.seconds[len(trees)]
            self._drafting += 0.1 * (steps * draft_seconds / verify_seconds - self._drafting)
        self._rounds += 1
        if self._rounds % EVERY == 0:
            self._nodes = self._best(len(trees))

    def _best(self, texts: int) -> int:
        costs, tokens = self._costs().seconds, 1 + np.concatenate(([0.0], np.cumsum(self._chances())))
        most = min(2 * (1 + max((drafts for drafts, _ in self._window), default=0)), self.largest)
        sizes = [size for size in NODES if FEWEST <= size <= most] or [min(FEWEST, self.largest)]
        return max(sizes, key=lambda m: tokens[m - 1] / (costs[texts * m] / costs[texts] + self._drafting))

    def _chances(self) -> np.ndarray:
        tried, accepted = np.zeros(self.largest - 1), np.zeros(self.largest - 1)
        for drafts, places in self._window:
            tried[:drafts] += 1
            accepted[places] += 1
        known = np.count_nonzero(tried)
        chances = accepted / (tried + 1)
        if known > 0:
            first, last = max(chances[0], LEAST), max(chances[known - 1], LEAST)
            fall = (last / first) ** (1 / (known - 1)) if known > 1 else last
            chances[known:] = chances[known - 1] * min(fall, 1.0) ** np.arange(1, len(chances) - known + 1)
        return chances


CONTROLLERS.register("throughput", Throughput, "as many as gave most lately, place by place (SGLang)")
