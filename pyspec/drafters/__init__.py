"""Drafters: cheap guesses at the next tokens, as trees."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Literal, Protocol

from pyspec.arguments import described
from pyspec.tree import DraftTree

if TYPE_CHECKING:
    from pyspec.runners import Runner
    from pyspec.runners.verified import Verified

__all__ = ["NAMES", "Drafter", "drafter_from_name", "new_drafter"]

#: Module and class, by name, of the drafters that a runner alone is enough for.
NAMES = {
    "merged": ("merged", "MergedDrafter"),
    "lookup": ("lookup", "LookupDrafter"),
    "recycling": ("recycling", "RecyclingDrafter"),
    "suffix": ("suffix", "SuffixDrafter"),
    "stand": ("stand", "StandDrafter"),
    "aded": ("aded", "AdedDrafter"),
    "ngrammys": ("ngrammys", "NgrammysDrafter"),
    "layer_skip": ("layer_skip", "LayerSkipDrafter"),
}


class Drafter(Protocol):
    """Guesses what the target will say next.

    `start` gives a drafter for one sequence; tables that are learned across sequences stay shared with
    it, also by sequences of several threads. A prompt reaches `observe` as a chain, because a chain is a tree.

    A "deterministic" drafter chooses its drafts, in whatever way. A "sampled" one draws each of them from the law that
    tree.q holds, and decides to draw it, and to keep it, before it knows the draw; it also has `siblings`, a
    pyspec.tree.Siblings. Calling chosen drafts sampled biases the text: rules that trust q are told so by this.

    A drafter may also have `coupled_to(sampler)`, the drafter for texts that this sampler draws with the rule "exact":
    the noise of a draw is known before the draw, and a guess may look at it.
    """

    proposal: Literal["deterministic", "sampled"]

    def start(self, prompt: Sequence[int]) -> Drafter:
        """A drafter for one new sequence."""
        ...

    def propose(self, context: Sequence[int], budget: int) -> DraftTree:
        """A tree of at most budget nodes, root included, below context[-1]; context only ever grows."""
        ...

    def observe(self, tree: DraftTree, verified: Verified, path: Sequence[int]) -> None:
        """What the target said after every node of a tree, and the accepted path (root included)."""
        ...


def drafter_from_name(drafter: str | Drafter | None, runner: Runner) -> Drafter | None:
    """The drafter that a name of NAMES stands for. A drafter or None is returned as it is.

    A runner's drafter of a name is made once and lives as long as the runner, so that each request starts from what
    the earlier ones taught. Make one yourself (say, MergedDrafter) to start from nothing.

    Raises:
        ValueError: for an unknown name.
        TypeError: it is neither name nor drafter.
    """
    is_drafter = hasattr(drafter, "propose") and not isinstance(drafter, type)
    if drafter is None or is_drafter:
        return drafter
    if not isinstance(drafter, str) or drafter not in NAMES:
        error = ValueError if isinstance(drafter, str) else TypeError
        raise error(f"drafter must be one of {', '.join(NAMES)}, a Drafter or None, got {described(drafter)}")
    kept = vars(runner).setdefault("_drafters", {})  # kept by the runner itself, which some of them hold
    if drafter not in kept:
        # two threads may make one each; both go on with the first
        kept.setdefault(drafter, new_drafter(drafter, runner))
    return kept[drafter]


def new_drafter(name: str, runner: Runner) -> Drafter:
    """A drafter of a name that knows nothing yet, but what is computed from the model itself."""
    module, kind = NAMES[name]
    made = getattr(import_module(f"pyspec.drafters.{module}"), kind)
    if name == "lookup":
        return made(runner.vocab_size)
    if name == "layer_skip":
        return made(runner)
    if name == "ngrammys":
        from pyspec.drafters.ngrammys import model_bigrams

        return made(runner.vocab_size, runner.fingerprint, model_bigrams(runner))
    return made(runner.vocab_size, runner.fingerprint)
