"""The controller that drafts as many nodes as pay.

A round gives one token and its accepted drafts, and takes as long as verifying its nodes. The best number of nodes m
maximises

    (1 + sum of the chances of the first m - 1 drafts) / seconds(m)

over trees that drafters grow best node first. m = 1 is plain decoding, so speculation that does not pay is left out.
Drafting takes time too, and what is not known yet may be dear: see PayingController.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence

import numpy as np

from pyspec.caches import QuantisedSettings
from pyspec.controllers import CONTROLLERS, LARGEST, Controller
from pyspec.drafters import Drafter
from pyspec.drafters.pace import Pace
from pyspec.machine.experience import MEMORY, MOST_LOST, Experience, experience_of
from pyspec.machine.running_costs import NODES, Lines, RunningCosts, running_costs
from pyspec.runners import Runner
from pyspec.tree import DraftTree

FEWEST = 8  # nodes that are asked for, so that a tree which was not worth it lately gets its chance
TRUST = 8.0  # accepted drafts that the word of the drafter, and of earlier requests, is worth
RECENT = 0.1  # what the last round counts in the mean of what rounds with drafts lost
LEARNING = 0.02  # plain rounds that a round may lose for what is learned from it
TRIALS = 0.02  # share of the time that drafting may lose
SHORTEST = 8  # tokens of a text from which on it loses no larger share
CREDIT = 4.0  # rounds as good as those of earlier requests, whose gain a text begins with
NONE = np.zeros(0)  # drafts of a tree that is kept whole
FIRST_OF_A_SIZE = 0.1  # plain rounds that recording the first round of a size takes


class PayingController(Controller):
    """Decides how many nodes of a round pay from what earlier rounds cost and gave.

    A text has a purse, in plain rounds: every token puts TRIALS into it, and a round with drafts puts in what it gave
    beyond what it cost, which may be less than nothing. No round is larger than the purse can pay for if nothing is
    accepted. So a text of SHORTEST tokens or more loses about TRIALS of its time at most, whatever the machine and the
    drafter are like, and what pays soon pays for more. Beside that, while rounds with drafts give less than plain
    decoding would in their time, as many plain rounds follow each of them as keep the loss at about TRIALS.

    Args:
        costs: gives what a verification costs now.
        largest: nodes of a tree, at most.
        pace: of the drafter, which is told what tokens take.
        experience: what earlier requests showed of the drafter.
    """

    shared = frozenset({"_costs", "_pace", "_experience"})

    def __init__(
        self,
        costs: Callable[[], RunningCosts],
        largest: int = LARGEST,
        pace: Pace | None = None,
        experience: Experience | None = None,
    ):
        super().__init__(largest)
        self._costs, self._pace = costs, pace
        self._experience = Experience() if experience is None else experience
        self._called: set[int] = set()  # numbers of nodes: a first call may be recorded, which takes longer
        self._asked: int | None = None  # nodes of each text in this round
        self._trial: int | None = None  # nodes of the next round, for the sake of what they cost
        self._texts = 1  # that took part in the last round
        self._purse = TRIALS * SHORTEST + CREDIT * max(0.0, -self._experience.lost)
        self._lost = self._experience.lost  # plain rounds that a round with drafts loses, lately
        self._resting = self._rest()  # plain rounds that are left

    @property
    def nodes(self) -> int:
        """Nodes that a drafter should propose; 1 while drafting rests."""
        costs = self._costs()
        is_unknown = self._texts == 1 and not costs.knows_plain
        if self._resting or self._trial == 1 or is_unknown or not self._can_pay(2, costs.most):
            return 1
        return min(self._wanted() if self._trial is None else self._trial, self.largest)

    def budgets(self, slots: Sequence[int]) -> list[int]:
        """As many nodes for each."""
        self._texts = len(slots)
        self._asked = self.nodes
        return [self._asked] * len(slots)

    def learn(
        self,
        trees: Sequence[DraftTree],
        paths: Sequence[Sequence[int]],
        draft_seconds: float,
        verify_seconds: float,
    ) -> None:
        """Learns how much of a round's trees was accepted, and what proposing and verifying them took."""
        asked = self.nodes if self._asked is None else self._asked
        self._asked, nodes, costs = None, sum(map(len, trees)), self._costs()
        for tree, path in zip(trees, paths, strict=True):
            self._learn(tree, path)
        first = 0.0 if nodes in self._called else FIRST_OF_A_SIZE
        if len(trees) == 1 and not first:  # the nodes of several texts cost something else
            costs.learn(nodes, verify_seconds)
        self._called.add(nodes)
        tokens = sum(map(len, paths)) / len(trees)
        self._purse += TRIALS * tokens
        if self._resting:
            self._resting -= 1
        elif asked > 1:
            seconds = costs.seconds
            steps = seconds[nodes] / seconds[len(trees)]
            if len(trees) == 1 and (first or not costs.is_sure_of(nodes)):
                steps, first = verify_seconds / seconds[len(trees)], 0.0
            self._drafted(steps + first, steps * draft_seconds / verify_seconds, tokens)
            if self._pace is not None and self._trial is None:
                self._pace.took_token((draft_seconds + verify_seconds) / sum(map(len, paths)))
        self._trial = None
        if len(trees) == 1 and not self._resting:
            self._trial = self._payable(costs.size_to_try())

    def _drafted(self, steps: float, drafting: float, tokens: float) -> None:
        """Accounts for a round with drafts that took so many plain rounds and gave so many tokens."""
        lost = min(steps + drafting - tokens, MOST_LOST)
        self._purse -= lost
        if self._trial is None:
            self._experience.learn(drafting, lost)
            self._lost += RECENT * (lost - self._lost)
            self._resting = self._rest()

    def _rest(self) -> int:
        return max(0, int((self._lost - LEARNING) / TRIALS))

    def _can_pay(self, nodes: float, most: Lines) -> bool:
        """Whether the purse has what a round loses if nothing is accepted.

        Args:
            nodes: of each text, in the mean.
            most: plain rounds that a verification takes at most, by its nodes.
        """
        nodes = round(self._texts * nodes)
        first = 0.0 if nodes in self._called else FIRST_OF_A_SIZE
        steps = most[nodes] / most[self._texts]
        return steps + first + self._experience.drafting - 1 <= self._purse

    def _payable(self, nodes: int | None) -> int | None:
        """The most nodes up to some that the purse can pay for, of sizes that costs are learned of."""
        if nodes is None or nodes == 1:
            return nodes
        most = self._costs().most
        return max((size for size in NODES if 1 < size <= nodes and self._can_pay(size, most)), default=None)

    @abstractmethod
    def cut(self, trees: Sequence[DraftTree]) -> list[DraftTree]:
        """Cuts the trees of a round to what is verified."""

    @abstractmethod
    def _wanted(self) -> int: ...

    @abstractmethod
    def _learn(self, tree: DraftTree, path: Sequence[int]) -> None: ...


class CuttingController(PayingController):
    """Cuts the trees of a round to the nodes that pay.

    Drafters state chances for greedy text and are sometimes wrong; what they promised is therefore scaled by what was
    accepted of it lately, in this text and before it.
    """

    def __init__(self, costs: Callable[[], RunningCosts], largest: int = LARGEST, **settings):
        super().__init__(costs, largest, **settings)
        self._promised = self._accepted = 0.0
        self._largest_kept = largest

    def _wanted(self) -> int:
        # twice what was worth it last time, for growing costs time too
        return max(2 * self._largest_kept, FEWEST)

    def cut(self, trees: Sequence[DraftTree]) -> list[DraftTree]:
        """Keeps the first nodes of each tree, and all of a tree that has no chances."""
        if self._trial is not None and len(trees) == 1:
            return list(trees)
        scale = self._scale()
        if len(trees) == 1:
            (tree,) = trees
            kept = len(tree) if tree.chances is None else 1 + self._best_cut(np.cumsum(_falling(tree, scale)), 1, 1)
            self._largest_kept = kept
            return [tree.first(kept)]
        whole = [len(tree) if tree.chances is None else 1 for tree in trees]
        falling = [NONE if tree.chances is None else _falling(tree, scale) for tree in trees]
        drafts = np.concatenate(falling)
        owners = np.repeat(np.arange(len(trees)), [len(chances) for chances in falling])
        order = np.argsort(-drafts, kind="stable")  # the drafts of one tree stay in their order
        taken = self._best_cut(np.cumsum(drafts[order]), sum(whole), len(trees))
        counts = np.bincount(owners[order[:taken]], minlength=len(trees)) + whole
        self._largest_kept = int(counts.max())
        return [tree.first(count) for tree, count in zip(trees, counts.tolist(), strict=True)]

    def _best_cut(self, gained: np.ndarray, nodes: int, texts: int) -> int:
        """How many drafts pay, of those that gain so many tokens together, beside nodes that are kept anyway."""
        costs, gained = self._costs(), gained.tolist()
        seconds, most = costs.seconds, costs.most
        # the first round of every size is recorded, so one text has few
        sizes = NODES if texts == 1 else range(nodes + 1, nodes + len(gained) + 1)
        rates = [
            ((texts + gained[size - nodes - 1]) / seconds[size], -size)
            for size in sizes
            if 0 < size - nodes <= len(gained)
        ]
        none = texts / seconds[nodes]
        for rate, size in sorted(rates, reverse=True):
            if rate <= none:
                break
            if self._can_pay(-size / texts, most):
                return -size - nodes
        return 0

    def _scale(self) -> float:
        before = (self._experience.accepted + TRUST) / (self._experience.promised + TRUST)
        return (self._accepted + TRUST * before) / (self._promised + TRUST)

    def _learn(self, tree: DraftTree, path: Sequence[int]) -> None:
        if tree.chances is not None:
            promised, accepted = sum(tree.chances[1:].tolist()), len(path) - 1
            self._promised = self._promised * MEMORY + promised
            self._accepted = self._accepted * MEMORY + accepted
            self._experience.learn_drafts(promised, accepted)


def _falling(tree: DraftTree, scale: float) -> np.ndarray:
    """The chances of a tree's drafts, none above that of one before it."""
    return np.minimum.accumulate(np.minimum(tree.chances[1:] * scale, 1.0))


class SizingController(PayingController):
    """Decides the number of nodes before they are drawn, for drafters that draw: no drawn node may be left out.

    How likely the i-th node of a tree is to be accepted is learned from earlier rounds, whose draws are over.
    """

    def __init__(self, costs: Callable[[], RunningCosts], largest: int = LARGEST, **settings):
        super().__init__(costs, largest, **settings)
        # until more is known, a tree of m nodes gives about log(m) + 1 tokens
        self._promised = 1 / (1 + np.arange(1, LARGEST))
        self._accepted, self._tried = (np.zeros(LARGEST - 1) for _ in range(2))

    def _wanted(self) -> int:
        tried = self._tried @ self._promised
        scale = (self._accepted.sum() + TRUST) / (tried + TRUST)
        chances = (self._accepted + TRUST * scale * self._promised) / (self._tried + TRUST)
        tokens = 1 + np.concatenate(([0.0], np.cumsum(chances)))
        costs, texts = self._costs(), self._texts
        rates = tokens / costs.seconds.at(texts * np.arange(1, LARGEST + 1))
        # no drawn node may be left out, so what cannot be paid for is not drawn
        most, nodes = costs.most, LARGEST  # a larger tree costs more, so what can be paid for are the first sizes
        while nodes > 1 and not self._can_pay(nodes, most):
            nodes -= 1
        return 1 + int(np.argmax(rates[:nodes]))

    def cut(self, trees: Sequence[DraftTree]) -> list[DraftTree]:
        """Keeps the trees whole."""
        return list(trees)

    def _learn(self, tree: DraftTree, path: Sequence[int]) -> None:
        self._accepted *= MEMORY
        self._tried *= MEMORY
        self._tried[: len(tree) - 1] += 1
        self._accepted[np.array(path[1:], int) - 1] += 1


def new_controller(model: Runner, drafter: Drafter, cache: QuantisedSettings | None, largest: int) -> Controller:
    """The controller for a drafter, by the costs of a model: drawn trees may not be cut, chosen ones may."""
    kind = SizingController if drafter.proposal == "sampled" else CuttingController
    experience = experience_of(model, drafter, cache)
    pace = getattr(drafter, "pace", None)
    return kind(running_costs(model, cache), largest, pace=pace, experience=experience)


CONTROLLERS.register("pays", new_controller, "as many as pay, by measured costs")
