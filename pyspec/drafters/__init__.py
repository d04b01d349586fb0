"""Drafters: cheap guesses at the next tokens, as trees."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from pyspec.registry import Registry
from pyspec.tree import DraftTree

if TYPE_CHECKING:
    from pyspec.runners import Runner
    from pyspec.runners.verified import Verified

__all__ = [
    "DRAFTERS",
    "Chimera",
    "DSpark",
    "Drafter",
    "Eagle3",
    "NamedDrafter",
    "drafter_from_name",
    "drafter_of_head",
    "new_drafter",
]


class Drafter(Protocol):
    """Guesses what the target will say next.

    `start` gives a drafter for one sequence; tables that are learned across sequences stay shared with
    it, also by sequences of several threads. A prompt reaches `observe` as a chain, because a chain is a tree.

    A "deterministic" drafter chooses its drafts, in whatever way. A "sampled" one draws each of them from the law that
    tree.q holds, and decides to draw it, and to keep it, before it knows the draw; it also has `siblings`, a
    pyspec.tree.Siblings. Calling chosen drafts sampled biases the text: rules that trust q are told so by this.

    A drafter may have `taps`, layers whose residual stream it reads of all that it observes: see Runner.prefill.

    A drafter may have `propose_together(drafters, contexts, budgets)`, what each of some drafters that started from the
    same one proposes: several trees may cost less at once.

    A drafter whose trees grow level by level may have a `pace`, a pyspec.drafters.pace.Pace: a controller tells it what
    tokens take.

    A drafter that has laws of its own has `goes_on`, a pyspec.drafters.shapes.StopRule or None: a controller sets that
    of each sequence's drafter. It also has a `fingerprint`, which names it where something was learned of it.

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
        """Learns from a round: the target's rows after every node of a tree, and the accepted path, root included."""
        ...


class NamedDrafter(NamedTuple):
    """A drafter that has a name, for a runner alone is enough to make it.

    Attributes:
        make: the drafter of a runner, which knows nothing yet but what is computed from the model itself.
        learns: whether it has learned something that can be saved and loaded.
        fits: whether a runner can have it. An engine of others is described by a vocabulary and a fingerprint alone.
        prepare: computes what the drafter needs of a model, once for each, where it needs anything; called with a
            runner and `progress`, which is called with (done, total).
    """

    make: Callable[[Runner], Drafter]
    learns: bool = False
    fits: Callable[[Runner], bool] = lambda runner: True
    prepare: Callable | None = None


#: Drafters by name.
DRAFTERS: Registry[NamedDrafter] = Registry("pyspec.drafters")


def drafter_from_name(drafter: str | Drafter | Sequence[str | Drafter] | None, runner: Runner) -> Drafter | None:
    """The drafter that a name of DRAFTERS stands for, and several that take turns for a list. A drafter or None is
    returned as it is.

    A runner's drafter of a name is made once and lives as long as the runner, so that each request starts from what
    the earlier ones taught. Make one yourself (new_drafter) to start from nothing.

    Raises:
        ValueError: for an unknown name, or drafters that cannot take turns.
        TypeError: it is neither name nor drafter nor a list of them.
    """
    if isinstance(drafter, (list, tuple)):
        from pyspec.drafters.several import Several

        return Several([drafter_from_name(each, runner) for each in drafter])
    is_drafter = hasattr(drafter, "propose") and not isinstance(drafter, type)
    if drafter is None or is_drafter:
        return drafter
    made = DRAFTERS.named("drafter", drafter, "a Drafter or None").make
    kept = vars(runner).setdefault("_drafters", {})  # kept by the runner itself, which some of them hold
    if drafter not in kept:
        # two threads may make one each; both go on with the first
        kept.setdefault(drafter, made(runner))
    return kept[drafter]


def new_drafter(name: str, runner: Runner) -> Drafter:
    """A drafter of a name that knows nothing yet, but what is computed from the model itself."""
    return DRAFTERS[name].make(runner)


# of trained heads, which are imported when they are asked for: they need runners, which know drafters
_LATER = {"Chimera": "chimera", "DSpark": "dspark", "Eagle3": "eagle3", "drafter_of_head": "heads"}


def __getattr__(name: str):
    if name in _LATER:
        return getattr(importlib.import_module(f"pyspec.drafters.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
