"""DraftTree: several guesses at the next tokens, arranged as a tree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch

from pyspec.arguments import described
from pyspec.host import host

#: How the children of a node of a sampled tree were drawn, in index order. Never more than one; independently of each
#: other, how many being decided before any was drawn; or each unlike those before it.
Siblings = Literal["none", "with replacement", "without replacement"]


class DraftTree:
    """A tree of draft tokens below the last committed token.

    Node 0 is the root: the last committed token, whose key is not cached yet. Parents come before their
    children, so ancestors in index order are ancestors in depth order. A chain is a tree.

    Everything in it is a NumPy array; whoever computes with it makes tensors of them. A tree is not changed once made.

    Args:
        tokens: [T] int64, the token of each node.
        parents: [T] int32, the index of each node's parent; -1 for the root, and only there.
        q: [T, V] floating point, row i the law that the children of node i were drawn from (those of leaves are not
            read), or None for deterministic drafts.
        chances: [T] floating point, how likely each node is on the accepted path as far as the drafter knows, or None.

    Raises:
        ValueError: if the tree is empty, sizes differ, or a parent does not come before its child.
        TypeError: if tokens or parents are no integers, or q or chances no floating point tensors or arrays.
    """

    __slots__ = ("tokens", "parents", "q", "chances", "depths", "ancestor_bits", "_token_range")

    earlier = 0  # nodes before these whose keys are cached: none, for a tree is whole, see `later`

    tokens: np.ndarray
    parents: np.ndarray
    q: np.ndarray | None
    chances: np.ndarray | None
    depths: np.ndarray  # [T] int32: 0 for the root, one more than the parent's elsewhere
    ancestor_bits: np.ndarray  # [T, ceil(T / 32)] int32: bit j of row i is set iff j is i or an ancestor of i

    def __init__(self, tokens, parents, q=None, chances=None):
        self.tokens = _integers("tokens", tokens, np.int64)
        self.parents = _integers("parents", parents, np.int32)
        if self.tokens.ndim != 1 or self.tokens.shape != self.parents.shape or not len(self.tokens):
            raise ValueError(
                f"tokens and parents must be 1-D, of one length and not empty, got shapes "
                f"{self.tokens.shape} and {self.parents.shape}"
            )
        self.q = _floats("q", q, 2, len(self.tokens))
        self.chances = _floats("chances", chances, 1, len(self.tokens))
        self.depths, self.ancestor_bits = host().tree_layout(self.parents)
        self._token_range = None

    @classmethod
    def chain(cls, tokens: Sequence[int]) -> DraftTree:
        """A tree without branches: each token is the child of the one before it."""
        tokens = _integers("tokens", tokens, np.int64)
        if tokens.shape != (1,):
            return cls(tokens, np.arange(-1, tokens.size - 1, dtype=np.int32))
        tree = DraftTree.__new__(DraftTree)  # plain decoding makes one in every round
        tree.tokens = tokens
        tree.q = tree.chances = tree._token_range = None
        tree.parents, tree.depths, tree.ancestor_bits = _ROOT
        return tree

    def first(self, nodes: int) -> DraftTree:
        """The tree of the first nodes alone."""
        if nodes >= len(self):
            return self
        tree = DraftTree.__new__(DraftTree)  # what was checked before need not be checked again
        tree.tokens, tree.parents, tree.depths = self.tokens[:nodes], self.parents[:nodes], self.depths[:nodes]
        tree.q, tree.chances = (None if values is None else values[:nodes] for values in (self.q, self.chances))
        tree.ancestor_bits = np.ascontiguousarray(self.ancestor_bits[:nodes, : (nodes + 31) // 32])
        tree._token_range = None
        return tree

    def later(self, first: int) -> LaterNodes:
        """The nodes from `first` on, for a runner that keeps the keys of those before it (`keeps_tree_keys`)."""
        tree = LaterNodes.__new__(LaterNodes)
        tree.tokens, tree.parents, tree.depths = self.tokens[first:], self.parents[first:], self.depths[first:]
        tree.q = tree.chances = tree._token_range = None
        tree.ancestor_bits = self.ancestor_bits[first:]
        tree.earlier, tree.whole = first, self
        return tree

    @property
    def whole(self) -> DraftTree:
        """The tree that these nodes belong to."""
        return self

    @property
    def token_range(self) -> tuple[int, int]:
        """The lowest and the highest token. They are looked for once, however many check the tree."""
        if self._token_range is None:
            tokens = self.tokens.tolist()
            self._token_range = min(tokens), max(tokens)
        return self._token_range

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        return f"DraftTree(tokens={self.tokens.tolist()}, parents={self.parents.tolist()})"

    def children(self, node: int) -> list[int]:
        """The children of a node, in index order."""
        return [child for child, parent in enumerate(self.parents.tolist()) if parent == node]

    def likeliest_path(self) -> DraftTree:
        """The chain from the root that goes to the likeliest child of every node; to the first if none is stated."""
        chances = [1.0] * len(self) if self.chances is None else self.chances.tolist()
        path = [0]
        while children := self.children(path[-1]):
            path.append(max(children, key=lambda child: chances[child]))
        parents = np.arange(-1, len(path) - 1, dtype=np.int32)
        return DraftTree(self.tokens[path], parents, chances=None if self.chances is None else self.chances[path])


class LaterNodes(DraftTree):
    """The last nodes of a tree, whose first ones were verified since the last commit; see DraftTree.later.

    parents and ancestor_bits name nodes of the whole tree.
    """

    __slots__ = ("earlier", "whole")


class Accepted(NamedTuple):
    """What an acceptance rule decided of a verified tree.

    Attributes:
        path: accepted nodes from the root on, root included.
        next_token: the target's token behind the path; None where its logits there are no law.
    """

    path: list[int]
    next_token: int | None

    def tokens(self, tree: DraftTree) -> list[int]:
        """The new tokens: the accepted drafts of the tree, then the next token where there is one."""
        tokens = tree.tokens.tolist()
        drafts = [tokens[node] for node in self.path[1:]]
        return drafts if self.next_token is None else [*drafts, self.next_token]


#: parents, depths and ancestor_bits of a root alone
_ROOT = tuple(np.array(values, np.int32) for values in ([-1], [0], [[1]]))


def _integers(name: str, values, dtype: type) -> np.ndarray:
    """Integers of any kind as an array of dtype."""
    try:
        found = values.cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    except (TypeError, ValueError, RuntimeError):  # NotImplementedError too: a tensor on "meta" has no data
        raise TypeError(f"{name} must be a list, an array or a tensor of integers, got {described(values)}") from None
    if found.dtype.kind not in "iu" and (found.size or found.dtype.kind != "f"):  # NumPy makes floats of an empty list
        raise TypeError(f"{name} must be a list, an array or a tensor of integers, got {described(values)}")
    if dtype != np.int64 and found.dtype != dtype and found.size:
        if not -1 <= int(found.min()) <= int(found.max()) < 2**31:
            raise ValueError(f"{name} must be nodes or -1, got {described(values)}")
    return found.astype(dtype, order="C", copy=False)


def _floats(name: str, values, dims: int, nodes: int) -> np.ndarray | None:
    """Floating point numbers of a row for each node; fp16 and bf16 tensors become fp32."""
    if values is None:
        return None
    if isinstance(values, torch.Tensor) and values.is_floating_point():
        values = values.detach().cpu()
        values = (values if values.dtype in (torch.float32, torch.float64) else values.float()).numpy()
    if not isinstance(values, np.ndarray) or values.dtype.kind != "f":
        raise TypeError(f"{name} must be a floating point tensor, an array or None, got {described(values)}")
    if values.ndim != dims or len(values) != nodes:
        raise ValueError(f"{name} must be of {dims} dimensions and have {nodes} rows, got {described(values)}")
    return values
