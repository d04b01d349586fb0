"""A few numbers of a prompt that say which drafter suits it, from the target's own pass over it.

Means over the prompt's rows of logits, which a drafter is shown anyway, and of how often its tokens repeat. They know
neither the model's size nor its vocabulary. Nothing is computed of the text a second time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pyspec.runners.verified import Verified
from pyspec.tree import DraftTree

NAMES = (
    "length",
    "entropy",
    "entropy_deviation",
    "top_chance",
    "right",
    "repeated_1",
    "repeated_2",
    "repeated_3",
    "last_entropy",
    "last_chance",
)
LONGEST = 10.0  # log2 of a prompt's tokens, about


class PromptFeatures:
    """Gathers the features of one prompt while it is read.

    Args:
        prompt: its tokens.
    """

    def __init__(self, prompt: Sequence[int]):
        self._tokens = list(map(int, prompt))
        self._entropies: list[np.ndarray] = []
        self._chances: list[np.ndarray] = []
        self._right: list[np.ndarray] = []
        self._is_complete = False

    def observe(self, tree: DraftTree, verified: Verified) -> None:
        """Takes in the rows of a part of the prompt; what comes after the prompt is left alone."""
        if self._is_complete:
            return
        statistics = verified.statistics
        self._entropies.append(statistics.entropy)
        self._chances.append(np.exp(statistics.top_logits[:, 0] - statistics.log_sum_exp))
        self._right.append(statistics.top_tokens[:-1, 0] == tree.tokens[1:])
        # a prefix that was cached is not shown, so rows cannot be counted
        self._is_complete = tree.tokens.tolist() == self._tokens[-len(tree) :]

    def values(self) -> np.ndarray:
        """The features [10] float32, each of about -1 to 1, in the order of NAMES; 0 for what was not seen."""
        found = np.zeros(len(NAMES), np.float32)
        found[0] = np.log2(len(self._tokens)) / LONGEST
        if self._entropies:
            entropies, chances = np.concatenate(self._entropies), np.concatenate(self._chances)
            right = np.concatenate(self._right)
            found[1:4] = entropies.mean() / 4, entropies.std() / 4, chances.mean()
            found[4] = right.mean() if len(right) else 0.0
            found[8:10] = entropies[-1] / 4, chances[-1]
        for order in (1, 2, 3):
            found[4 + order] = _repeated(self._tokens, order)
        return found


def _repeated(tokens: Sequence[int], order: int) -> float:
    """The share of tokens that have followed the `order` tokens before them already."""
    seen, repeated = set(), 0
    for end in range(order, len(tokens)):
        found = tuple(tokens[end - order : end + 1])
        repeated += found in seen
        seen.add(found)
    return repeated / max(len(tokens) - order, 1)
