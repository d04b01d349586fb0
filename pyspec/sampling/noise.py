"""Noise: the uniform numbers that one round draws its drafts with, or judges them with."""

from __future__ import annotations

import math

import numpy as np


class Noise:
    """A stream of uniforms that belongs to a seed, a position of the text and a purpose.

    Each round of a sequence begins at a position of its own, so no round meets a number that an earlier one looked
    at: a rule may look at coins of drafts that it does not keep.

    Args:
        seed: integer in [0, 2**64).
        position: that of the first token which the round decides.
        purpose: Noise.ACCEPTANCE, Noise.DRAFTS or Noise.TURNS.
    """

    ACCEPTANCE, DRAFTS, TURNS = 1, 2, 3  # the Sampler's own noise is 0

    def __init__(self, seed: int, position: int, purpose: int):
        self._key, self._counter = seed, [0, 0, position, purpose]
        self._bits: np.random.Philox | None = None  # made when it is used, which few rounds do

    def uniform(self) -> float:
        """The next uniform number in (0, 1)."""
        if self._bits is None:
            self._bits = np.random.Philox(key=self._key, counter=self._counter)
        # raw bits are stable between numpy's versions; half a step keeps 0 and 1 out
        return ((self._bits.random_raw() >> 12) + 0.5) * 2.0**-52

    def coin(self, probability: float) -> bool:
        """Is true with this probability, which counts as 1 if it is larger."""
        return self.uniform() < probability

    def exponential(self) -> float:
        """The next exponential number, of mean 1."""
        return -math.log(self.uniform())

    def draw(self, law: np.ndarray) -> int:
        """Draws a token by its share of law [V] float64, which has mass but need not sum to 1."""
        sums = np.cumsum(law)
        # a uniform is at most 1 - 2**-53, so the product stays below the whole sum, and a token without mass, whose
        # sum is that of the token before it, is never the first above it
        return int(np.searchsorted(sums, self.uniform() * sums[-1], side="right"))
