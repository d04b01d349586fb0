"""Drafting ends with the level after which a trained network expects nothing more. Dynamic multi-candidate decoding.

Lu et al., arXiv 2409.10644: a small network sees what the draft said of a level and decides whether there is another
one, for the whole level at once. Its other two ideas are not in it: roots that are the target's best tokens would bias
drawn texts, and masks are bits here, which cost nothing to cut. It is trained as DISCO's classifier is, by
training/stop_rules.py, on whether the text went through a node below the level.
"""

from __future__ import annotations

import numpy as np

from pyspec.controllers import CONTROLLERS
from pyspec.controllers.disco import DEEP, WIDE
from pyspec.controllers.trained_rule import TrainedRule
from pyspec.drafters.shapes import Level

FEATURES = 7


class MultiCandidate(TrainedRule):
    """Goes on below all nodes of a level or none, by a network; arguments as TrainedRule's."""

    name, inputs = "multi_candidate", FEATURES

    def goes_on(self, slot: int, level: Level) -> np.ndarray:
        """Whether another level is worth it."""
        goes_on = self.chance(features(level)[None])[0] >= self.threshold
        return np.full(len(level.depths), bool(goes_on))


def features(level: Level) -> np.ndarray:
    """[7]: depth, the best and the sum of the paths' chances, of that best path the best chances of its law and its
    entropy, and what the best children of all nodes are expected to add."""
    best = int(level.paths.argmax())
    paths, top = level.paths, level.top
    found = (level.depths[best] / DEEP, paths[best], paths.sum(), *top[best, :2], level.entropy[best] / WIDE)
    return np.array([*found, paths @ top[:, 0]])


CONTROLLERS.register(MultiCandidate.name, MultiCandidate, "while a network expects more of a level (dynamic MCSD)")
