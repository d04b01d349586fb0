"""The learned rule: whether the large model would do better, from quantiles of the small one's log probabilities."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pyspec.answers import ANSWER_RULES, ThresholdRule

QUANTILES = np.linspace(0, 1, 11)
WEIGHTS = ("mean", "scale", "hidden", "hidden_bias", "out", "out_bias")  # of the file


def features_of(logprobs: np.ndarray) -> np.ndarray:
    """What the rule sees of an answer [13] float64: quantiles, sum and mean of log probabilities [n]."""
    return np.concatenate([np.quantile(logprobs, QUANTILES), [logprobs.sum(), logprobs.mean()]])


class LearnedRule(ThresholdRule):
    """Defers where a small network expects the large model to be right and the small one not.

    The post-hoc rule of Gupta et al., arXiv 2404.10136: a perceptron with one layer of hidden units over quantiles, sum
    and mean of the tokens' log probabilities. `python -m training.answers` trains one. The score is minus the logit of
    the chance that deferring pays.

    Args:
        file: what the training wrote, or its arrays by name.
        threshold: of the score; 0 defers where deferring pays more often than not.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it holds another thing.
    """

    def __init__(self, file: str | os.PathLike | Mapping[str, np.ndarray] | None = None, threshold: float = 0.0):
        super().__init__(threshold)
        if file is None:
            raise ValueError("file must name what python -m training.answers wrote, got None")
        self._weights = _read(Path(file)) if isinstance(file, (str, os.PathLike)) else dict(file)
        shapes = {name: getattr(self._weights.get(name), "shape", None) for name in WEIGHTS}
        count, units = len(QUANTILES) + 2, (shapes["out"] or (0,))[0]
        expected = dict(zip(WEIGHTS, ((count,), (count,), (units, count), (units,), (units,), ()), strict=True))
        if shapes != expected:
            raise ValueError(f"file must hold arrays of shapes {expected}, got {shapes}")

    def score(self, logprobs: np.ndarray) -> float:
        seen = (features_of(logprobs) - self._weights["mean"]) / self._weights["scale"]
        hidden = np.tanh(self._weights["hidden"] @ seen + self._weights["hidden_bias"])
        return -float(self._weights["out"] @ hidden + self._weights["out_bias"])


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path) as found:
            return {name: found[name] for name in WEIGHTS if name in found}
    except (ValueError, EOFError, TypeError, AttributeError):
        raise ValueError(f"{path} is no file of python -m training.answers") from None


ANSWER_RULES.register(
    "learned", LearnedRule, "a small network over quantiles of log probabilities, from python -m training.answers"
)
