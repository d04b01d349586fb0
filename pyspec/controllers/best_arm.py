"""Of several drafters, the one that has given most for its time is taken, and the others now and then. After MetaSD.

Kim et al., arXiv 2604.05417, play a bandit with a drafter for an arm and a round for a pull: each once, then

    argmax over i of  mean_i + BETA sqrt(2 ln t / n_i)

n_i being the rounds of drafter i and t those of all. Their reward is 1 - TV(p, q) over the drafted positions, without
cost. Here it is what a round gave beyond its cost, in plain rounds, so that a good drafter that is dear loses to a fair
one that is free. Means are over the last rounds (pyspec.machine.experience), of all requests, and kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pyspec.controllers import CONTROLLERS, Controller
from pyspec.drafters import Drafter
from pyspec.drafters.several import Several
from pyspec.machine.experience import RECENT, experience_of
from pyspec.machine.running_costs import running_costs
from pyspec.tree import DraftTree

BETA = 0.1  # plain rounds: the means of two drafters seldom differ by more than a few tenths


class BestArm(Controller):
    """Chooses among drafters before every round, for all texts of a call.

    Args:
        model, drafter, cache, largest: as every controller that has a name gets them.

    Raises:
        ValueError: if drafter is not several.
    """

    chooses = True  #: which of several drafters
    shared = frozenset({"_costs", "_experiences", "_drafters"})

    def __init__(self, model, drafter: Drafter, cache, largest: int):
        super().__init__(largest)
        if not isinstance(drafter, Several):
            raise ValueError(f"drafter must be a list of drafters to choose from, got one {type(drafter).__name__}")
        self._costs = running_costs(model, cache)
        self._experiences = [experience_of(model, each, cache) for each in drafter.drafters]
        self._drafters: dict[int, Several] = {}
        self.arm = 0

    def start(self, slot: int, drafter: Several) -> None:
        """Chooses for that sequence too from now on."""
        self._drafters[slot] = drafter

    def budgets(self, slots: Sequence[int]) -> list[int]:
        """Chooses, and asks for as many nodes as may be."""
        self.arm = self._best()
        for slot in slots:
            self._drafters[slot].arm = self.arm
        return super().budgets(slots)

    def learn(
        self,
        trees: Sequence[DraftTree],
        paths: Sequence[Sequence[int]],
        draft_seconds: float,
        verify_seconds: float,
    ) -> None:
        """Learns what the chosen drafter's round gave; one in which nothing was drafted tells nothing."""
        nodes = sum(map(len, trees))
        if nodes == len(trees):
            return
        seconds = self._costs().seconds
        steps = seconds[nodes] / seconds[len(trees)]
        drafting = steps * draft_seconds / verify_seconds if verify_seconds else 0.0
        self._experiences[self.arm].learn(drafting, steps + drafting - sum(map(len, paths)) / len(trees))

    def _best(self) -> int:
        rounds = [min(experience.rounds, 1 / RECENT) for experience in self._experiences]
        if 0 in rounds:
            return rounds.index(0)
        wide = 2 * math.log(sum(rounds))
        scores = [
            BETA * math.sqrt(wide / count) - experience.lost
            for count, experience in zip(rounds, self._experiences, strict=True)
        ]
        return scores.index(max(scores))


CONTROLLERS.register("best_arm", BestArm, "of several drafters, the one that gives most (after MetaSD)")
