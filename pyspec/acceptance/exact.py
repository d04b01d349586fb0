"""Exact acceptance: draw the target's own token at a node, and follow it while the tree holds it."""

from __future__ import annotations

from typing import Literal

from pyspec.acceptance import RULES
from pyspec.runners.verified import Verified
from pyspec.sampling.sampler import InvalidLogits, Sampler
from pyspec.tree import Accepted, DraftTree


class ExactAcceptance:
    """Keeps what plain decoding would have drawn, whatever the drafts are.

    Exact for every tree, chosen or drawn, for the token at a position is a function of its logits and of the seed
    alone; a tree drawn with the same noise is merely accepted more often. With drawn drafts the rules that use their
    law q keep more of them.
    """

    law: Literal["exact"] = "exact"
    siblings = None

    def accept(self, tree: DraftTree, verified: Verified, sampler: Sampler, position: int) -> Accepted:
        """The longest path that the target's own draws follow, and the draw after it.

        Args:
            tree: T nodes.
            verified: the rows of the target after each of them; logits [T, V] float32.
            sampler: gives the target's draw at a node.
            position: that of the token which the root's logits predict.

        Raises:
            InvalidLogits: with the path to the node whose logits are NaN or otherwise no law, if the walk comes to one.
        """
        child_of: dict[tuple[int, int], int] = {}
        for node, edge in enumerate(zip(tree.parents.tolist(), tree.tokens.tolist(), strict=True)):
            child_of.setdefault(edge, node)
        draw = sampler.draws(tree, verified)
        path, node = [], 0
        while True:
            path.append(node)
            try:
                token = draw(node, position + len(path) - 1)
            except InvalidLogits as error:
                raise InvalidLogits(str(error), path) from error
            child = child_of.get((node, token))
            if child is None:
                return Accepted(path, token)
            node = child


RULES.register("exact", ExactAcceptance, "A: every tree; the text of plain decoding (SpecInfer's naive sampling)")
