"""What the tree drafters share: growth from sources, and learning from what the target said."""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence

import numpy as np
import torch

from pyspec.drafting.engine import engine
from pyspec.readback import read_top_tokens
from pyspec.trees import DraftTree

__all__ = ["GrowingDrafter"]

LARGEST_BUDGET = 4096
LONGEST_MATCH = 6  # tokens that a source looks back on: NgramIndex's longest n-gram
SMOOTHING = 16.0  # trials that a prior is worth


class GrowingDrafter:
    """Base of the drafters whose trees grow best-first from sources.

    A source says what may follow a path; the chance that the target agrees is learned from every verified edge, for
    each kind of offer, and shared by all sequences. The tree takes the node most likely to be accepted next, until the
    budget is used, so a sure guess makes it deep and an open question makes it wide.

    Args:
        vocab_size: tokens of the target.
        lookup: take what followed earlier occurrences of the newest tokens as a source.
        recycling: take what the target last thought could follow a token, and two tokens, as two sources.
    """

    proposal = "deterministic"

    def __init__(self, vocab_size: int, *, lookup: bool, recycling: bool):
        self.vocab_size = vocab_size
        self._index = engine().NgramIndex() if lookup else None
        self._adjacencies = [engine().Adjacency(vocab_size, context) for context in (1, 2)] if recycling else []
        self._estimates = engine().Estimates([source.priors() for source in self._sources()], SMOOTHING)
        self._read = 0  # tokens of the context seen so far
        # the last tree, the cell of each of its edges, and the token before its root or -1
        self._proposed: tuple[DraftTree | None, np.ndarray | None, int] = (None, None, -1)

    def start(self, prompt: Sequence[int]) -> GrowingDrafter:
        """A drafter for one new sequence; what was learned from others is shared with it.

        Raises:
            ValueError: if a token is outside the vocabulary.
        """
        drafter = copy.copy(self)
        drafter._index = None if self._index is None else engine().NgramIndex()
        drafter._read, drafter._proposed = 0, (None, None, -1)
        drafter._read_context(prompt)
        return drafter

    def propose(self, context: Sequence[int], budget: int) -> DraftTree:
        """A tree of at most budget nodes below context[-1]; fewer where nothing more is known.

        Args:
            context: all tokens so far; it only ever grows.
            budget: nodes, root included, in [1, 4096].

        Raises:
            ValueError: if the context is empty, shrank or has a token outside the vocabulary, or for a bad budget.
            TypeError: if budget is not an integer.
        """
        if isinstance(budget, bool) or not isinstance(budget, int):
            raise TypeError(f"budget must be an int, got {budget!r}")
        if not 1 <= budget <= LARGEST_BUDGET:
            raise ValueError(f"budget must be in [1, {LARGEST_BUDGET}], got {budget}")
        if not len(context):
            raise ValueError("context must have at least one token, got none")
        self._read_context(context)
        recent = list(context[-LONGEST_MATCH:])
        tokens, parents, cells, chances = engine().grow(self._sources(), self._estimates, recent, budget)
        tree = DraftTree(torch.from_numpy(tokens), torch.from_numpy(parents), chances=torch.from_numpy(chances))
        self._proposed = (tree, cells, recent[-2] if len(recent) > 1 else -1)
        return tree

    def observe(self, tree: DraftTree, logits: torch.Tensor, path: Sequence[int]) -> None:
        """Learns from what the target said after every node of a tree, accepted or not.

        Args:
            tree: the last proposed tree, its first nodes, or a chain of prompt tokens.
            logits: [T, vocab_size] floating point.
            path: not needed: a rejected node teaches as much as an accepted one.

        Raises:
            ValueError: if the shape of logits or a token does not fit; nothing is learned then.
        """
        if logits.shape != (len(tree), self.vocab_size):
            raise ValueError(f"logits must be [{len(tree)}, {self.vocab_size}], got {list(logits.shape)}")
        proposed, cells, previous = self._proposed
        is_proposed = proposed is not None and _begins_with(proposed, tree)
        if not is_proposed and not self._adjacencies:
            return
        top_tokens, top_logits = _top_tokens(logits)
        tokens, parents = tree.tokens.numpy(), tree.parents.numpy()
        for adjacency in self._adjacencies:
            adjacency.update(tokens, parents, previous if is_proposed else -1, top_tokens, top_logits)
        if is_proposed:
            # all of the tree: a node that was left out is still right or wrong where its parent was verified
            self._estimates.learn(proposed.tokens.numpy(), proposed.parents.numpy(), cells, top_tokens)

    def _sources(self) -> list:
        return ([] if self._index is None else [self._index]) + self._adjacencies

    def _read_context(self, context: Sequence[int]) -> None:
        if len(context) < self._read:
            raise ValueError(f"context only grows, but it has {len(context)} tokens after {self._read}")
        new = [operator.index(token) for token in context[self._read :]]
        if new and not (min(new) >= 0 and max(new) < self.vocab_size):
            raise ValueError(f"context tokens must be in [0, {self.vocab_size}), got {min(new)} to {max(new)}")
        if self._index is not None:
            self._index.extend(new)
        self._read = len(context)


def _begins_with(tree: DraftTree, other: DraftTree) -> bool:
    nodes = len(other)
    return torch.equal(tree.tokens[:nodes], other.tokens) and torch.equal(tree.parents[:nodes], other.parents)


def _top_tokens(logits: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The 8 best tokens of each row and their logits; a GPU sends only these to the host."""
    logits = logits.float() if logits.dtype == torch.float64 else logits
    return read_top_tokens(logits if logits.stride(1) == 1 else logits.contiguous())
