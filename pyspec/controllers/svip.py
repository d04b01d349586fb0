"""Drafting ends where the entropy of the draft's law is high, by a threshold that stays. SVIP.

Zhang et al., arXiv 2411.18462: children of a node are drafted if sqrt(H(q)) <= MOST, with H in nats. It is AdaEDL's
bound with a threshold that stays, and nothing is learned. The authors tune MOST for each pair of models; 0.6 is a law
that gives its best token about nine times in ten.
"""

from __future__ import annotations

import numpy as np

from pyspec.controllers import CONTROLLERS
from pyspec.controllers.stop_rule import StopRule
from pyspec.drafters.shapes import Level

MOST = 0.6


class Svip(StopRule):
    """Goes on below nodes whose law has little entropy.

    Args:
        model, drafter, cache, largest: see StopRule.
        most: of the square root of the entropy in nats; above 0.

    Raises:
        ValueError: if most is not above 0, or see StopRule.
    """

    def __init__(self, model, drafter, cache, largest: int, most: float = MOST):
        super().__init__(model, drafter, cache, largest)
        if not most > 0:
            raise ValueError(f"most must be above 0, got {most}")
        self.most = most

    def goes_on(self, slot: int, level: Level) -> np.ndarray:
        """Whether each law has little entropy."""
        return np.maximum(level.entropy, 0.0) <= self.most**2


CONTROLLERS.register("svip", Svip, "while the entropy is low (SVIP)")
