"""DySpec: the node that verification is most likely to reach is drawn next."""

from __future__ import annotations

import heapq

import numpy as np

from pyspec.drafters.shapes import Growing, GrowthPolicy, Sapling
from pyspec.sampling.noise import Noise


class _Slots:
    """Places for another child, and the estimated chance that verification reaches each.

    A token that was drawn with q is taken to be accepted with chance q. So if a slot is reached with chance v and the
    draw is x, a first child of x is reached with v q(x), and a next sibling of x with v (1 - q(x)), q being what the
    draws before it left of the law.
    """

    def __init__(self, sapling: Sapling, noise: Noise):
        self._sapling, self._noise = sapling, noise
        self._left: dict[int, np.ndarray] = {}  # of each node's law
        self._heap: list[tuple[float, int]] = []  # (-chance, node)

    def open(self, node: int, chance: float) -> None:
        """A first child of node."""
        heapq.heappush(self._heap, (-chance, node))

    @property
    def best(self) -> float:
        """The chance of the best slot, 0 if there is none."""
        return -self._heap[0][0] if self._heap else 0.0

    @property
    def unknown(self) -> list[int]:
        """The node of the best slot, if its law was not asked for yet."""
        return [node for _, node in self._heap[:1] if node not in self._left]

    def ask(self, nodes: list[int]) -> None:
        """Asks for the laws of nodes at once, and closes the slots where drafting stops."""
        laws = self._sapling.laws(nodes)
        for node, law, goes_on in zip(nodes, laws, self._sapling.goes_on(nodes), strict=True):
            self._left[node] = law.copy()
            if not goes_on:
                self._heap = [slot for slot in self._heap if slot[1] != node]
        heapq.heapify(self._heap)

    def draw(self) -> tuple[int, float]:
        """Draws at the best slot and opens its sibling's: the child, and the chance of a first child of it."""
        negated, node = heapq.heappop(self._heap)
        left = self._left[node]
        total = left.sum()
        token = self._noise.draw(left)
        share = left[token] / total
        left[token] = 0
        if (rest := left.sum()) > 0:
            heapq.heappush(self._heap, (negated * rest / total, node))
        return self._sapling.add(node, token), -negated * share


class DySpecGreedy(GrowthPolicy):
    """Draws at the best slot until the budget is used; asks for one law at a time.

    Xiong et al., "DySpec", arXiv 2410.11744. The decision to draw is made by the chance of the slot, which was known
    before the draw.
    """

    proposal = "sampled"
    siblings = "without replacement"

    def growing(self, sapling: Sapling, noise: Noise) -> Growing:
        slots = _Slots(sapling, noise)
        slots.open(0, 1.0)
        while sapling.room and slots.best > 0:
            if slots.unknown:
                yield slots.unknown
                slots.ask(slots.unknown)
            else:
                slots.open(*slots.draw())
        return sapling.drawn()


class DySpecThreshold(GrowthPolicy):
    """Draws level by level at all slots with a chance of at least `threshold`; asks for the laws of a level at once.

    Of more nodes than the budget, those with the best slots stay: what DySpecGreedy would draw down to the threshold.

    Args:
        threshold: in (0, 1]; about one over the budget uses the budget.
    """

    proposal = "sampled"
    siblings = "without replacement"

    def __init__(self, threshold: float):
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold must be in (0, 1], got {threshold}")
        self.threshold = threshold

    def growing(self, sapling: Sapling, noise: Noise) -> Growing:
        budget = sapling.budget
        chances = [1.0]  # of the slot that each node was drawn at; the root comes first

        def pays(chance: float) -> bool:
            return chance >= self.threshold and sum(other >= chance for other in chances) < budget

        level = [(0, 1.0)] if budget > 1 else []
        while level:
            slots = _Slots(sapling, noise)
            for slot in level:
                slots.open(*slot)
            asked = [node for node, _ in level]
            yield asked
            slots.ask(asked)
            grown = []
            while pays(slots.best):
                chances.append(slots.best)
                grown.append(slots.draw())
            level = [(child, chance) for child, chance in grown if pays(chance)]
        # of equal nodes the first: parents stay before their children, and siblings in order
        best = np.argsort(-np.array(chances), kind="stable")[:budget]
        return sapling.drawn(np.sort(best).tolist())
