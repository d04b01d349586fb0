"""Turn rules: which of two models writes the next token of a text that both write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from pyspec.registry import Registry

__all__ = ["LARGE", "SMALL", "TURN_RULES", "TurnRule", "entropy_bits"]

SMALL, LARGE = 0, 1

#: What makes the rules, by name; settings are keywords.
TURN_RULES: Registry[Callable[..., TurnRule]] = Registry("pyspec.turns")


class TurnRule(Protocol):
    """Decides token by token, from what was said, so that the text does not depend on how many were drafted.

    Attributes:
        first: SMALL or LARGE, which model writes the first token.
    """

    first: int

    def start(self, seed: int, spelled: Callable[[int], bytes] | None, prompt: Sequence[int]) -> TurnRule:
        """The rule for the text after a prompt. `spelled` gives a token's bytes; None if there is no tokenizer."""
        ...

    def next(self, token: int, row: np.ndarray) -> int:
        """Which model writes after this token, which the model whose turn it is drew from logits [V] float32."""
        ...


def entropy_bits(row: np.ndarray) -> float:
    """The entropy in bits of the law of logits [V], at temperature 1."""
    shifted = row.astype(np.float64) - row.max()
    weights = np.exp(shifted)
    total = weights.sum()
    positive = weights > 0
    return float((np.log(total) - (weights[positive] * shifted[positive]).sum() / total) / np.log(2))
