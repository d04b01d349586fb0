"""Two drafts more after a round that kept all, one less after any other. transformers' "heuristic" schedule.

For a drafter with laws the number is levels of a tree, whatever its width; for any other it is drafts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pyspec.controllers import CONTROLLERS, Controller
from pyspec.drafters import Drafter
from pyspec.drafters.shapes import Level
from pyspec.tree import DraftTree

FIRST = 5  # drafts: transformers' default when the schedule came; it is 20 now, for a threshold that ends them earlier
MORE, LESS = 2, 1


class Heuristic(Controller):
    """Counts up and down. All texts of a call share the count, as one after another do in transformers."""

    def __init__(self, model, drafter: Drafter, cache, largest: int):
        super().__init__(largest)
        self.drafts = FIRST
        self._has_levels = hasattr(drafter, "goes_on")

    @property
    def nodes(self) -> int:
        """One more than drafts, or as many as may be where levels are counted."""
        return self.largest if self._has_levels else min(self.drafts + 1, self.largest)

    def start(self, slot: int, drafter: Drafter) -> None:
        """Counts the levels of that sequence's trees, beside what ends them already."""
        if self._has_levels:
            other = drafter.goes_on

            def goes_on(level: Level) -> np.ndarray:
                is_above = level.depths < self.drafts
                return is_above if other is None else is_above & np.asarray(other(level))

            drafter.goes_on = goes_on

    def learn(
        self,
        trees: Sequence[DraftTree],
        paths: Sequence[Sequence[int]],
        draft_seconds: float,
        verify_seconds: float,
    ) -> None:
        """Counts; rounds in which nothing was drafted do not count."""
        for tree, path in zip(trees, paths, strict=True):
            drafted = int(tree.depths.max())
            if drafted:
                change = MORE if len(path) - 1 == drafted else -LESS
                self.drafts = min(max(self.drafts + change, 1), self.largest - 1 or 1)


CONTROLLERS.register("heuristic", Heuristic, "two drafts more after a round that kept all, else one less")
