"""Trees whose shape is known before the first token of them is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np

from pyspec.drafters.shapes import Children, Growing, GrowthPolicy, Sapling, top_tokens
from pyspec.sampling.noise import Noise
from pyspec.tree import DraftTree

LARGEST_PLAN = 256  # nodes that Sequoia plans for: the tables are quadratic in them


class StaticTree(GrowthPolicy):
    """Base of the policies with a fixed shape: `shape(budget)` gives parents, level by level.

    Args:
        children: "top" makes the proposal deterministic; "with replacement" is for acceptance "with_replacement" and
            "k_seq", "without replacement" for "recursive" and "traversal".
    """

    def __init__(self, children: Children):
        if children not in ("top", "with replacement", "without replacement"):
            raise ValueError(f'children must be "top", "with replacement" or "without replacement", got {children!r}')
        self.children = children
        self.proposal = "deterministic" if children == "top" else "sampled"
        self.siblings = "none" if children == "top" else children

    def shape(self, budget: int) -> list[int]:
        """Parents [T] with T <= budget, those of a level ascending; -1 for the root."""
        raise NotImplementedError  # abstract: each shape has its own

    def growing(self, sapling: Sapling, noise: Noise) -> Growing:
        """Where a law has fewer tokens than the shape has children, less than the shape."""
        budget = sapling.budget
        children: list[list[int]] = [[] for _ in range(budget)]
        for place, parent in enumerate(self.shape(budget)[1:], start=1):
            children[parent].append(place)
        level = [(0, 0)] if children[0] else []  # (place in the shape, node)
        while level:
            grown, asked = [], [node for _, node in level]
            yield asked
            laws = sapling.laws(asked)
            for (place, node), law, goes_on in zip(level, laws, sapling.goes_on(asked), strict=True):
                tokens = self._children(law, len(children[place]), noise) if goes_on else []
                places = children[place][: len(tokens)]
                grown += [(child, sapling.add(node, token)) for child, token in zip(places, tokens, strict=True)]
            level = [(place, node) for place, node in grown if children[place]]
        return sapling.chosen() if self.children == "top" else sapling.drawn()

    def _children(self, law: np.ndarray, count: int, noise: Noise) -> list[int]:
        """Chooses at most count tokens; fewer where the law has fewer."""
        if self.children == "top":
            return top_tokens(law, count)
        if self.children == "with replacement":
            return [noise.draw(law) for _ in range(count)]
        left, tokens = law.copy(), []
        for _ in range(min(count, np.count_nonzero(law))):
            tokens.append(noise.draw(left))
            left[tokens[-1]] = 0
        return tokens


class FixedBranching(StaticTree):
    """Every node of depth d has branching[d] children. Drawn without replacement, it is RSD-C, arXiv 2402.14160.

    A smaller budget takes the first nodes, level by level.
    """

    def __init__(self, branching: Sequence[int], children: Children = "without replacement"):
        super().__init__(children)
        self.branching = tuple(branching)
        if not self.branching or min(self.branching) < 1:
            raise ValueError(f"branching must be numbers of children, at least 1 each, got {branching}")
        if children != "top" and max(self.branching) == 1:
            self.siblings = "none"

    def shape(self, budget: int) -> list[int]:
        parents, level = [-1], [0]
        for count in self.branching:
            grown = [node for node in level for _ in range(count)][: budget - len(parents)]
            level = list(range(len(parents), len(parents) + len(grown)))
            parents += grown
        return parents


class Sequoia(StaticTree):
    """The shape with the largest expected number of accepted drafts, from how often the b-th sibling is the one.

    Chen et al., "Sequoia", arXiv 2402.12374: with a_b = acceptance[b - 1], a tree's expected tokens are 1 + the sum
    over its root's children of a_b times theirs, so the best tree of m nodes is found from smaller ones.

    Args:
        acceptance: for each rank among siblings, the chance that this one is accepted; see sibling_acceptance.
        depth: most levels below the root.
    """

    def __init__(self, acceptance: Sequence[float], depth: int, children: Children = "without replacement"):
        super().__init__(children)
        self.acceptance = tuple(float(chance) for chance in acceptance)
        if not self.acceptance or not all(0 <= chance <= 1 for chance in self.acceptance) or sum(self.acceptance) > 1:
            raise ValueError(f"acceptance must be chances in [0, 1] with a sum of at most 1, got {acceptance}")
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        self.depth = depth
        if children != "top" and len(self.acceptance) == 1:
            self.siblings = "none"
        self.shape = cache(self._best_shape)

    def _best_shape(self, budget: int) -> list[int]:
        budget = min(budget, LARGEST_PLAN)
        sizes = self._sizes(budget)
        parents, level = [-1], [(0, self.depth, budget)]  # (node, levels below it, nodes it may have with them)
        while level:
            grown = []
            for node, depth, most in level:
                for size in self._split(sizes[depth], most):
                    grown.append((len(parents), depth - 1, size))
                    parents.append(node)
            level = grown
        return parents

    def _sizes(self, budget: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each depth, the best number of children of a root that has m nodes, [budget + 1], and the nodes that the
        last of b children then gets, [ranks + 1, budget + 1]."""
        best = np.ones(budget + 1)  # expected tokens of the best tree of at most m nodes
        plans = [(np.zeros(budget + 1, int), np.zeros((1, budget + 1), int))]
        for _ in range(self.depth):
            values, taken = [np.ones(budget + 1)], [np.zeros(budget + 1, int)]
            for chance in self.acceptance:
                options = np.full((budget + 1, budget + 1), -np.inf)  # [nodes, those of the last child]
                for size in range(1, budget):
                    options[size + 1 :, size] = values[-1][1:-size] + chance * best[size]
                values.append(options.max(1))
                taken.append(options.argmax(1))
            best = np.max(values, axis=0)
            plans.append((np.argmax(values, axis=0), np.array(taken)))
        return plans

    @staticmethod
    def _split(plan: tuple[np.ndarray, np.ndarray], nodes: int) -> list[int]:
        """Nodes for each child of a root with `nodes` of them."""
        counts, taken = plan
        sizes = []
        for child in range(counts[nodes], 0, -1):
            sizes.insert(0, int(taken[child, nodes]))
            nodes -= sizes[0]
        return sizes


def sibling_acceptance(rounds: Iterable[tuple[DraftTree, Sequence[int]]], ranks: int) -> list[float]:
    """How often the b-th sibling was the one accepted, b = 1 .. ranks, where there was one: what Sequoia plans with.

    Args:
        rounds: verified trees and their accepted paths, root included.
    """
    hits, trials = np.zeros(ranks), np.zeros(ranks)
    for tree, path in rounds:
        for node, accepted in zip(path, [*path[1:], None], strict=True):
            children = tree.children(node)[:ranks]
            trials[: len(children)] += 1
            if accepted in children:
                hits[children.index(accepted)] += 1
    return (hits / np.maximum(trials, 1)).tolist()
