"""Guesses that were made elsewhere: the tree of a trained head, to be grown in one with what tables know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pyspec.drafters.table_drafter import LONGEST_MATCH, Table
from pyspec.host import host


class GuessedNodes(NamedTuple):
    """The nodes of a tree, see DraftTree, that has yet to become one; chances or, of a drawn one, q."""

    tokens: np.ndarray
    parents: np.ndarray
    chances: np.ndarray | None
    q: np.ndarray | None = None

    @classmethod
    def root(cls, token: int) -> GuessedNodes:
        """A root alone."""
        return cls(np.array([token]), np.array([-1], np.int32), np.ones(1, np.float32))


class Guesses(Table):
    """A tree that was guessed below a sequence's text. How often such guesses are right is learned, as for all tables.

    Args:
        vocab_size: tokens of the target.
    """

    name = "guesses_"

    def __init__(self, vocab_size: int):
        super().__init__(vocab_size)
        self.sources = [host().GuessedTree()]

    def start(self) -> Guesses:
        return Guesses(self.vocab_size)

    def hold(self, nodes: GuessedNodes, context: Sequence[int]) -> None:
        """Offers the nodes of a tree below the context's last token, from now on."""
        self.sources[0].hold(nodes.tokens, nodes.parents, nodes.chances, min(len(context), LONGEST_MATCH))
