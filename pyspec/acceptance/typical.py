"""Typical acceptance, lossy: a draft is kept if the target finds it likely enough."""

from __future__ import annotations

import math

import numpy as np

from pyspec.acceptance import RULES
from pyspec.acceptance.laws import LawRule, children_of
from pyspec.sampling.noise import Noise
from pyspec.tree import Accepted, DraftTree


def typical(tree: DraftTree, p, noise: Noise, threshold: float, alpha: float) -> Accepted:
    """Accepts child x of an accepted node with law p iff p(x) > min(threshold, alpha exp(-entropy of p)).

    The longest accepted path is kept, of equally long ones the likeliest, and a token of the last p is emitted. Cai et
    al., "Medusa", arXiv 2401.10774.
    """
    children, tokens = children_of(tree), tree.tokens.tolist()
    best, accepted = (0, 0.0, [0]), [(0, 0.0, [0])]  # depth, log probability, path
    while accepted:
        depth, likelihood, path = accepted.pop()
        best = max(best, (depth, likelihood, path), key=lambda end: end[:2])
        if not children[path[-1]]:
            continue
        law = p[path[-1]]
        positive = law[law > 0]
        bar = min(threshold, alpha * math.exp((positive * np.log(positive)).sum()))
        for child in children[path[-1]]:
            if law[tokens[child]] > bar:
                accepted.append((depth + 1, likelihood + math.log(law[tokens[child]]), [*path, child]))
    return Accepted(best[2], noise.draw(p[best[2][-1]]))


class TypicalAcceptance(LawRule):
    """The acceptance rule of `typical`, with Medusa's constants. The text is NOT the target's, except greedily.

    Args:
        threshold: in (0, 1): enough whatever the entropy.
        alpha: in (0, 1): how far below exp(-entropy) is still enough.
    """

    law = "heuristic"
    siblings = None

    def __init__(self, threshold: float = 0.3, alpha: float = 0.09):
        for name, value in (("threshold", threshold), ("alpha", alpha)):
            if not 0 < value < 1:
                raise ValueError(f"{name} must be in (0, 1), got {value}")
        self.threshold, self.alpha = threshold, alpha

    def judge(self, tree: DraftTree, p, q, noise: Noise) -> Accepted:
        return typical(tree, p, noise, self.threshold, self.alpha)


RULES.register("typical", TypicalAcceptance, "every tree; not the target's text (Medusa, arXiv 2401.10774)")
