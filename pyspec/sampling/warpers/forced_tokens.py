"""forced_tokens: what a text begins with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from pyspec.arguments import read_tokens
from pyspec.sampling.warpers import WARPERS, Warped
from pyspec.sampling.warpers.logit_bias import check_tokens


class ForcedTokens:
    """Makes the text begin with some tokens; the model goes on from there.

    Args:
        forced_tokens: token ids.
    """

    place = -20

    def __init__(self, forced_tokens: Iterable[int]):
        self.tokens = read_tokens("forced_tokens", forced_tokens)

    def start(self, prompt: Sequence[int], model) -> int:
        check_tokens("forced_tokens", self.tokens, model)
        return 0

    def warp(self, state: int, tokens: np.ndarray, scores: np.ndarray) -> Warped:
        if state == len(self.tokens):
            return Warped(tokens, scores, lambda token: state)
        forced = np.full_like(scores, -np.inf)
        forced[self.tokens[state]] = 0
        return Warped(tokens, forced, lambda token: state + 1)

    def forced(self, state: int) -> list[int]:
        """The tokens that must come next."""
        return self.tokens[state:]


WARPERS.register("forced_tokens", ForcedTokens, "token ids that the text begins with")
