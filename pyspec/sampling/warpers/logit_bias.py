"""logit_bias: a number added to a token's logit."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pyspec.arguments import described, read_integer, read_number
from pyspec.sampling.warpers import WARPERS, Warped


class LogitBias:
    """Adds a number to the logits of some tokens.

    Args:
        logit_bias: the numbers by token id, which may be a string as in JSON; -inf forbids a token.
    """

    place = -70

    def __init__(self, logit_bias: Mapping[int | str, float]):
        if not isinstance(logit_bias, Mapping):
            raise TypeError(f"logit_bias must be numbers by token id, got {described(logit_bias)}")
        bias = {}
        for token, number in logit_bias.items():
            is_text = isinstance(token, str) and token.isdecimal()
            number = read_number(f"logit_bias[{token}]", number)
            if not number < np.inf:
                raise ValueError(f"logit_bias[{token}] must be a number below infinity, got {number}")
            bias[read_integer("logit_bias", int(token) if is_text else token, "numbers by token id")] = number
        self.tokens, self.numbers = np.array([*bias], dtype=np.int64), np.array([*bias.values()])

    def start(self, prompt, model) -> None:
        check_tokens("logit_bias", self.tokens, model)

    def warp(self, state: None, tokens: np.ndarray, scores: np.ndarray) -> Warped:
        scores = scores.copy()
        scores[self.tokens] += self.numbers
        return Warped(tokens, scores)


def check_tokens(name: str, tokens, model) -> None:
    """Raises ValueError for tokens that are not in a model's vocabulary."""
    wrong = [int(token) for token in tokens if not 0 <= token < model.vocab_size]
    if wrong:
        raise ValueError(f"{name} must hold tokens in [0, {model.vocab_size}), got {wrong[0]}")


WARPERS.register("logit_bias", LogitBias, "numbers added to logits, by token id")
