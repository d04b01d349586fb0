"""Guesses that were made elsewhere: the tree of a trained head, to be grown in one with what tables know."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pyspec.drafters.table_drafter import LONGEST_MATCH, Table
from pyspec.host import host
from pyspec.tree import DraftTree


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

    def hold(self, tree: DraftTree, context: Sequence[int]) -> None:
        """Offers the nodes of a tree below the context's last token, from now on: one with chances, or a root."""
        chances = np.ones(1, np.float32) if tree.chances is None else tree.chances  # of a root alone
        self.sources[0].hold(tree.tokens, tree.parents, chances, min(len(context), LONGEST_MATCH))
