"""Answer rules: whether a large model answers again what a small one has answered."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import numpy as np

from pyspec.arguments import read_number
from pyspec.registry import Registry

__all__ = ["ANSWER_RULES", "AnswerRule", "ThresholdRule"]

#: What makes the rules, by name; `threshold` is a keyword of all, and the dial.
ANSWER_RULES: Registry[Callable[..., AnswerRule]] = Registry("pyspec.answers")


class AnswerRule(Protocol):
    """Decides by how sure a small model was of its tokens whether its answer stands."""

    def score(self, logprobs: np.ndarray) -> float:
        """How good an answer looks, from the log probabilities [n] float64 (natural) of its tokens, n at least 1.

        They are those of the small model's own law, before temperature and warpers.
        """
        ...

    def defers(self, score: float) -> bool:
        """Whether the large model is to answer in place of an answer of this score."""
        ...


class ThresholdRule:
    """The base of rules that defer what scores below a threshold.

    Args:
        threshold: the dial: higher gives more answers to the large model. -inf gives none, inf all.

    Raises:
        ValueError, TypeError: threshold is no number.
    """

    def __init__(self, threshold: float):
        self.threshold = read_number("threshold", threshold)
        if math.isnan(self.threshold):
            raise ValueError("threshold must be a number, got nan")

    def score(self, logprobs: np.ndarray) -> float:
        raise NotImplementedError  # abstract: each rule has its own

    def defers(self, score: float) -> bool:
        return score < self.threshold
