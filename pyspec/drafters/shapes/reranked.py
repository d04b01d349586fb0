"""Cumulative top-k re-ranking: grow more than needed, and keep the likeliest."""

from __future__ import annotations

import numpy as np

from pyspec.drafters.shapes import LARGEST_BUDGET, Growing, GrowthPolicy, Sapling
from pyspec.sampling.noise import Noise
from pyspec.tree import DraftTree


class TopPaths(GrowthPolicy):
    """The likeliest paths through the `width` likeliest tokens below the `width` likeliest nodes of each level.

    The tree of EAGLE-2, arXiv 2406.16858. A level is asked for only below nodes that are of the tree so far: no other
    can have a descendant in it, and only where it pays, see Sapling. Deterministic.

    Args:
        width: at least 1.
        depth: levels below the root, at least 1.
    """

    proposal = "deterministic"
    siblings = "none"

    def __init__(self, width: int, depth: int):
        for name, value in (("width", width), ("depth", depth)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.width = width
        self.depth = depth

    def growing(self, sapling: Sapling, noise: Noise) -> Growing:
        """The budget likeliest nodes, likeliest first."""
        level = kept = [0]
        for _ in range(self.depth if sapling.room else 0):
            yield level
            grown = []
            for node, found in zip(level, sapling.likeliest(level, self.width), strict=True):
                grown += [sapling.add(node, child, chance) for child, chance in found]
            kept = sapling.best(sapling.budget)
            level = sorted(sorted(set(grown) & set(kept), key=lambda node: -sapling.chances[node])[: self.width])
            if not level or sum(sapling.chances[node] for node in level) < sapling.least:
                break
        return sapling.chosen(kept)


class Reranked(GrowthPolicy):
    """Keeps the nodes with the likeliest paths of what another policy grows. Re-ranking of EAGLE-2, arXiv 2406.16858.

    Only for deterministic policies: a draft that was drawn and then left out for its value makes the others' law
    another one than q.

    Args:
        policy: grows the candidates.
    """

    proposal = "deterministic"
    siblings = "none"

    def __init__(self, policy: GrowthPolicy):
        if policy.proposal != "deterministic":
            raise ValueError(
                f"policy must be deterministic: re-ranking what {type(policy).__name__} drew would bias the text. Use "
                "StochasticBeam or DySpecGreedy, which decide before they draw, or a policy that takes the top tokens"
            )
        self.policy = policy

    def growing(self, sapling: Sapling, noise: Noise) -> Growing:
        """The budget likeliest nodes, likeliest first."""
        budget, sapling.budget = sapling.budget, LARGEST_BUDGET if sapling.room else 1
        candidates = yield from self.policy.growing(sapling, noise)
        # stable: of a parent and a child that is sure, the parent stays before
        kept = np.argsort(-candidates.chances, kind="stable")[:budget].tolist()
        places = {node: place for place, node in enumerate(kept)}
        parents = candidates.parents.tolist()
        return DraftTree(
            candidates.tokens[kept],
            [places.get(parents[node], -1) for node in kept],
            chances=candidates.chances[kept],
        )
