"""Drafts taken as they are: fast, and by no law of the model's."""

from __future__ import annotations

from pyspec.acceptance import RULES
from pyspec.runners.verified import Verified
from pyspec.sampling.sampler import InvalidLogits, Sampler
from pyspec.tree import Accepted, DraftTree


class UnverifiedAcceptance:
    """Takes the first child of every node, whatever the target says of it; behind the last one the target's own token.

    Chunk-distilled decoding as its paper has it (arXiv 2501.00343). The first child is what a drafter finds best. Only
    what a drafter is sure of should be drafted, such as ChunkDrafter's chunks: of other drafters the text is rubbish.
    """

    law = "heuristic"
    siblings = None

    def accept(self, tree: DraftTree, verified: Verified, sampler: Sampler, position: int) -> Accepted:
        first: dict[int, int] = {}
        for node, parent in enumerate(tree.parents.tolist()):
            first.setdefault(parent, node)
        path = [0]
        while path[-1] in first:
            path.append(first[path[-1]])
        try:
            return Accepted(path, sampler.draws(tree, verified)(path[-1], position + len(path) - 1))
        except InvalidLogits as error:
            raise InvalidLogits(str(error), path) from error


RULES.register("unverified", UnverifiedAcceptance, "every tree; its first path as it is, not the target's text")
