"""Rule C: recursive rejection, which takes what was tried out of q."""

from __future__ import annotations

from pyspec.acceptance import RULES
from pyspec.acceptance.laws import LawRule, children_of, residual
from pyspec.sampling.noise import Noise
from pyspec.tree import Accepted, DraftTree


def recursive_rejection(tree: DraftTree, p, q, noise: Noise, lenience: float = 1.0) -> Accepted:
    """Judges the children of a node with law p, in the order of the draws::

        accept child x with probability min(1, p(x) / q(x)); else p <- [p - q]+ and q(x) <- 0, both normalised

    and when no child is left, emit a token of p. A token that was tried before is passed over, which makes independent
    draws ones without replacement. Jeon et al., "Recursive Speculative Decoding", arXiv 2402.14160.

    Args:
        tree: drawn siblings, in index order.
        p, q: by node, [V] float64 laws of target and drafter.
        lenience: in (0, 1]; q is taken this many times, so that less is rejected. 1 is exact.
    """
    children, tokens = children_of(tree), tree.tokens.tolist()
    path = [0]
    while True:
        node = path[-1]
        target = p[node]
        draft = q[node].copy() if children[node] else None
        for child in children[node]:
            token = tokens[child]
            if draft[token] == 0:
                continue
            if noise.coin(target[token] / (lenience * draft[token])):
                path.append(child)
                break
            target = residual(target, lenience * draft)
            draft[token] = 0
            if (left := draft.sum()) > 0:
                draft /= left
        else:
            return Accepted(path, noise.draw(target))


class RecursiveRejection(LawRule):
    """The acceptance rule of recursive_rejection."""

    siblings = frozenset({"none", "with replacement", "without replacement"})

    def judge(self, tree: DraftTree, p, q, noise: Noise) -> Accepted:
        return recursive_rejection(tree, p, q, noise)


RULES.register("recursive", RecursiveRejection, "C: every drawn tree; exact law (RSD, arXiv 2402.14160)")
