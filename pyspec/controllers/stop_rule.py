"""The base of the controllers that end a branch by the law which the draft has after its last node.

A rule is asked before the children of a level are drafted, so a node where it stops costs no further call of the draft.
It sees the laws of nodes that are drawn already and never the draw itself, so drawn trees stay exact.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from pyspec.caches import QuantisedSettings
from pyspec.controllers import Controller
from pyspec.drafters import Drafter
from pyspec.drafters.shapes import Level
from pyspec.runners import Runner
from pyspec.tree import DraftTree


class StopRule(Controller):
    """Asks for as many nodes as may be, and says at every level below which nodes drafting goes on.

    Args:
        model, drafter, cache, largest: as every controller that has a name gets them.

    Raises:
        ValueError: if the drafter has no laws of its own.
    """

    def __init__(self, model: Runner | None, drafter: Drafter, cache: QuantisedSettings | None, largest: int):
        super().__init__(largest)
        if not hasattr(drafter, "goes_on"):
            raise ValueError(
                f"drafter must have laws of its own for a {type(self).__name__}, such as a draft model or a trained "
                f'head, got a {type(drafter).__name__}, which has none: use controller="pays"'
            )
        self._slots: list[int] = []  # of this round
        self._stopped: set[int] = set()  # slots whose trees a level of this round ended

    def start(self, slot: int, drafter: Drafter) -> None:
        """Is asked for that sequence's levels from now on, beside what asks already."""
        drafter.goes_on = partial(self._asked, slot, drafter.goes_on)

    def budgets(self, slots: Sequence[int]) -> list[int]:
        """As many nodes as may be for each."""
        self._slots = list(slots)
        self._stopped.clear()
        return super().budgets(slots)

    def learn(
        self,
        trees: Sequence[DraftTree],
        paths: Sequence[Sequence[int]],
        draft_seconds: float,
        verify_seconds: float,
    ) -> None:
        """Hands what became of each tree on to `observe`."""
        for slot, tree, path in zip(self._slots, trees, paths, strict=True):
            self.observe(slot, tree, path, slot in self._stopped)

    @abstractmethod
    def goes_on(self, slot: int, level: Level) -> np.ndarray:
        """Whether [n] children of each node of a level are drafted."""

    def observe(self, slot: int, tree: DraftTree, path: Sequence[int], has_stopped: bool) -> None:
        """Learns what was accepted of a tree, and whether the rule had ended a branch of it."""

    def _asked(self, slot: int, other, level: Level) -> np.ndarray:
        goes_on = self.goes_on(slot, level)
        if not goes_on.all():
            self._stopped.add(slot)
        return goes_on if other is None else goes_on & np.asarray(other(level))


def check_threshold(threshold: float) -> float:
    """A threshold; raises ValueError for one outside (0, 1)."""
    if not 0 < threshold < 1:
        raise ValueError(f"threshold must be in (0, 1), got {threshold}")
    return threshold


def verified_drafts(tree: DraftTree, path: Sequence[int]) -> Iterator[tuple[float, bool]]:
    """The chance of each draft that was judged, by the law after its parent, and whether it was right.

    A draft was judged where its parent was accepted. Trees that state neither chances nor laws have none.
    """
    accepted = set(path)
    chances = None if tree.chances is None else tree.chances.tolist()
    for node, parent in enumerate(tree.parents.tolist()):
        if parent in accepted:
            if chances is not None and chances[parent] > 0:
                yield chances[node] / chances[parent], node in accepted
            elif tree.q is not None:
                yield float(tree.q[parent][tree.tokens[node]]), node in accepted
