"""Drafting ends where a trained classifier does not expect a right draft. DISCO.

Mamou et al., arXiv 2405.04304: after each draft a small network sees the ten best chances of the draft's law, its
entropy and the position, and drafting stops where it gives less than a threshold; it is trained with a logistic loss on
what a target accepted, and the threshold is chosen on other prompts. Here it is asked of a node before its children are
drafted, it sees eight chances, which one pass over the logits finds, and also the chance of the node's path, for in a
tree a node may be wrong itself. training/stop_rules.py makes a file; that of the demo head ships with pyspec.
"""

from __future__ import annotations

import numpy as np

from pyspec.controllers import CONTROLLERS
from pyspec.controllers.trained_rule import TrainedRule
from pyspec.drafters.shapes import Level

FEATURES = 11
DEEP = 8.0  # levels: features are of about -1 to 1
WIDE = 4.0  # nats


class Disco(TrainedRule):
    """Goes on below nodes whose children are likely enough to be right, by a classifier; arguments as TrainedRule's."""

    name, inputs = "disco", FEATURES

    def goes_on(self, slot: int, level: Level) -> np.ndarray:
        """Whether a child of each node is likely enough to be right."""
        return self.chance(features(level)) >= self.threshold


def features(level: Level) -> np.ndarray:
    """[n, 11]: the eight best chances, entropy, depth and the chance of the path."""
    return np.column_stack((level.top, level.entropy / WIDE, level.depths / DEEP, level.paths))


CONTROLLERS.register(Disco.name, Disco, "while a classifier expects a right draft (DISCO)")
