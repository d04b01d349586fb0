"""Penalties on tokens that the text has already: repetition_penalty, frequency_penalty and presence_penalty."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pyspec.arguments import read_number
from pyspec.sampling.warpers import WARPERS, Warped


class Seen(NamedTuple):
    """The tokens of a text.

    Attributes:
        tokens: [n] int64, ascending, each once.
        counts: [n] int64, how often it came.
    """

    tokens: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, text: Sequence[int]) -> Seen:
        return cls(*np.unique(np.asarray(text, dtype=np.int64), return_counts=True))

    def after(self, token: int) -> Seen:
        """The tokens of the text that one more token makes."""
        place = int(np.searchsorted(self.tokens, token))
        if place < len(self.tokens) and self.tokens[place] == token:
            counts = self.counts.copy()
            counts[place] += 1
            return Seen(self.tokens, counts)
        return Seen(np.insert(self.tokens, place, token), np.insert(self.counts, place, 1))


class RepetitionPenalty:
    """Divides the logits above 0 of tokens in prompt and text by the penalty, and multiplies those below 0 with it.

    Keskar et al., "CTRL", arXiv 1909.05858, in the form that transformers gave it.

    Args:
        repetition_penalty: finite and above 0; 1 changes nothing, more makes repetition rarer.
    """

    place = -60

    def __init__(self, repetition_penalty: float):
        self.penalty = read_number("repetition_penalty", repetition_penalty)
        if not 0 < self.penalty < np.inf:
            raise ValueError(f"repetition_penalty must be finite and above 0, got {repetition_penalty}")

    def start(self, prompt: Sequence[int], model) -> Seen:
        return Seen.of(prompt)

    def warp(self, state: Seen, tokens: np.ndarray, scores: np.ndarray) -> Warped:
        scores, at = scores.copy(), state.tokens
        scores[at] = np.where(scores[at] > 0, scores[at] / self.penalty, scores[at] * self.penalty)
        return Warped(tokens, scores, state.after)


class FrequencyPenalty:
    """Takes the penalty off a token's logit as many times as the text has it; the prompt does not count (OpenAI's).

    Args:
        frequency_penalty: in [-2, 2]; 0 changes nothing.
    """

    place = -50
    name = "frequency_penalty"

    def __init__(self, penalty: float):
        self.penalty = read_number(self.name, penalty)
        if not -2 <= self.penalty <= 2:
            raise ValueError(f"{self.name} must be in [-2, 2], got {penalty}")

    def start(self, prompt: Sequence[int], model) -> Seen:
        return Seen.of(())

    def warp(self, state: Seen, tokens: np.ndarray, scores: np.ndarray) -> Warped:
        scores = scores.copy()
        scores[state.tokens] -= self._times(state.counts) * self.penalty
        return Warped(tokens, scores, state.after)

    def _times(self, counts: np.ndarray) -> np.ndarray | int:
        return counts


class PresencePenalty(FrequencyPenalty):
    """Takes the penalty off the logit of a token that the text has, however often; the prompt does not count.

    Args:
        presence_penalty: in [-2, 2]; 0 changes nothing.
    """

    place = -40
    name = "presence_penalty"

    def _times(self, counts: np.ndarray) -> np.ndarray | int:
        return 1


WARPERS.register("repetition_penalty", RepetitionPenalty, "above 1: make tokens of prompt and text less likely")
WARPERS.register("frequency_penalty", FrequencyPenalty, "taken off a logit each time the text has the token")
WARPERS.register("presence_penalty", PresencePenalty, "taken off a logit once if the text has the token")
