"""What the rules that work on laws share: p and q by node, and the residual of a rejection."""

from __future__ import annotations

from typing import Literal

import numpy as np

from pyspec.runners.verified import Verified
from pyspec.sampling.noise import Noise
from pyspec.sampling.sampler import InvalidLogits, Sampler
from pyspec.tree import Accepted, DraftTree, Siblings


class LawRule:
    """The base of the rules that are a function of (tree, p, q, noise).

    `judge` reads p[u] and q[u], the laws [V] float64 after node u of target and drafter, only at nodes it comes to.
    Arrays [T, V] do, and so do the laws here, which make a row when it is read: of a vocabulary of V tokens and a tree
    of T nodes, most of the T x V numbers are never needed.
    """

    law: Literal["exact", "mixture", "heuristic"] = "exact"
    siblings: frozenset[Siblings] | None

    def judge(self, tree: DraftTree, p, q, noise: Noise) -> Accepted:
        """The accepted path and the token after it."""
        raise NotImplementedError  # abstract: each rule has its own

    def accept(self, tree: DraftTree, verified: Verified, sampler: Sampler, position: int) -> Accepted:
        """Applies judge to the laws of the logits.

        Raises:
            InvalidLogits: with the path to the node whose logits are no law, if it is the last that was accepted.
            ValueError: if the tree has no q or one that is no law.
        """
        noise = Noise(sampler.seed, position, Noise.ACCEPTANCE)
        return self.judge(tree, TargetLaws(tree, verified, sampler), DraftLaws(tree), noise)


class TargetLaws:
    """The target's laws: p[u], which the sampler draws from after node u, is computed when asked for.

    greedy_at: the temperature of the laws of a greedy sampler; 0 puts all on the likeliest token.
    """

    def __init__(self, tree: DraftTree, verified: Verified, sampler: Sampler, greedy_at: float = 0.0):
        self._tree, self._laws = tree, sampler.laws(tree, verified, greedy_at)

    def __getitem__(self, node: int) -> np.ndarray:
        try:
            return self._laws(node)
        except InvalidLogits as error:
            path = [node]
            while path[0]:
                path.insert(0, int(self._tree.parents[path[0]]))
            raise InvalidLogits(str(error), path) from error


class DraftLaws:
    """The drafter's laws: q[u], which the children of node u were drawn from, is checked when asked for."""

    def __init__(self, tree: DraftTree):
        self._tree = tree

    def __getitem__(self, node: int) -> np.ndarray:
        if self._tree.q is None:
            raise ValueError("tree.q must hold the laws that the drafts were drawn from, got None")
        row = self._tree.q[node].astype(np.float64)
        total = row.sum()
        if not (np.isfinite(total) and total > 0 and row.min() >= 0):
            raise ValueError(f"tree.q[{node}] must be a law, got values from {row.min()} to {row.max()}, sum {total}")
        for child in self._tree.children(node):
            token = int(self._tree.tokens[child])
            if row[token] == 0:
                raise ValueError(f"tree.q[{node}] must be above 0 at the tokens drawn from it, got 0 at token {token}")
        return row / total


def children_of(tree: DraftTree) -> list[list[int]]:
    """The children of every node, in the order in which they were drawn."""
    children: list[list[int]] = [[] for _ in range(len(tree))]
    for node, parent in enumerate(tree.parents.tolist()[1:], start=1):
        children[parent].append(node)
    return children


def residual(law: np.ndarray, draft: np.ndarray) -> np.ndarray:
    """The law [law - draft]+, scaled to sum to 1, that is left once a draw from `draft` was rejected."""
    excess = np.maximum(law - draft, 0)
    total = excess.sum()
    return excess / total if total > 0 else law  # without excess nothing is rejected, but for rounding
