"""min_p: a token stays if its share is at least min_p times the likeliest token's."""

from __future__ import annotations

import math

import numpy as np

from pyspec.arguments import read_number
from pyspec.sampling.warpers import WARPERS, Warped, kept


class MinP:
    """Keeps the tokens whose probability is at least min_p times that of the likeliest.

    Nguyen et al., "Turning up the heat", arXiv 2407.01082.

    Args:
        min_p: in [0, 1]; 0 keeps all, 1 the likeliest alone.
    """

    place = 1

    def __init__(self, min_p: float):
        self.min_p = read_number("min_p", min_p)
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], got {min_p}")
        self._least = math.log(self.min_p) if self.min_p else -math.inf

    def start(self, prompt, model) -> None:
        """No state: the text does not matter."""

    def warp(self, state: None, tokens: np.ndarray, scores: np.ndarray) -> Warped:
        return kept(tokens, scores, scores >= scores.max() + self._least)


WARPERS.register("min_p", MinP, "keep tokens at least this share as likely as the likeliest, in [0, 1]")
