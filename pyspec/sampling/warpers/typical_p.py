"""typical_p: the tokens whose information is nearest to the law's entropy stay."""

from __future__ import annotations

import numpy as np

from pyspec.arguments import read_number
from pyspec.sampling.warpers import WARPERS, Warped, kept


class TypicalP:
    """Keeps the fewest tokens whose mass reaches typical_p, those first whose -log p is nearest to the entropy.

    Of equally near ones the lower token comes first. Meister et al., "Locally typical sampling", arXiv 2202.00666.

    Args:
        typical_p: in (0, 1]; 1 keeps all.
    """

    place = 2

    def __init__(self, typical_p: float):
        self.typical_p = read_number("typical_p", typical_p)
        if not 0 < self.typical_p <= 1:
            raise ValueError(f"typical_p must be in (0, 1], got {typical_p}")

    def start(self, prompt, model) -> None:
        """No state: the text does not matter."""

    def warp(self, state: None, tokens: np.ndarray, scores: np.ndarray) -> Warped:
        if self.typical_p == 1:
            return Warped(tokens, scores)
        weights = np.exp(scores - scores.max())
        law = weights / weights.sum()
        possible = np.flatnonzero(law)
        information = -np.log(law[possible])
        distance = np.abs(information - (law[possible] * information).sum())
        nearest = np.argsort(distance, kind="stable")
        size = int(np.searchsorted(np.cumsum(law[possible][nearest]), self.typical_p)) + 1
        return kept(tokens, scores, np.sort(possible[nearest[:size]]))


WARPERS.register("typical_p", TypicalP, "keep the tokens nearest to the law's entropy, of this mass, in (0, 1]")
