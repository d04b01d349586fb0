"""Chow's rules for answers: the log probability of the whole, or its mean over the tokens."""

from __future__ import annotations

import numpy as np

from pyspec.answers import ANSWER_RULES, ThresholdRule


class ChowSum(ThresholdRule):
    """Defers answers whose log probability is low (Gupta et al., arXiv 2404.10136). Long answers score low.

    Args:
        threshold: of the sum of the tokens' log probabilities, in nats.
    """

    def __init__(self, threshold: float = -20.0):
        super().__init__(threshold)

    def score(self, logprobs: np.ndarray) -> float:
        return float(logprobs.sum())


class ChowAverage(ThresholdRule):
    """Defers answers whose tokens are unlikely on average (Gupta et al., arXiv 2404.10136).

    Args:
        threshold: of the mean of the tokens' log probabilities, in nats.
    """

    def __init__(self, threshold: float = -0.7):
        super().__init__(threshold)

    def score(self, logprobs: np.ndarray) -> float:
        return float(logprobs.mean())


ANSWER_RULES.register(
    "chow_sum", ChowSum, "the large model where the answer's log probability is low (arXiv 2404.10136)"
)
ANSWER_RULES.register("chow_average", ChowAverage, "the large model where the mean of the tokens' is low")
