"""Drafting ends where the draft's best token is not sure enough, by a threshold that moves. Draft & Verify.

Zhang et al., arXiv 2309.08168: children of a node are drafted if the largest chance of its law is at least t. After
each round with drafts, of which a share r was accepted,

    R <- B1 R + (1 - B1) r
    t' = t + STEP if R < TARGET, t - STEP if not all that may be drafted was accepted, else t
    t <- B2 t + (1 - B2) t'

TARGET = 0.9, B1 = 0.5 and B2 = 0.9 are the authors'. Their STEP is 0.01, so t moves by 0.001 a round and the first
value decides short texts; here it is 0.1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pyspec.controllers import CONTROLLERS
from pyspec.controllers.stop_rule import StopRule, check_threshold
from pyspec.drafters.shapes import Level
from pyspec.tree import DraftTree

FIRST = 0.7
TARGET, STEP, B1, B2 = 0.9, 0.1, 0.5, 0.9


class MovingThreshold(StopRule):
    """Goes on below nodes whose law is sure by a threshold that moves with the acceptance rate, for each text its own.

    Args:
        model, drafter, cache, largest: see StopRule.
        threshold: to begin with, in (0, 1).

    Raises:
        ValueError: for a threshold outside (0, 1), or see StopRule.
    """

    def __init__(self, model, drafter, cache, largest: int, threshold: float = FIRST):
        super().__init__(model, drafter, cache, largest)
        self._first = check_threshold(threshold)
        self._states: dict[int, tuple[float, float]] = {}  # by slot: threshold, acceptance rate

    def start(self, slot, drafter) -> None:
        """A text begins with the first threshold."""
        self._states[slot] = self._first, TARGET
        super().start(slot, drafter)

    def threshold(self, slot: int) -> float:
        """Of a sequence, now."""
        return self._states[slot][0]

    def sureness(self, level: Level) -> np.ndarray:
        """[n], at most 1, of the laws of a level."""
        return level.top[:, 0]

    def goes_on(self, slot: int, level: Level) -> np.ndarray:
        """Whether each law is sure enough."""
        return self.sureness(level) >= self.threshold(slot)

    def observe(self, slot: int, tree: DraftTree, path: Sequence[int], has_stopped: bool) -> None:
        """Moves the threshold: down too where nothing was drafted, or nothing would be ever again."""
        threshold, rate = self._states[slot]
        drafted, accepted = int(tree.depths.max()), len(path) - 1
        if drafted:
            rate = B1 * rate + (1 - B1) * accepted / drafted
            step = STEP if rate < TARGET else -STEP if has_stopped or accepted < drafted else 0.0
        else:
            step = -STEP
        self._states[slot] = min(max(threshold + (1 - B2) * step, 0.0), 1.0), rate


CONTROLLERS.register("moving_threshold", MovingThreshold, "while the best chance is above a moving threshold")
