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
from pyspec.sampling.warpers import WARPERS, Warped, warpers_from

if TYPE_CHECKING:
    from pyspec.runners.verified import HostStatistics, Verified
    from pyspec.tree import Accepted, DraftTree


_NO_LAW = {"nan": "NaN", "inf": "+inf", "-inf": "all -inf"}  # by the largest logit, or the sum


class InvalidLogits(ValueError):
    """Logits that are no law: NaN, +inf, or nothing but -inf.

    From an acceptance rule, `path` leads from the root to the node that they belong to.
    """

    def __init__(self, reason: str, path: Sequence[int] = (0,)):
        super().__init__(reason)
        self.path = list(path)


class Sampler:
    """Draws tokens; warps logits by temperature, then top-k, then top-p, with other warpers before and after.

    Args:
        temperature: finite, >= 0; 0 is greedy (the lowest token on ties), whatever comes after it.
        top_k: keep the k most likely tokens; 0 keeps all. Among equal logits the lower token is kept first.
        top_p: keep the fewest most likely tokens whose mass reaches top_p, in (0, 1]; 1 keeps all.
        seed: integer in [0, 2**64); None takes one from the operating system. `self.seed` holds the one in use.
        warpers: settings by the names of pyspec.sampling.warpers.WARPERS, which says in which order they are applied.
            They read the text, so what draws with them is `start`'s result.

    Raises:
        ValueError, TypeError: naming the argument that is out of range.
    """

    def __init__(
        self, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int | None = None, **warpers
    ):
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
        self.warpers = warpers_from(warpers)

    def start(self, prompt: Sequence[int], model) -> Sampler | TextSampler:
        """The sampler of one text after its prompt; raises ValueError for warpers that do not fit the runner."""
        return TextSampler(self, prompt, model) if self.warpers else self

    @property
    def is_plain(self) -> bool:
        """Whether laws are the softmax of logits, unwarped."""
        return (self.temperature, self.top_k, self.top_p) == (1.0, 0, 1.0) and not self.warpers

    @property
    def keeps_all(self) -> bool:
        """Whether all tokens are kept, and nothing but the temperature changes their law."""
        return not self.top_k and self.top_p == 1 and not self.warpers

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
        return self.draw_from(self.temper(row, self.temperature), position)

    def draw_from(self, law: Warped, position: int) -> int:
        """Draws the token at a position, of the tokens and scores of its law."""
        if len(law.tokens) == 1:
            return int(law.tokens[0])
        # argmax takes the first of equal scores, and tokens are in ascending order
        return int(law.tokens[np.argmax(law.scores + self._gumbel(law.tokens, position))])

    def draws(self, tree: DraftTree, verified: Verified) -> Callable[[int, int], int]:
        """`draw` for the nodes of a verified tree, as a function of (node, position).

        Greedily on a GPU, the host reads a few numbers of all rows at once; otherwise each drawn row.
        """
        logits = verified.logits
        if self.temperature == 0 and logits.is_cuda:
            return lambda node, position: _best(verified.statistics, node)
        return lambda node, position: self.draw(logits[node], position)

    def laws(self, tree: DraftTree, verified: Verified, greedy_at: float = 0.0) -> Callable[[int], np.ndarray]:
        """`probabilities` for the nodes of a verified tree, as a function of the node.

        greedy_at: the temperature of the laws where that of the sampler is 0.
        """
        logits, temperature = verified.logits, self.temperature or greedy_at
        return lambda node: self.shares(self.temper(_row(logits[node]), temperature), logits.shape[1])

    def extend(self, accepted: Accepted) -> None:
        """The text goes on with what was accepted of the last tree. A sampler that reads no text has nothing to do."""

    def forced(self, most: int) -> list[int]:
        """The tokens that the text must go on with: a sampler that reads no text forces none."""
        return []

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """The law [V] float64 that draw follows, from logits [V] float32."""
        row = _row(logits)
        return torch.from_numpy(self.shares(self.temper(row, self.temperature), len(row)))

    def shares(self, law: Warped, vocab_size: int) -> np.ndarray:
        """The law [V] float64 of the tokens and scores of `temper`."""
        shares = np.zeros(vocab_size)
        weights = np.exp(law.scores)
        shares[law.tokens] = weights / weights.sum()
        return shares

    def temper(self, row: np.ndarray, temperature: float) -> Warped:
        """The kept tokens of logits [V], and their scores: logits / temperature, shifted so that the best is 0.

        Raises:
            InvalidLogits: if the logits are no law.
        """
        greedy = _argmax(row)
        if temperature == 0:
            return Warped(np.array([greedy]), np.zeros(1))
        best = row[greedy]
        # subtract before dividing: a tiny temperature must give -inf for the others, not inf - inf
        scores = row.astype(np.float64)
        scores -= best
        with np.errstate(over="ignore"):
            scores /= temperature
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
        return Warped(tokens, scores)

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


class TextSampler:
    """A sampler with warpers, for one text: the law after a node is also a function of the path that leads to it.

    What is drawn is a function of logits, text, seed and position, so speculation leaves the text as it is.
    """

    def __init__(self, sampler: Sampler, prompt: Sequence[int], model):
        self.seed, self.temperature = sampler.seed, sampler.temperature
        self._sampler = sampler
        self._before = [warper for warper in sampler.warpers if warper.place < 0]
        self._behind = [warper for warper in sampler.warpers if warper.place > 0]
        self._states = tuple(warper.start(prompt, model) for warper in sampler.warpers)

    def draws(self, tree: DraftTree, verified: Verified) -> Callable[[int, int], int]:
        """The draw after a node of a verified tree, as a function of (node, position), see Sampler.draw."""
        self._begin(tree, verified)
        return lambda node, position: self._sampler.draw_from(self._law(node), position)

    def laws(self, tree: DraftTree, verified: Verified, greedy_at: float = 0.0) -> Callable[[int], np.ndarray]:
        """The law [V] float64 after a node of a verified tree, as a function of the node; greedy_at as for Sampler."""
        self._begin(tree, verified)
        if greedy_at and not self.temperature:
            return lambda node: self._sampler.shares(
                self._tempered(self._scores(node)[0], greedy_at), verified.logits.shape[1]
            )
        return lambda node: self._sampler.shares(self._law(node), verified.logits.shape[1])

    def extend(self, accepted: Accepted) -> None:
        """The text goes on with what was accepted of the tree that draws or laws was last called with."""
        self._states = self._after(accepted.path[-1], accepted.next_token)

    def forced(self, most: int) -> list[int]:
        """The tokens that the text must go on with, at most so many; none where it has a choice."""
        for warper, state in zip(self._sampler.warpers, self._states, strict=True):
            if hasattr(warper, "forced") and (run := warper.forced(state)):
                return run[:most]
        return []

    def _begin(self, tree: DraftTree, verified: Verified) -> None:
        self._tree, self._logits = tree, verified.logits
        self._scored: dict[int, tuple[np.ndarray, list[Warped]]] = {}
        self._laws: dict[int, list[Warped]] = {}
        self._states_at = {0: self._states}

    def _scores(self, node: int) -> tuple[np.ndarray, list[Warped]]:
        """The scores [V] after a node before its temperature, and what each warper until then made of them."""
        if node not in self._scored:
            row = _row(self._logits[node])
            _argmax(row)  # before it is changed, which may hide what is wrong with it
            law, steps = Warped(np.arange(len(row)), row.astype(np.float64)), []
            for warper, state in zip(self._before, self._state(node), strict=False):
                steps.append(law := warper.warp(state, law.tokens, law.scores))
            self._scored[node] = law.scores, steps
        return self._scored[node]

    def _law(self, node: int) -> Warped:
        return self._warped(node)[-1]

    def _warped(self, node: int) -> list[Warped]:
        """What each warper made of the law after a node, and the law."""
        if node not in self._laws:
            scores, steps = self._scores(node)
            law, steps = self._tempered(scores, self.temperature), list(steps)
            for warper, state in zip(self._behind, self._state(node)[len(self._before) :], strict=True):
                if self.temperature:
                    law = warper.warp(state, law.tokens, law.scores)
                steps.append(law)
            self._laws[node] = [*steps, law]
        return self._laws[node]

    def _tempered(self, scores: np.ndarray, temperature: float) -> Warped:
        try:
            return self._sampler.temper(scores, temperature)
        except InvalidLogits as invalid:
            names = [name for name, made in WARPERS.items() if any(type(warper) is made for warper in self._before)]
            raise InvalidLogits(f"{invalid} after {', '.join(names)}") from invalid

    def _state(self, node: int) -> tuple:
        if node not in self._states_at:
            self._states_at[node] = self._after(int(self._tree.parents[node]), int(self._tree.tokens[node]))
        return self._states_at[node]

    def _after(self, node: int, token: int) -> tuple:
        """The states when a token follows a node."""
        states, (*steps, _) = self._state(node), self._warped(node)
        return tuple(
            state if step.after is None else step.after(token) for state, step in zip(states, steps, strict=True)
        )


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
