"""DraftTree: several guesses at the next tokens, arranged as a tree."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch

__all__ = ["DraftTree"]


class DraftTree:
    """A tree of draft tokens below the last committed token.

    Node 0 is the root: the last committed token, whose key is not cached yet. Parents come before their
    children, so ancestors in index order are ancestors in depth order. A chain is a tree.

    Args:
        tokens: [T] int64, the token of each node.
        parents: [T] int32, the index of each node's parent; -1 for the root, and only there.
        q: [T, V] float32, the distribution each node was sampled from, or None for deterministic drafts.

    Raises:
        ValueError: if the tree is empty, sizes differ, or a parent does not come before its child.
    """

    __slots__ = ("tokens", "parents", "q", "__dict__")

    def __init__(self, tokens, parents, q: torch.Tensor | None = None):
        self.tokens = torch.as_tensor(tokens, dtype=torch.int64)
        self.parents = torch.as_tensor(parents, dtype=torch.int32)
        self.q = q
        if self.tokens.dim() != 1 or self.tokens.shape != self.parents.shape or not len(self.tokens):
            raise ValueError(
                f"tokens and parents must be 1-D, of one length and not empty, got shapes "
                f"{tuple(self.tokens.shape)} and {tuple(self.parents.shape)}"
            )
        self._check_topological()

    @classmethod
    def chain(cls, tokens: Sequence[int]) -> DraftTree:
        """A tree without branches: each token is the child of the one before it."""
        return cls(tokens, torch.arange(-1, len(tokens) - 1, dtype=torch.int32))

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        return f"DraftTree(tokens={self.tokens.tolist()}, parents={self.parents.tolist()})"

    def _check_topological(self) -> None:
        parents = self.parents.tolist()
        if parents[0] != -1:
            raise ValueError(f"parents[0] must be -1 (the root), got {parents[0]}")
        for node, parent in enumerate(parents[1:], start=1):
            if not 0 <= parent < node:
                raise ValueError(f"parents[{node}] must be in [0, {node}), parents before children, got {parent}")

    @cached_property
    def depths(self) -> torch.Tensor:
        """[T] int32: 0 for the root, one more than the parent's elsewhere."""
        depths = [0]
        for parent in self.parents.tolist()[1:]:
            depths.append(depths[parent] + 1)
        return torch.tensor(depths, dtype=torch.int32)

    @cached_property
    def ancestor_bits(self) -> torch.Tensor:
        """[T, ceil(T / 32)] int32: bit j of row i is set iff j is i or an ancestor of i."""
        rows: list[int] = []
        for node, parent in enumerate(self.parents.tolist()):
            rows.append((rows[parent] if parent >= 0 else 0) | 1 << node)
        words = (len(rows) + 31) // 32
        packed = b"".join(row.to_bytes(4 * words, "little") for row in rows)
        return torch.frombuffer(bytearray(packed), dtype=torch.int32).view(len(rows), words)

    def children(self, node: int) -> list[int]:
        """The children of a node, in index order."""
        return [child for child, parent in enumerate(self.parents.tolist()) if parent == node]
