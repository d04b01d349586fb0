"""The controller of a fixed number of nodes."""

from __future__ import annotations

from collections.abc import Sequence

from pyspec.tree import DraftTree


class FixedController:
    """Asks for the same number of nodes in every round, and verifies whatever was proposed."""

    def __init__(self, nodes: int):
        self.nodes = self.largest = nodes

    def cut(self, trees: Sequence[DraftTree]) -> list[DraftTree]:
        """Keeps the trees whole."""
        return list(trees)

    def learn(
        self,
        trees: Sequence[DraftTree],
        paths: Sequence[Sequence[int]],
        draft_seconds: float,
        verify_seconds: float,
    ) -> None:
        """Learns nothing."""
