"""Sampler: one token from logits, with noise that depends on the seed and the position alone.

A draw is a Gumbel-max: argmax over tokens of logit / temperature + gumbel(seed, position, token). The noise
comes from a counter (Philox), not from a stream that earlier draws advance, so the token at a position is the
same however many drafts were tried before it. Temperature 0 is plain argmax.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from pyspec.arguments import read_integer, read_number

if TYPE_CHECKING:
    from pyspec.runners.verified import HostStatistics, Verified


_NO_LAW = {"nan": "NaN", "inf": "+inf", "-inf": "all -inf"}  # by the largest logit, or the sum


class InvalidLogits(ValueError):
    """Logits that are no law: NaN, +inf, or nothing but -inf.

    From an acceptance rule, `path` leads from the root to the node that they belong to.
    """

    def __init__(self, reason: str, path: Sequence[int] = (0,)):
        super().__init__(reason)
        self.path = list(path)


class Sampler:
    """Draws tokens; warps logits by temperature, then top-k, then top-p.

    Args:
        temperature: finite, >= 0; 0 is greedy (the lowest token on ties), whatever top_k and top_p are.
        top_k: keep the k most likely tokens; 0 keeps all. Among equal logits the lower token is kept first.
        top_p: keep the fewest most likely tokens whose mass reaches top_p, in (0, 1]; 1 keeps all.
        seed: integer in [0, 2**64); None takes one from the operating system. `self.seed` holds the one in use.

    Raises:
        ValueError, TypeError: naming the argument that is out of range.
    """

    def __init__(self, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int | None = None):
        temperature, top_p = read_number("temperature", temperature), read_number("top_p", top_p)
        top_k = read_integer("top_k", top_k)
        seed = None if seed is None else read_integer("seed", seed)
        if not (math.isfinite(temperature) and temperature >= 0):
            raise ValueError(f"temperature must be finite and >= 0, got {temperature}")
        if top_k < 0:
            raise ValueError(f"top_k must be >= 0 (0 keeps all tokens), got {top_k}")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {top_p}")
        if seed is not None and not 0 <= seed < 2**64:
            raise ValueError(f"seed must be in [0, 2**64), got {seed}")
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.seed = secrets.randbits(32) if seed is None else seed

    @property
    def is_plain(self) -> bool:
        """Whether laws are the softmax of logits, unwarped."""
        return (self.temperature, self.top_k, self.top_p) == (1.0, 0, 1.0)

    def draw(self, logits: torch.Tensor, position: int) -> int:
        """Draws the token at a position of the text.

        Args:
            logits: [V] float32, on any device.
            position: index of the drawn token in the text, prompt included; the key of its noise.

        Raises:
            InvalidLogits: if the logits are no law.
        """
        row = _row(logits)
        if self.temperature == 0:
            return _argmax(row)
        tokens, scores = self._warp(row)
        # argmax takes the first of equal scores, and tokens are in ascending order
        scores += self._gumbel(tokens, position)
        return int(tokens[np.argmax(scores)])

    def draws(self, verified: Verified) -> Callable[[int, int], int]:
        """`draw` for the nodes of a verified tree, as a function of (node, position).

        Greedily on a GPU, the host reads a few numbers of all rows at once; otherwise each drawn row.
        """
        logits = verified.logits
        if self.temperature == 0 and logits.is_cuda:
            return lambda node, position: _best(verified.statistics, node)
        return lambda node, position: self.draw(logits[node], position)

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """The law [V] float64 that draw follows, from logits [V] float32."""
        row = _row(logits)
        law = np.zeros(len(row))
        if self.temperature == 0:
            law[_argmax(row)] = 1.0
        else:
            tokens, scores = self._warp(row)
            weights = np.exp(scores)
            law[tokens] = weights / weights.sum()
        return torch.from_numpy(law)

    def _warp(self, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The kept tokens, ascending, and their scores: logits / temperature, shifted so that the best is 0."""
        best = row[_argmax(row)]
        # subtract before dividing: a tiny temperature must give -inf for the others, not inf - inf
        scores = row.astype(np.float64)
        scores -= best
        with np.errstate(over="ignore"):
            scores /= self.temperature
        tokens = np.arange(len(row))
        if 0 < self.top_k < len(row):
            kept = largest(scores, self.top_k, np.partition(scores, -self.top_k)[-self.top_k])
            tokens, scores = tokens[kept], scores[kept]
        if self.top_p < 1:
            weights = np.exp(scores)
            weights /= weights.sum()
            # tokens this unlikely weigh less than 1 - top_p together, so the others hold the nucleus: sort only those
            descending = -np.sort(-weights[weights >= (1 - self.top_p) / len(weights)])
            size = min(int(np.searchsorted(np.cumsum(descending), self.top_p)) + 1, len(descending))
            kept = largest(weights, size, descending[size - 1])
            tokens, scores = tokens[kept], scores[kept]
        return tokens, scores

    def _gumbel(self, tokens: np.ndarray, position: int) -> np.ndarray:
        """Gumbel noise of some tokens (ascending) at a position, float64."""
        # raw bits, because numpy keeps those stable between versions and its distributions not; token i has word i,
        # so nothing past the last kept token needs to be made
        bits = np.random.Philox(key=self.seed, counter=[0, 0, position, 0]).random_raw(int(tokens[-1]) + 1)
        if len(tokens) < len(bits):
            bits = bits[tokens]
        # 52 bits and a half are exact in float64, so the uniform is never 0 or 1 and both logarithms are finite
        bits >>= np.uint64(12)
        noise = bits.astype(np.float64)
        noise += 0.5
        noise *= 2.0**-52
        for _ in range(2):  # -log(-log(uniform)), in place: fresh memory costs as much as a logarithm here
            np.log(noise, out=noise)
            np.negative(noise, out=noise)
        return noise


def _row(logits: torch.Tensor) -> np.ndarray:
    if logits.dim() != 1 or logits.dtype != torch.float32:
        raise ValueError(f"logits must be [V] float32, got {tuple(logits.shape)} {logits.dtype}")
    return logits.detach().cpu().numpy()


def _argmax(row: np.ndarray) -> int:
    token = int(np.argmax(row))  # numpy promises the first of equal values, and the first NaN if there is one
    if math.isfinite(row[token]):
        return token
    raise InvalidLogits(_NO_LAW[str(row[token])])


def _best(statistics: HostStatistics, row: int) -> int:
    """_argmax of a row by its statistics."""
    log_sum_exp = float(statistics.log_sum_exp[row])
    if math.isfinite(log_sum_exp):
        return int(statistics.top_tokens[row, 0])
    raise InvalidLogits(_NO_LAW[str(log_sum_exp)])


def largest(values: np.ndarray, count: int, threshold: float) -> np.ndarray:
    """Finds the indices, ascending, of the `count` largest values, the least being threshold; the first of equals."""
    above, equal = np.flatnonzero(values > threshold), np.flatnonzero(values == threshold)
    return np.sort(np.concatenate((above, equal[: count - len(above)])))
