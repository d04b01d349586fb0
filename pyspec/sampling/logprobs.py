"""Log probabilities of the tokens of a text, for whoever asks."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

MOST_LOGPROBS = 100


class TokenLogprobs(NamedTuple):
    """How likely the model found a token, by its own law: before temperature and all warpers.

    Attributes:
        logprob: natural logarithm of the token's probability.
        top: those of the likeliest tokens by token id, the likeliest first, of equal ones the lower token.
    """

    logprob: float
    top: dict[int, float]


def token_logprobs(logits: torch.Tensor, token: int, most: int) -> TokenLogprobs:
    """The log probability of a token and those of the likeliest tokens.

    Args:
        logits: [V] float32, a law, on any device.
        token: in [0, V).
        most: how many of the likeliest; at most V are given.
    """
    scores = logits.detach().cpu().numpy().astype(np.float64)
    scores -= scores.max()
    scores -= np.log(np.exp(scores).sum())
    most = min(most, len(scores))
    least = np.partition(scores, -most)[-most] if most else np.inf
    candidates = np.flatnonzero(scores >= least)
    best = candidates[np.argsort(-scores[candidates], kind="stable")][:most]
    return TokenLogprobs(float(scores[token]), {int(each): float(scores[each]) for each in best})
