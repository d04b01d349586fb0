"""Random rounds for the recurrent ops, and paths through their trees."""

import random

from pyspec import DraftTree
from pyspec.ops import Round


def random_tree(size: int, seed: int) -> DraftTree:
    generator = random.Random(seed)
    parents = [-1] + [generator.randrange(max(0, node - 4), node) for node in range(1, size)]
    return DraftTree([0] * size, parents)


def root_path(tree: DraftTree, node: int) -> list[int]:
    """Nodes from the root to a node, both included."""
    path, parents = [], tree.parents.tolist()
    while node >= 0:
        path.append(node)
        node = parents[node]
    return path[::-1]


def chain_round(nodes: int, sequence: int = 0, path=(), half: int = 0, advance: bool = False) -> Round:
    return Round.of([DraftTree.chain([0] * nodes)], [sequence], [path], [half], advances=advance)
