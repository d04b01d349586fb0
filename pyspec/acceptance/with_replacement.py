"""Rule B: siblings that were drawn independently of each other, from one q."""

from __future__ import annotations

from pyspec.acceptance import RULES
from pyspec.acceptance.laws import LawRule, children_of, residual
from pyspec.sampling.noise import Noise
from pyspec.tree import Accepted, DraftTree


def with_replacement(tree: DraftTree, p, q, noise: Noise) -> Accepted:
    """Judges the children of a node with law p, in the order of the draws::

        accept child x with probability min(1, p(x) / q(x)); else p <- [p - q]+, normalised

    and when no child is left, emit a token of p. SpecInfer, arXiv 2305.09781; on a chain it is the rule of Leviathan
    et al., arXiv 2211.17192, and of Chen et al., arXiv 2302.01318.

    Args:
        tree: siblings drawn with replacement, in index order.
        p, q: by node, [V] float64 laws of target and drafter.
    """
    children, tokens = children_of(tree), tree.tokens.tolist()
    path = [0]
    while True:
        node = path[-1]
        target = p[node]
        draft = q[node] if children[node] else None
        for child in children[node]:
            if noise.coin(target[tokens[child]] / draft[tokens[child]]):
                path.append(child)
                break
            target = residual(target, draft)
        else:
            return Accepted(path, noise.draw(target))


class WithReplacement(LawRule):
    """The acceptance rule of with_replacement."""

    siblings = frozenset({"none", "with replacement"})

    def judge(self, tree: DraftTree, p, q, noise: Noise) -> Accepted:
        return with_replacement(tree, p, q, noise)


RULES.register("with_replacement", WithReplacement, "B: independent draws; exact law (SpecInfer, arXiv 2305.09781)")
