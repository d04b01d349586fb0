"""Chow-Quantile: an answer is as good as its worst tokens."""

from __future__ import annotations

import numpy as np

from pyspec.answers import ANSWER_RULES, ThresholdRule
from pyspec.arguments import read_number


class ChowQuantile(ThresholdRule):
    """Defers answers of whose tokens some are unlikely, whatever the others are (Gupta et al., arXiv 2404.10136).

    Args:
        threshold: of the quantile of the tokens' log probabilities, in nats.
        quantile: in [0, 1]: 0 looks at the worst token, 1 at the best. Between two tokens it is linear.
    """

    def __init__(self, threshold: float = -2.0, quantile: float = 0.1):
        super().__init__(threshold)
        self.quantile = read_number("quantile", quantile)
        if not 0 <= self.quantile <= 1:
            raise ValueError(f"quantile must be in [0, 1], got {quantile}")

    def score(self, logprobs: np.ndarray) -> float:
        return float(np.quantile(logprobs, self.quantile))


ANSWER_RULES.register("chow_quantile", ChowQuantile, "the large model where the answer's worst tokens are unlikely")
