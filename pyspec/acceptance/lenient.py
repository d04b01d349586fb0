"""Lenience, lossy: drafts are rejected less often than their law calls for."""

from __future__ import annotations

from pyspec.acceptance.laws import LawRule
from pyspec.acceptance.recursive import recursive_rejection
from pyspec.sampling.noise import Noise
from pyspec.tree import Accepted, DraftTree


class LenientAcceptance(LawRule):
    """Recursive rejection with q taken `lenience` times. The text is NOT the target's.

    On a chain no token becomes more than 1 / lenience times as likely as the target has it. Leviathan et al.,
    arXiv 2211.17192, appendix A.5.

    Args:
        lenience: in (0, 1]; 1 is exact.
    """

    law = "heuristic"
    siblings = frozenset({"none", "with replacement", "without replacement"})

    def __init__(self, lenience: float):
        if not 0 < lenience <= 1:
            raise ValueError(f"lenience must be in (0, 1], got {lenience}")
        self.lenience = lenience

    def judge(self, tree: DraftTree, p, q, noise: Noise) -> Accepted:
        return recursive_rejection(tree, p, q, noise, self.lenience)
