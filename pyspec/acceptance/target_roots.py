"""Several draws of the target at the root, lossy: the one that leads furthest is kept."""

from __future__ import annotations

from pyspec.acceptance.laws import LawRule
from pyspec.sampling.noise import Noise
from pyspec.tree import Accepted, DraftTree


def target_roots(tree: DraftTree, p, noise: Noise, width: int) -> Accepted:
    """Draws `width` tokens of p at the root; from each the target's draws are followed while the tree holds them.

    The longest path is kept, of equally long ones the first: a token whose continuation is easy to guess is emitted too
    often. The multi-candidate speculation of Lu et al., arXiv 2409.10644, in a loop that drafts before it draws.
    """
    edges = zip(tree.parents.tolist(), tree.tokens.tolist(), strict=True)
    child_of = {edge: node for node, edge in reversed(list(enumerate(edges)))}
    best = None
    for _ in range(width):
        path = [0]
        token = noise.draw(p[0])
        while (path[-1], token) in child_of:
            path.append(child_of[path[-1], token])
            token = noise.draw(p[path[-1]])
        if best is None or len(path) > len(best.path):
            best = Accepted(path, token)
    return best


class TargetRoots(LawRule):
    """The acceptance rule of target_roots. The text is NOT the target's, except greedily.

    Args:
        width: draws at the root, at least 1; 1 is exact.
    """

    law = "heuristic"
    siblings = None

    def __init__(self, width: int):
        if width < 1:
            raise ValueError(f"width must be at least 1, got {width}")
        self.width = width

    def judge(self, tree: DraftTree, p, q, noise: Noise) -> Accepted:
        return target_roots(tree, p, noise, self.width)
