"""What verifying costs is found out in the first rounds of a model on a machine, which give text meanwhile."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pyspec.machine.costs import SIZES, Costs, is_rising, keep_costs, key_of
from pyspec.tree import DraftTree

if TYPE_CHECKING:
    from pyspec.caches import QuantisedSettings
    from pyspec.controllers import Controller
    from pyspec.runners import Runner

TIMES = 4  # that each size is asked for; the first call of a size does not count, for it may be recorded then
ASSUMED = Costs((1, 8, 32), (1.0, 1.4, 3.5))  # in plain steps, where nothing is measured: the demo model's in bf16

# Seconds by nodes, and how often a size was asked for, by what they are of: a call of generate may end too early.
_timings: dict[str, tuple[dict[int, list[float]], Counter]] = {}


class FirstRounds:
    """Asks for trees of a few sizes in turn, times their verification, and then decides as another controller.

    A drafter may propose fewer nodes than it is asked for, so what is timed is what was verified. Where the largest
    size never came, and for a batch, whose rounds are of other sizes, assumed costs serve for this call.

    Args:
        then: makes the controller that decides by costs, of trees of so many nodes at most.
        largest: nodes of a tree, at most.
    """

    def __init__(
        self,
        model: Runner,
        cache: QuantisedSettings | None,
        then: Callable[[Costs, int], Controller],
        largest: int,
    ):
        self.largest = largest
        self._model, self._cache, self._make = model, cache, then
        self._sizes = [size for size in SIZES if size <= largest]
        self._found, self._asked = _timings.setdefault(key_of(model, cache), (defaultdict(list), Counter()))
        self._then = then(ASSUMED, largest) if len(self._sizes) < 2 else None

    @property
    def nodes(self) -> int:
        """Nodes that a drafter should propose."""
        return self._size if self._then is None else self._then.nodes

    @property
    def _size(self) -> int:
        return min(self._sizes, key=lambda size: self._asked[size])  # the first of those asked for least

    def cut(self, trees: Sequence[DraftTree]) -> list[DraftTree]:
        """Keeps the trees whole while sizes are timed."""
        if self._then is None and len(trees) > 1:
            self._then = self._make(ASSUMED, self.largest)
        return list(trees) if self._then is None else self._then.cut(trees)

    def learn(
        self,
        trees: Sequence[DraftTree],
        paths: Sequence[Sequence[int]],
        draft_seconds: float,
        verify_seconds: float,
    ) -> None:
        """Learns what a tree of this size takes."""
        if self._then is not None:
            return self._then.learn(trees, paths, draft_seconds, verify_seconds)
        self._asked[self._size] += 1
        self._found[len(trees[0])].append(verify_seconds)
        if self._asked[self._size] >= TIMES:  # all of them were
            self._then = self._make(self._costs(), self.largest)

    def _costs(self) -> Costs:
        _timings.pop(key_of(self._model, self._cache), None)  # other calls at the same time share them
        ends = (1, max(self._sizes))  # other sizes that came once or twice tell more of chance than of the machine
        least = {size: min(times[1:]) for size, times in self._found.items() if len(times) > (1 if size in ends else 2)}
        if not set(ends) <= set(least):
            return ASSUMED
        try:
            costs = Costs.of_seconds(least)
        except ValueError:  # by a clock that stands, or after a year
            return ASSUMED
        if is_rising(least):
            keep_costs(self._model, self._cache, costs)
        return costs
