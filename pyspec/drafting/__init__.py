"""Drafters: cheap guesses at the next tokens, as trees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import torch

from pyspec.trees import DraftTree

__all__ = ["Drafter"]


class Drafter(Protocol):
    """Guesses what the target will say next.

    `start` gives a drafter for one sequence; tables that are learned across sequences stay shared with
    it. A prompt reaches `observe` as a chain, because a chain is a tree.
    """

    proposal: Literal["deterministic", "sampled"]

    def start(self, prompt: Sequence[int]) -> Drafter:
        """A drafter for one new sequence."""
        ...

    def propose(self, context: Sequence[int], budget: int) -> DraftTree:
        """A tree of at most budget nodes, root included, below context[-1]; context only ever grows."""
        ...

    def observe(self, tree: DraftTree, logits: torch.Tensor, path: Sequence[int]) -> None:
        """What the target said: [T, V] fp32 logits of every node, and the accepted path (root included)."""
        ...
