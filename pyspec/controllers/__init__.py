"""Controllers: how much is drafted in a round, and how much of that is verified."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pyspec.registry import Registry
from pyspec.tree import DraftTree

if TYPE_CHECKING:
    from pyspec.caches import QuantisedSettings
    from pyspec.drafters import Drafter
    from pyspec.runners import Runner

__all__ = ["CONTROLLERS", "LARGEST", "Controller", "Together", "controller_for", "read_controller"]

LARGEST = 64  # nodes of a tree that a controller with a name asks for, at most

#: What makes a controller by name: called with model, drafter, cache and the largest tree.
CONTROLLERS: Registry[Callable[..., Controller]] = Registry("pyspec.controllers")


class Controller:
    """Decides in each round of a call of generate how much is drafted and verified, and learns from what came of it.

    This base asks for as many nodes as may be in every round, and verifies whatever was proposed. A controller decides
    before it knows what is drawn: no number that it gives may depend on drafts of the same round.

    Attributes:
        largest: nodes of a tree, root included, that it ever asks for; the loop makes room for that many.
        nodes: of the tree that each sequence gets proposed now, root included, at most; 1 is plain decoding.
    """

    largest: int
    shared: frozenset[str] = frozenset()  #: names of attributes that other requests have too

    def __init__(self, largest: int):
        self.largest = largest

    @property
    def nodes(self) -> int:
        return self.largest

    def start(self, slot: int, drafter: Drafter | None) -> None:
        """A sequence begins, with a drafter of its own, whose `goes_on` or `arm` a controller may set."""

    def budgets(self, slots: Sequence[int]) -> list[int]:
        """The nodes of each sequence's next tree; what else is told of this round is in the order of these slots."""
        return [self.nodes] * len(slots)

    def cut(self, trees: Sequence[DraftTree]) -> list[DraftTree]:
        """Cuts the trees proposed for a round, one for each sequence that takes part, to what is verified."""
        return list(trees)

    def learn(
        self,
        trees: Sequence[DraftTree],
        paths: Sequence[Sequence[int]],
        draft_seconds: float,
        verify_seconds: float,
    ) -> None:
        """Learns how much of a round's trees was accepted, and what proposing and verifying them took."""

    def snapshot(self) -> dict[str, object]:
        """All that it has learned of the texts so far, for `restore`; what requests share is left where it is."""
        return copy.deepcopy({name: value for name, value in vars(self).items() if name not in self.shared})

    def restore(self, learned: dict[str, object]) -> None:
        """Forgets what was learned since a snapshot."""
        vars(self).update(copy.deepcopy(learned))


class Together(Controller):
    """Several controllers as one, say a stop rule inside of what pays.

    A sequence gets the fewest nodes that one of them gives it; each cuts what the one before it has left.

    Args:
        controllers: one or more.
    """

    def __init__(self, controllers: Sequence[Controller]):
        super().__init__(min(controller.largest for controller in controllers))
        self.controllers = list(controllers)

    @property
    def nodes(self) -> int:
        return min(controller.nodes for controller in self.controllers)

    def start(self, slot: int, drafter: Drafter | None) -> None:
        for controller in self.controllers:
            controller.start(slot, drafter)

    def budgets(self, slots: Sequence[int]) -> list[int]:
        return [min(given) for given in zip(*(each.budgets(slots) for each in self.controllers), strict=True)]

    def cut(self, trees: Sequence[DraftTree]) -> list[DraftTree]:
        for controller in self.controllers:
            trees = controller.cut(trees)
        return list(trees)

    def learn(
        self,
        trees: Sequence[DraftTree],
        paths: Sequence[Sequence[int]],
        draft_seconds: float,
        verify_seconds: float,
    ) -> None:
        for controller in self.controllers:
            controller.learn(trees, paths, draft_seconds, verify_seconds)

    def snapshot(self) -> dict[str, object]:
        return {"controllers": [controller.snapshot() for controller in self.controllers]}

    def restore(self, learned: dict[str, object]) -> None:
        for controller, of_it in zip(self.controllers, learned["controllers"], strict=True):
            controller.restore(of_it)


def read_controller(controller: str | Controller | None) -> str | Controller | None:
    """A controller as generate takes it.

    Raises:
        ValueError: it is a string, but no name of CONTROLLERS, nor several with "+" between them.
        TypeError: it is something else.
    """
    if controller is None or isinstance(controller, Controller):
        return controller
    for name in controller.split("+") if isinstance(controller, str) else [controller]:
        CONTROLLERS.named("controller", name, 'several with "+" between them, or a controller')
    return controller


def controller_for(
    budget: int | str,
    controller: str | Controller | None,
    model: Runner,
    drafter: Drafter | None,
    cache: QuantisedSettings | None = None,
) -> Controller:
    """The controller of one call of generate.

    Args:
        budget: nodes of a tree at most, or "auto" for LARGEST.
        controller: a name, several names with "+" between them, a controller, which is used as it is, or None: "pays"
            for the budget "auto", and for a number that many nodes in every round.
        model: whose costs may be measured; its batch is lost then.
        drafter: None for plain decoding, where there is nothing to decide. Of several,
            "best_arm" chooses where none of the names does.
        cache: how keys and values are kept, None for a dense cache.
    """
    if isinstance(controller, Controller):
        return controller
    largest = LARGEST if budget == "auto" else budget
    if cache is not None:
        largest = min(largest, cache.largest_tree)
    if controller is None:
        controller = "pays" if budget == "auto" else "fixed"
    names = controller.split("+") if drafter is not None else []
    if hasattr(drafter, "arm") and not any(getattr(CONTROLLERS[name], "chooses", False) for name in names):
        names = ["best_arm", *names]
    controllers = [CONTROLLERS[name](model, drafter, cache, largest) for name in names]
    return Together(controllers) if len(controllers) > 1 else [*controllers, Controller(largest)][0]
