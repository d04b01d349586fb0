"""Drafting ends where a bound of the acceptance rate, by the entropy of the draft's law, is low. AdaEDL.

Agrawal et al., arXiv 2410.18351. A draft from q is accepted by p with chance 1 - TV(p, q), which is at least
1 - sqrt(KL(q, p) / 2) by Pinsker. KL(q, p) is the cross-entropy less H(q); taking the cross-entropy for (1 + 2 GAMMA)
times H(q), children of a node are drafted if

    1 - sqrt(GAMMA H(q)) >= t

with H in nats and the moving threshold t of Draft & Verify. GAMMA = 0.2 is the authors'. They do not state t's first
value: 0.7 stops from 0.45 nats on, and is between their best ones.
"""

from __future__ import annotations

import numpy as np

from pyspec.controllers import CONTROLLERS
from pyspec.controllers.moving_threshold import MovingThreshold
from pyspec.drafters.shapes import Level

GAMMA = 0.2


class AdaEDL(MovingThreshold):
    """Goes on below nodes whose law has little entropy, by a threshold that moves; arguments as MovingThreshold's."""

    def sureness(self, level: Level) -> np.ndarray:
        """A bound [n] of the acceptance rate."""
        return 1 - np.sqrt(GAMMA * np.maximum(level.entropy, 0.0))


CONTROLLERS.register("adaedl", AdaEDL, "while the entropy is below a moving threshold (AdaEDL)")
