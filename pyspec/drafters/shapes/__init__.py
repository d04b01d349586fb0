"""Growth policies: which nodes a drafter with a law of its own spends its budget on.

A policy knows no model. It asks a Sapling for the laws after some nodes, chooses or draws children, and asks on.
It says beforehand which nodes it is about to ask for, so that the trees of a batch can grow in step. What makes a drawn
tree exact is one rule that all of these policies keep: whether to draw another child, and where, may depend on
everything drawn before, but not on that draw itself; and what was drawn stays.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Literal, Protocol

import numpy as np

from pyspec.sampling.noise import Noise
from pyspec.sampling.sampler import largest
from pyspec.tree import DraftTree, Siblings

__all__ = [
    "Children",
    "Growing",
    "GrowthPolicy",
    "LawSource",
    "Sapling",
    "check_temperature",
    "grow_together",
    "path_to",
    "top_tokens",
]

#: How a node's children come from its law. The likeliest tokens; independent draws; draws of tokens not drawn before.
Children = Literal["top", "with replacement", "without replacement"]

LARGEST_BUDGET = 4096

#: Yields nodes, see GrowthPolicy.growing, and returns a tree.
Growing = Generator[Sequence[int], None, DraftTree]


class LawSource(Protocol):
    """The laws of a drafter below the text so far.

    It may also have `likeliest(tokens, parents, nodes, count)`: the tokens and chances [len(nodes), count] that are the
    best of these laws, likeliest first, where it finds them without; else None.
    """

    vocab_size: int

    def laws(self, tokens: Sequence[int], parents: Sequence[int], nodes: Sequence[int]) -> np.ndarray:
        """The laws after these nodes of a tree, [len(nodes), V] floating point, in their order.

        The tree is the one that grows: from call to call it only gets more nodes, at the end.
        """
        ...


class GrowthPolicy:
    """The base of policies; `proposal` and `siblings` as in a Drafter, and "deterministic" has siblings "none"."""

    proposal: Literal["deterministic", "sampled"]
    siblings: Siblings

    def growing(self, sapling: Sapling, noise: Noise) -> Growing:
        """Grows a sapling to at most its budget: yields the nodes whose laws it asks for next, returns the tree."""
        raise NotImplementedError  # abstract: each policy has its own

    def grow(self, source: LawSource, token: int, budget: int, noise: Noise) -> DraftTree:
        """A tree of at most budget nodes, root included, below token."""
        return grow_together(self, {0: Sapling(source, token, budget)}, {0: noise})[0]


def grow_together(
    policy: GrowthPolicy,
    saplings: Mapping[int, Sapling],
    noises: Mapping[int, Noise],
    prepare: Callable[[Mapping[int, Sequence[int]]], None] = lambda asked: None,
) -> dict[int, DraftTree]:
    """The trees that a policy makes of some saplings, which grow in step.

    Args:
        saplings, noises: of each tree, by the caller's numbers.
        prepare: called with the nodes, by number, whose laws their saplings are asked for next, before they are.
    """
    growing = {number: policy.growing(sapling, noises[number]) for number, sapling in saplings.items()}
    trees, asked = {}, {}
    while growing:
        for number, steps in list(growing.items()):
            try:
                asked[number] = next(steps)
            except StopIteration as end:
                trees[number] = end.value
                del growing[number]
        if asked:
            prepare(asked)
            asked = {}
    return trees


class Sapling:
    """A tree while it grows.

    Args:
        source: gives the laws.
        token: the root's.
        budget: most nodes, in [1, 4096].
        least: sum of the chances of chosen nodes below which asking for their laws does not pay.
    """

    def __init__(self, source: LawSource, token: int, budget: int, least: float = 0.0):
        if isinstance(budget, bool) or not isinstance(budget, int):
            raise TypeError(f"budget must be an int, got {budget!r}")
        if not 1 <= budget <= LARGEST_BUDGET:
            raise ValueError(f"budget must be in [1, {LARGEST_BUDGET}], got {budget}")
        self._source = source
        self.budget, self.least = budget, least
        self.tokens, self.parents = [token], [-1]
        self.chances = [1.0]  # of the path, by the laws
        self._laws: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def room(self) -> int:
        """Nodes that may still be added."""
        return self.budget - len(self)

    def laws(self, nodes: Sequence[int]) -> list[np.ndarray]:
        """The laws [V] float64 after some nodes, asked for at once; not to be written to.

        Raises:
            ValueError: if one is no law.
        """
        nodes = list(nodes)
        if not nodes:
            return []
        rows = np.asarray(self._source.laws(self.tokens, self.parents, nodes), dtype=np.float64)
        if rows.shape != (len(nodes), self._source.vocab_size):
            raise ValueError(f"laws must be [{len(nodes)}, {self._source.vocab_size}], got {list(rows.shape)}")
        for node, row in zip(nodes, rows, strict=True):
            total = row.sum()
            if not (np.isfinite(total) and total > 0 and row.min() >= 0):
                raise ValueError(
                    f"the draft's law after node {node} must have no negative and some positive values, all finite, "
                    f"got {row.min()} to {row.max()}, sum {total}"
                )
            self._laws[node] = row / total
        return [self._laws[node] for node in nodes]

    def likeliest(self, nodes: Sequence[int], count: int) -> list[list[tuple[int, float]]]:
        """The likeliest tokens after some nodes and their chances, likeliest first; fewer than count without mass."""
        find = getattr(self._source, "likeliest", None)
        found = find and find(self.tokens, self.parents, nodes, count)
        if found is not None:
            return [
                [(token, chance) for token, chance in zip(*rows, strict=True) if chance > 0]
                for rows in zip(found[0].tolist(), found[1].tolist(), strict=True)
            ]
        return [[(token, float(law[token])) for token in top_tokens(law, count)] for law in self.laws(nodes)]

    def add(self, parent: int, token: int, chance: float | None = None) -> int:
        """The new node: a child of parent, with this chance or that of parent's law, which is known then."""
        self.tokens.append(token)
        self.parents.append(parent)
        chance = float(self._laws[parent][token]) if chance is None else chance
        self.chances.append(self.chances[parent] * chance)
        return len(self) - 1

    def best(self, budget: int) -> list[int]:
        """The budget nodes with the likeliest paths, likeliest first; of equals the earlier, so parents are before."""
        return np.argsort(-np.array(self.chances), kind="stable")[:budget].tolist()

    def chosen(self, kept: Sequence[int] | None = None) -> DraftTree:
        """The tree of some nodes, or all, as a deterministic proposal; parents come before children in kept."""
        tokens, parents, kept = self._kept(kept)
        chances = np.array([self.chances[node] for node in kept], np.float32)
        return DraftTree(tokens, parents, chances=chances)

    def drawn(self, kept: Sequence[int] | None = None) -> DraftTree:
        """The tree of some nodes, or all, as a sampled proposal.

        It has no chances: by them, nodes would be left out after they were drawn.
        """
        tokens, parents, kept = self._kept(kept)
        q = np.zeros((len(tokens), self._source.vocab_size))
        for node in set(parents[1:]):
            q[node] = self._laws[kept[node]]
        return DraftTree(tokens, parents, q=q)

    def _kept(self, kept: Sequence[int] | None) -> tuple[list[int], list[int], Sequence[int]]:
        kept = range(len(self)) if kept is None else kept
        places = {node: place for place, node in enumerate(kept)}
        return [self.tokens[node] for node in kept], [places.get(self.parents[node], -1) for node in kept], kept


def top_tokens(law: np.ndarray, count: int) -> list[int]:
    """The count likeliest tokens, likeliest first and of equal ones the lower first; none without mass."""
    count = min(count, np.count_nonzero(law))
    kept = largest(law, count, np.partition(law, -count)[-count])
    return kept[np.argsort(-law[kept], kind="stable")].tolist()


def path_to(node: int, parents: Sequence[int]) -> list[int]:
    """The nodes from one up to the root, both included."""
    path = [node]
    while path[-1]:
        path.append(parents[path[-1]])
    return path


def check_temperature(growth: GrowthPolicy, temperature: float) -> None:
    """Raises ValueError where a policy would draw at temperature 0."""
    if temperature == 0 and growth.proposal == "sampled":
        raise ValueError(
            f"temperature must be above 0 for {type(growth).__name__}, which draws: at 0 tokens are chosen. "
            'Use a deterministic policy (TopPaths, or children="top") and acceptance="exact"'
        )
