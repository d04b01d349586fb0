"""Rule D: K-SEQ, which knows how many siblings were drawn independently of each other."""

from __future__ import annotations

import numpy as np

from pyspec.acceptance import RULES
from pyspec.acceptance.laws import LawRule, children_of
from pyspec.sampling.noise import Noise
from pyspec.tree import Accepted, DraftTree

BISECTIONS = 20


def k_seq(tree: DraftTree, p, q, noise: Noise) -> Accepted:
    """Judges the k children of a node with law p, in the order of the draws::

        accept child x with probability min(1, p(x) / (rho q(x)))

    and when no child is left, emit a token of p - min(q, p / rho) (1 - (1 - beta)^k) / beta, normalised, where
    beta = sum of min(q, p / rho) is the chance that one child is accepted. rho >= 1 makes the last term fit under p:
    (1 - (1 - beta)^k) / beta <= rho. The smallest such rho accepts most. Sun et al., "SpecTr", arXiv 2310.15141.

    Args:
        tree: siblings drawn with replacement, in index order, how many being decided before any was drawn.
        p, q: by node, [V] float64 laws of target and drafter.
    """
    children, tokens = children_of(tree), tree.tokens.tolist()
    path = [0]
    while True:
        node = path[-1]
        target, count = p[node], len(children[node])
        if not count:
            return Accepted(path, noise.draw(target))
        draft = q[node]
        rho = _rho(target, draft, count)
        for child in children[node]:
            if noise.coin(target[tokens[child]] / (rho * draft[tokens[child]])):
                path.append(child)
                break
        else:
            common = np.minimum(draft, target / rho)
            left = np.maximum(target - common * _tries(common.sum(), count), 0)
            return Accepted(path, noise.draw(left if left.any() else target))


def _rho(target: np.ndarray, draft: np.ndarray, count: int) -> float:
    """The smallest rho in [1, count] with _tries <= rho, from above: every rho from there on is exact."""
    low, high = 1.0, float(count)
    for _ in range(BISECTIONS if count > 1 else 0):
        middle = (low + high) / 2
        if _tries(np.minimum(draft, target / middle).sum(), count) <= middle:
            high = middle
        else:
            low = middle
    return high


def _tries(beta: float, count: int) -> float:
    """(1 - (1 - beta)^count) / beta: how many of count children are tried, on average."""
    return sum((1 - beta) ** tried for tried in range(count))


class KSeq(LawRule):
    """The acceptance rule of k_seq."""

    siblings = frozenset({"none", "with replacement"})

    def judge(self, tree: DraftTree, p, q, noise: Noise) -> Accepted:
        return k_seq(tree, p, q, noise)


RULES.register("k_seq", KSeq, "D: independent draws; exact law (SpecTr, arXiv 2310.15141)")
