"""Entropy adaptive decoding: the large model writes where the one that writes is unsure."""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from pyspec.arguments import read_integer, read_number
from pyspec.turns import LARGE, SMALL, TURN_RULES, entropy_bits


class EntropyTurns:
    """The large model writes while the mean entropy of the last laws is above a threshold (arXiv 2502.06833).

    Each law is that of the model that wrote the token, at temperature 1. A model that begins writes some tokens before
    it can be relieved.

    Args:
        threshold: bits, above 0. The paper tunes it for a share of the large model; at 1 bit a law is as unsure as a
            coin.
        window: tokens of the mean, at least 1; 5 is the paper's.
        stay: tokens that a model writes at least; the paper has such a limit, and does not say which.
    """

    first = SMALL

    def __init__(self, threshold: float = 1.0, window: int = 5, stay: int = 5):
        self.threshold = read_number("threshold", threshold)
        self.window, self.stay = read_integer("window", window), read_integer("stay", stay)
        if not 0 < self.threshold < math.inf:
            raise ValueError(f"threshold must be finite and above 0, got {threshold}")
        for name, value in (("window", self.window), ("stay", self.stay)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    def start(self, seed: int, spelled: Callable[[int], bytes] | None, prompt: Sequence[int]) -> EntropyTurns:
        rule = copy.copy(self)
        rule._bits, rule._active, rule._since = deque(maxlen=self.window), self.first, 0
        return rule

    def next(self, token: int, row: np.ndarray) -> int:
        self._bits.append(entropy_bits(row))
        self._since += 1
        wanted = LARGE if sum(self._bits) / len(self._bits) > self.threshold else SMALL
        if wanted != self._active and self._since >= self.stay:
            self._active, self._since = wanted, 0
        return self._active


TURN_RULES.register("entropy", EntropyTurns, "the large model where the last tokens were unsure (arXiv 2502.06833)")
