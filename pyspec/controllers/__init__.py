"""Controllers: how much is drafted in a round, and how much of that is verified."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from pyspec.controllers.fixed import FixedController
from pyspec.registry import Registry
from pyspec.tree import DraftTree

if TYPE_CHECKING:
    from pyspec.caches import QuantisedSettings
    from pyspec.drafters import Drafter
    from pyspec.runners import Runner

__all__ = ["CONTROLLERS", "LARGEST", "Controller", "controller_for"]

LARGEST = 64  # nodes of a tree that a controller with a name asks for, at most

#: What makes a controller by name, as a budget may be one: called with model, drafter, cache and the largest tree.
CONTROLLERS: Registry[Callable[..., Controller]] = Registry("pyspec.controllers")


class Controller(Protocol):
    """Decides in each round of a call of generate how much is drafted and verified, and learns from what came of it.

    Attributes:
        largest: nodes of a tree, root included, that it ever asks for; the loop makes room for that many.
        nodes: of the tree that each sequence gets proposed now, root included, at most; 1 is plain decoding.
    """

    largest: int

    @property
    def nodes(self) -> int: ...

    def cut(self, trees: Sequence[DraftTree]) -> list[DraftTree]:
        """Cuts the trees proposed for a round, one for each sequence that takes part, to what is verified."""
        ...

    def learn(
        self,
        trees: Sequence[DraftTree],
        paths: Sequence[Sequence[int]],
        draft_seconds: float,
        verify_seconds: float,
    ) -> None:
        """Learns how much of a round's trees was accepted, and what proposing and verifying them took."""
        ...


def controller_for(
    budget: int | str, model: Runner, drafter: Drafter | None, cache: QuantisedSettings | None = None
) -> Controller:
    """The controller of one call of generate.

    Args:
        budget: nodes of a tree, or a controller's name.
        model: whose costs may be measured; its batch is lost then.
        drafter: None for plain decoding, where there is nothing to decide.
        cache: how keys and values are kept, None for a dense cache.
    """
    largest = LARGEST if isinstance(budget, str) else budget
    if cache is not None:
        largest = min(largest, cache.largest_tree)
    if drafter is None or not isinstance(budget, str):
        return FixedController(largest)
    return CONTROLLERS[budget](model, drafter, cache, largest)
