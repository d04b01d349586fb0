"""FoReaL: the large model begins sentences, the small one ends them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import numpy as np

from pyspec.arguments import read_integer, read_number
from pyspec.sampling.noise import Noise
from pyspec.turns import LARGE, SMALL, TURN_RULES


class ForealTurns:
    """The large model writes the first tokens of a sentence with some probability, the small one the rest.

    A sentence ends with a token whose text ends in ., !, ? or a line feed, spaces behind it aside. arXiv 2506.06998.

    Args:
        lead: tokens of a sentence that the large model writes, at least 1; 15 is the paper's.
        probability: in (0, 1] of a sentence that the large model begins; the coin belongs to the seed and to the
            sentence's number.

    Raises:
        ValueError: the models have no tokenizer.
    """

    first = LARGE

    def __init__(self, lead: int = 15, probability: float = 1.0):
        self.lead, self.probability = read_integer("lead", lead), read_number("probability", probability)
        if self.lead < 1:
            raise ValueError(f"lead must be at least 1, got {lead}")
        if not 0 < self.probability <= 1:
            raise ValueError(f"probability must be in (0, 1], got {probability}")

    def start(self, seed: int, spelled: Callable[[int], bytes] | None, prompt: Sequence[int]) -> ForealTurns:
        if spelled is None:
            raise ValueError("the rule foreal needs text to know where sentences end, and the models have no tokenizer")
        rule = copy.copy(self)
        rule._seed, rule._spelled, rule._sentence = seed, spelled, 0
        rule._begin()
        rule.first = rule._of(0)
        return rule

    def next(self, token: int, row: np.ndarray) -> int:
        self._written += 1
        if self._spelled(token).rstrip(b" ").endswith((b".", b"!", b"?", b"\n")):
            self._sentence += 1
            self._begin()
        return self._of(self._written)

    def _begin(self) -> None:
        self._written = 0
        self._leads = Noise(self._seed, self._sentence, Noise.TURNS).coin(self.probability)

    def _of(self, written: int) -> int:
        return LARGE if self._leads and written < self.lead else SMALL


TURN_RULES.register(
    "foreal", ForealTurns, "the large model begins sentences, the small one ends them (arXiv 2506.06998)"
)
