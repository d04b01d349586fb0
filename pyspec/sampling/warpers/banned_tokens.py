"""banned_tokens: what a text must not say."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from pyspec.arguments import described, is_scalar, read_tokens
from pyspec.sampling.warpers import WARPERS, Warped
from pyspec.sampling.warpers.logit_bias import check_tokens


class BannedTokens:
    """Forbids tokens, and sequences of tokens: of these the last, after the others.

    Args:
        banned_tokens: token ids, and lists of token ids, none empty. A sequence that begins in the prompt counts.
    """

    place = -30

    def __init__(self, banned_tokens: Iterable[int | Sequence[int]]):
        if isinstance(banned_tokens, (str, bytes)) or not isinstance(banned_tokens, Iterable):
            raise TypeError(f"banned_tokens must be token ids and lists of them, got {described(banned_tokens)}")
        listed = [[each] if is_scalar(each) else each for each in banned_tokens]
        self.sequences = [tuple(read_tokens("banned_tokens", each)) for each in listed]
        if not all(self.sequences):
            raise ValueError("banned_tokens must hold sequences that are not empty, got []")
        self._longest = max(map(len, self.sequences), default=1)

    def start(self, prompt: Sequence[int], model) -> tuple[int, ...]:
        check_tokens("banned_tokens", [token for sequence in self.sequences for token in sequence], model)
        return self._end(tuple(prompt))

    def warp(self, state: tuple[int, ...], tokens: np.ndarray, scores: np.ndarray) -> Warped:
        scores = scores.copy()
        for *begin, last in self.sequences:
            if state[len(state) - len(begin) :] == tuple(begin):
                scores[last] = -np.inf
        return Warped(tokens, scores, lambda token: self._end((*state, token)))

    def _end(self, text: tuple[int, ...]) -> tuple[int, ...]:
        """The end of a text that a banned sequence may begin in."""
        return text[max(0, len(text) - self._longest + 1) :]


WARPERS.register("banned_tokens", BannedTokens, "token ids, and lists of them, that the text must not have")
