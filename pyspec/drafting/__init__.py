"""Drafters: cheap guesses at the next tokens, as trees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Protocol
from weakref import WeakKeyDictionary

import torch

from pyspec.trees import DraftTree

if TYPE_CHECKING:
    from pyspec.models import Runner

__all__ = ["Drafter", "drafter_from_name"]


class Drafter(Protocol):
    """Guesses what the target will say next.

    `start` gives a drafter for one sequence; tables that are learned across sequences stay shared with
    it. A prompt reaches `observe` as a chain, because a chain is a tree.

    A "deterministic" drafter chooses its drafts, in whatever way. A "sampled" one draws each of them from the law that
    tree.q holds, and decides to draw it, and to keep it, before it knows the draw; it also has `siblings`, a
    pyspec.trees.Siblings. Calling chosen drafts sampled biases the text: rules that trust q are told so by this.
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


_kept: WeakKeyDictionary[Runner, dict[str, Drafter]] = WeakKeyDictionary()


def drafter_from_name(drafter: str | Drafter | None, runner: Runner) -> Drafter | None:
    """The drafter that a name stands for: "lookup", "recycling" or "merged". A drafter or None is returned as it is.

    A runner's drafter of a name is made once and lives as long as the runner, so that each request starts from what
    the earlier ones taught. Make one yourself (say, MergedDrafter) to start from nothing.

    Raises:
        ValueError: for an unknown name.
    """
    if not isinstance(drafter, str):
        return drafter
    from pyspec.drafting.lookup import LookupDrafter
    from pyspec.drafting.merged import MergedDrafter
    from pyspec.drafting.recycling import RecyclingDrafter

    makers = {
        "lookup": lambda: LookupDrafter(runner.vocab_size),
        "recycling": lambda: RecyclingDrafter(runner.vocab_size, runner.fingerprint),
        "merged": lambda: MergedDrafter(runner.vocab_size, runner.fingerprint),
    }
    if drafter not in makers:
        raise ValueError(f'drafter must be "lookup", "recycling", "merged", a Drafter or None, got {drafter!r}')
    kept = _kept.setdefault(runner, {})
    if drafter not in kept:
        kept[drafter] = makers[drafter]()
    return kept[drafter]
