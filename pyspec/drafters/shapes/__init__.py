"""Growth policies: which nodes a drafter with a law of its own spends its budget on.

A policy knows no model. It asks a Sapling for the laws after some nodes, chooses or draws children, and asks on.
It says beforehand which nodes it is about to ask for, so that the trees of a batch can grow in step. What makes a drawn
tree exact is one rule that all of these policies keep: whether to draw another child, and where, may depend on
everything drawn before, but not on that draw itself; and what was drawn stays.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np

from pyspec.ops.row_statistics import TOP
from pyspec.sampling.noise import Noise
from pyspec.sampling.sampler import largest
from pyspec.tree import DraftTree, Siblings

__all__ = [
    "Children",
    "Growing",
    "GrowthPolicy",
    "LawSource",
    "Level",
    "StopRule",
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


class Level(NamedTuple):
    """What is known of some nodes of a growing tree before children of them are drafted.

    Attributes:
        depths: [n] int, 0 for the root.
        chances: [n] float64 of each node, by the law after its parent; 1 for the root.
        paths: [n] float64, the product of the chances from the root on.
        top: [n, 8] float64, the best chances of the law after each node, best first.
        entropy: [n] float64 of that law, in nats.
    """

    depths: np.ndarray
    chances: np.ndarray
    paths: np.ndarray
    top: np.ndarray
    entropy: np.ndarray


#: Says of each node of a level whether children of it are drafted. It may not depend on what they will be.
StopRule = Callable[[Level], Sequence[bool]]


class LawSource(Protocol):
    """The laws of a drafter below the text so far.

    It may also have `likeliest(tokens, parents, nodes, count)`: the tokens and chances [len(nodes), count] that are the
    best of these laws, likeliest first, where it finds them without; else None. Then it also has
    `statistics(tokens, parents, nodes)`: the 8 best chances [len(nodes), 8] of the same laws and their entropies.

    A source with an end may have `goes_on(tokens, parents, nodes)`, as a StopRule of its own: whether children of each
    node are drafted.
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

    def grow(
        self, source: LawSource, token: int, budget: int, noise: Noise, goes_on: StopRule | None = None
    ) -> DraftTree:
        """A tree of at most budget nodes, root included, below token."""
        return grow_together(self, {0: Sapling(source, token, budget, goes_on=goes_on)}, {0: noise})[0]


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
        goes_on: says where children are drafted; None everywhere.
    """

    def __init__(self, source: LawSource, token: int, budget: int, least: float = 0.0, goes_on: StopRule | None = None):
        if isinstance(budget, bool) or not isinstance(budget, int):
            raise TypeError(f"budget must be an int, got {budget!r}")
        if not 1 <= budget <= LARGEST_BUDGET:
            raise ValueError(f"budget must be in [1, {LARGEST_BUDGET}], got {budget}")
        self._source, self._goes_on = source, goes_on
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
        """The likeliest tokens after some nodes and their chances, likeliest first: none where drafting stops, fewer
        than count without mass."""
        find = getattr(self._source, "likeliest", None)
        found = find and find(self.tokens, self.parents, nodes, count)
        if found is not None:
            children = [
                [(token, chance) for token, chance in zip(*rows, strict=True) if chance > 0]
                for rows in zip(found[0].tolist(), found[1].tolist(), strict=True)
            ]
        else:
            laws = self.laws(nodes)
            children = [[(token, float(law[token])) for token in top_tokens(law, count)] for law in laws]
        return [of_node if goes_on else [] for of_node, goes_on in zip(children, self.goes_on(nodes), strict=True)]

    def goes_on(self, nodes: Sequence[int]) -> Sequence[bool]:
        """Whether children of some nodes are drafted, whose laws were asked for."""
        find = getattr(self._source, "goes_on", None)
        found = [True] * len(nodes) if find is None else find(self.tokens, self.parents, nodes)
        if self._goes_on is None or not nodes:
            return found
        return [own and other for own, other in zip(found, self._goes_on(self._level(list(nodes))), strict=True)]

    def _level(self, nodes: list[int]) -> Level:
        find = getattr(self._source, "statistics", None)
        found = find and find(self.tokens, self.parents, nodes)
        if found is None:
            laws = np.stack([self._laws[node] for node in nodes])
            count = min(TOP, laws.shape[1])
            best = -np.sort(-np.partition(laws, -count, axis=1)[:, -count:], axis=1)
            logs = np.log(laws, out=np.zeros_like(laws), where=laws > 0)
            found = np.pad(best, ((0, 0), (0, TOP - count))), -(laws * logs).sum(axis=1)
        paths = np.array([self.chances[node] for node in nodes])
        parents = np.array([self.chances[self.parents[node]] if node else 1.0 for node in nodes])
        depths = np.array([len(path_to(node, self.parents)) - 1 for node in nodes])
        return Level(depths, np.divide(paths, parents, out=np.zeros_like(paths), where=parents > 0), paths, *found)

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
