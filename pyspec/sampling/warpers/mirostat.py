"""mirostat: how many tokens stay is steered so that the text's surprise is what was asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from pyspec.arguments import described, read_integer, read_number
from pyspec.sampling.warpers import WARPERS, Warped, kept

#: Likeliest tokens that the exponent of version 1 is estimated from: those of the authors' code.
MOST_ESTIMATED = 100


class Mirostat:
    """Keeps the likeliest tokens, as many as hold the text's mean surprise at tau (Basu et al., arXiv 2007.14966).

    With mu = 2 tau before the first token, and after a token x of law p (before this cut, so the surprise is that of
    the model's own law)::

        mu <- mu - eta (-log2 p(x) - tau)

    Version 1 estimates a Zipf exponent s from the likeliest tokens and keeps k of n; version 2 keeps each token whose
    surprise is at most mu. At least one is kept. The state is a function of the text, so a rejected draft leaves none.

    Args:
        mirostat: 1 or 2, or a mapping with the version and perhaps tau (3 bits, above 0) and eta (1, above 0), the
            constants of the authors' code.
    """

    place = 3

    def __init__(self, mirostat: int | Mapping):
        settings = mirostat if isinstance(mirostat, Mapping) else {"version": mirostat}
        unknown = set(settings) - {"version", "tau", "eta"}
        if unknown or "version" not in settings:
            raise ValueError(f"mirostat must have a version, and perhaps tau and eta, got {described(mirostat)}")
        self.version = read_integer("mirostat", settings["version"], "1 or 2")
        self.tau = read_number("mirostat's tau", settings.get("tau", 3.0))
        self.eta = read_number("mirostat's eta", settings.get("eta", 1.0))
        if self.version not in (1, 2):
            raise ValueError(f"mirostat must be version 1 or 2, got {self.version}")
        for name, value in (("tau", self.tau), ("eta", self.eta)):
            if not 0 < value < math.inf:
                raise ValueError(f"mirostat's {name} must be finite and above 0, got {value}")

    def start(self, prompt, model) -> float:
        return 2 * self.tau

    def warp(self, state: float, tokens: np.ndarray, scores: np.ndarray) -> Warped:
        weights = np.exp(scores - scores.max())
        with np.errstate(divide="ignore"):
            surprise = -np.log2(weights / weights.sum())
        if self.version == 2:
            places = np.flatnonzero(surprise <= max(state, surprise.min()))
        else:
            order = np.argsort(surprise, kind="stable")
            places = np.sort(order[: zipf_cut(surprise[order[: MOST_ESTIMATED + 1]], state, len(surprise))])

        def after(token: int) -> float:
            place = int(np.searchsorted(tokens, token))
            is_there = place < len(tokens) and tokens[place] == token  # a draft may be impossible; then all below it is
            return state - self.eta * ((surprise[place] if is_there else math.inf) - self.tau)

        return kept(tokens, scores, places)._replace(after=after)


def zipf_cut(surprise: np.ndarray, mu: float, count: int) -> int:
    """How many of `count` tokens version 1 keeps: round((eps 2^mu / (1 - count^-eps))^(1/s)) + 1 with eps = s - 1.

    Args:
        surprise: [n] float64, of the likeliest tokens, ascending, in bits.
        mu: the largest surprise that is wanted, in bits.
    """
    surprise = surprise[np.isfinite(surprise)]
    if len(surprise) < 2:
        return 1
    # s = sum of t b / sum of t^2 with b = ln(p_i / p_(i+1)), t = ln((i + 1) / i)
    t = np.diff(np.log(np.arange(1, len(surprise) + 1)))
    s = float((t * np.diff(surprise) * math.log(2)).sum() / (t * t).sum())
    if s <= 0:
        return count  # equally likely, as far as was looked: no cut would tell them apart
    eps = s - 1
    factor = 1 / math.log(count) if abs(eps) < 1e-9 else eps / -math.expm1(-eps * math.log(count))
    exponent = (math.log(factor) + mu * math.log(2)) / s
    return count if exponent > math.log(count) else min(count, max(1, round(math.exp(exponent)) + 1))


WARPERS.register("mirostat", Mirostat, "1 or 2, or with tau and eta: keep the text's mean surprise at tau bits")
