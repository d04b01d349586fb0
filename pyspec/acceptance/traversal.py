"""Rule F: traversal verification, which judges a tree from its leaves."""

from __future__ import annotations

import numpy as np

from pyspec.acceptance import RULES
from pyspec.acceptance.laws import LawRule, children_of
from pyspec.sampling.noise import Noise
from pyspec.sampling.sampler import InvalidLogits
from pyspec.tree import Accepted, DraftTree


def traversal_verification(tree: DraftTree, p, q, noise: Noise) -> Accepted:
    """Each node u has a rate r(u): r(root) = 1, and for its child x, r = min(1, r(u) p_u(x) / q_u(x)).

    The first leaf depth first is accepted with all nodes above it with probability r, and a token of its p is emitted.
    Otherwise the leaf x is deleted, and at its parent u, with s = sum of [r p - q]+::

        p <- [r p - q]+ / s,  r <- s / (s + 1 - r) (at the root it stays 1),  q(x) <- 0, normalised

    so that a parent whose last child is deleted is a leaf itself, and the root is accepted at last. A token that was
    tried before is deleted as it is. Weng et al., "Traversal Verification", arXiv 2505.12398; on chains, rule E.

    Args:
        tree: drawn siblings, in index order; a node whose p is no law counts as a leaf.
        p, q: by node, [V] float64 laws of target and drafter.
    """
    children, tokens = children_of(tree), tree.tokens.tolist()
    rates: dict[int, float] = {0: 1.0}
    laws: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # what p and q have become at the nodes above the leaf
    path = [0]
    while True:
        node = path[-1]
        if children[node] and node not in laws:
            try:
                laws[node] = p[node], q[node].copy()
            except InvalidLogits:
                children[node] = []
        if children[node]:
            target, draft = laws[node]
            child = children[node][0]
            token = tokens[child]
            if draft[token] == 0:
                children[node].pop(0)
                continue
            rates[child] = min(1.0, rates[node] * target[token] / draft[token])
            path.append(child)
        elif node == 0 or noise.coin(rates[node]):
            return Accepted(path, noise.draw(laws[node][0] if node in laws else p[node]))
        else:
            path.pop()
            _delete_first_child(path[-1], tokens[node], children, rates, laws)


def _delete_first_child(node: int, token: int, children, rates, laws) -> None:
    children[node].pop(0)
    target, draft = laws[node]
    excess = np.maximum(rates[node] * target - draft, 0)
    total = float(excess.sum())
    if node:
        rates[node] = total / (total + 1 - rates[node]) if total > 0 else 0.0
    draft[token] = 0
    left = draft.sum()
    laws[node] = excess / total if total > 0 else target, draft / left if left > 0 else draft


class TraversalVerification(LawRule):
    """The acceptance rule of traversal_verification."""

    siblings = frozenset({"none", "with replacement", "without replacement"})

    def judge(self, tree: DraftTree, p, q, noise: Noise) -> Accepted:
        return traversal_verification(tree, p, q, noise)


RULES.register("traversal", TraversalVerification, "F: every drawn tree; exact law (arXiv 2505.12398)")
