"""What verifying a tree costs now: begun with what is kept or assumed, and learned from the rounds of every call.

A Kalman filter holds the logarithms of the plain step's seconds and of what trees of some sizes cost in plain steps.
The former may change at any time, for a machine is busy now and calm then; the latter hardly do. So a round that took
longer than expected is put down to the machine where its size is well known, and to its size where that is in doubt.
What is assumed of sizes goes up and down together, so that the first few rounds tell what all of them cost.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np

from pyspec.caches import QuantisedSettings
from pyspec.machine import store
from pyspec.machine.costs import Costs, keep_costs, kept_costs, key_of
from pyspec.runners import Runner

ASSUMED = Costs((1, 8, 16, 32), (1.0, 1.16, 1.4, 2.1))  # in plain steps: a processor with VNNI or bf16 instructions
NODES = (1, 2, 4, 8, 16, 32, 64)  # that costs are learned of
PLACES = {0: 0} | {nodes: place for place, nodes in enumerate(NODES)}  # no node is as one
EIGHT = 3  # place of the nodes that are tried first

# Standard deviations of logarithms
NOISE = 0.1  # of a round
BUSY = 0.1  # of the plain step from one round to the next
DRIFT = 0.005  # of a size from one round to the next
IN_DOUBT = 2.0  # of 64 nodes where nothing is kept; others' fall as their squared logarithms: AVX2 is so beside VNNI
FOUND = 0.4  # the same where something is kept
TOGETHER = 0.97  # correlation of what is assumed of any two sizes
SURE = 0.1  # of trees like the last ones; above that they and plain steps are tried in turn
HICCUP = 3.0  # standard deviations that a round is taken to differ by at most

KEPT_EVERY = 64  # rounds
SHORT = 1024  # tokens before a tree; longer texts have costs of their own, and again from four times as many on


class RunningCosts:
    """Seconds of a verification by its nodes, as the last rounds had them.

    Args:
        costs: to begin with, in any unit.
        key: that they are kept by in the user's cache folder; None keeps nothing.
        found: whether they were found on this machine.
    """

    def __init__(self, costs: Costs, key: str | None = None, *, found: bool = True):
        self._key, self._rounds = key, 0
        seconds = np.log(costs(np.array(NODES)))
        self._mean = np.append(seconds[0], seconds[1:] - seconds[0])
        sizes = (np.log(NODES[1:]) / math.log(NODES[-1])) ** 2 * (FOUND if found else IN_DOUBT)
        self._covariance = np.zeros((len(NODES), len(NODES)))
        self._covariance[1:, 1:] = np.outer(sizes, sizes) * (TOGETHER + (1 - TOGETHER) * np.eye(len(sizes)))
        self._covariance[0, 0] = 100.0  # whatever the unit is
        self._variances = self._covariance.reshape(-1)[:: len(NODES) + 1]  # a view of the diagonal
        self._walk = np.array([BUSY, *[DRIFT] * len(sizes)]) ** 2
        self._tree = NODES[EIGHT]  # nodes of the last tree
        self._was_plain = True
        self._seconds: Lines | None = None  # what was made of all this since the last round
        self._most: Lines | None = None

    @property
    def costs(self) -> Costs:
        """The table as it is now."""
        return Costs(NODES, tuple(self.seconds.values))

    @property
    def seconds(self) -> Lines:
        """Seconds of a verification by its nodes."""
        if self._seconds is None:
            plain = math.exp(self._mean[0])
            self._seconds = Lines(plain, (plain * np.exp(np.maximum(self._mean[1:], 0.0))).tolist())
        return self._seconds

    @property
    def most(self) -> Lines:
        """Plain steps of a verification by its nodes, a standard deviation above the mean."""
        if self._most is None:
            logs = np.maximum(self._mean[1:], 0.0) + np.sqrt(self._variances[1:])
            self._most = Lines(1.0, np.exp(logs).tolist())
        return self._most

    @property
    def knows_plain(self) -> bool:
        """Whether a round has told what a plain step takes in this process."""
        return self._covariance[0, 0] < 1.0

    def is_sure_of(self, nodes: int) -> bool:
        """Whether it is known to a tenth how many plain steps so many nodes take."""
        _, slope = self._at(min(nodes, NODES[-1]))
        slope[0] = 0.0
        return slope @ self._covariance @ slope < SURE**2

    def size_to_try(self) -> int | None:
        """The nodes that the next round should have whatever they give, None if as many as pay."""
        if self.is_sure_of(self._tree):
            return None
        return self._tree if self._was_plain else 1

    def learn(self, nodes: int, seconds: float) -> None:
        """Learns from a round whose tree had so many nodes and took so long."""
        if not 0 < seconds < math.inf:  # by a clock that stands
            return
        nodes = min(nodes, NODES[-1])
        expected, slope = self._at(nodes)
        self._variances += self._walk
        shares = self._covariance @ slope
        variance = float(slope @ shares) + NOISE**2
        most = HICCUP * math.sqrt(variance)
        off = min(max(math.log(seconds) - expected, -most), most)
        self._mean += shares * (off / variance)
        self._covariance -= shares[:, None] * (shares / variance)
        self._was_plain = nodes == 1
        if nodes > 1:
            self._tree = nodes
        self._seconds = self._most = None
        self._rounds += 1
        if self._key is not None and self._rounds % KEPT_EVERY == 0:
            with suppress(ValueError):  # seconds that no machine takes
                keep_costs(self._key, self.costs)

    def _at(self, nodes: int) -> tuple[float, np.ndarray]:
        """The logarithm of the seconds of so many nodes, and its slope."""
        slope = np.zeros(len(NODES))
        slope[0] = 1.0
        last = max(bisect_left(NODES, nodes), 1)
        right = (nodes - NODES[last - 1]) / (NODES[last] - NODES[last - 1])
        plain, size = float(self._mean[0]), float(self._mean[last])
        before = (1 - right) * (math.exp(self._mean[last - 1]) if last > 1 else 1.0)
        behind = right * math.exp(size)
        steps = before + behind
        if last > 1:
            slope[last - 1] = before / steps
        slope[last] = behind / steps
        return plain + math.log(steps), slope


class Lines:
    """What numbers of nodes cost, on the lines between NODES, and on the last line beyond.

    Larger trees are never cheaper, nor dearer than node by node.

    Args:
        plain: of one node.
        sizes: of the other NODES.
    """

    def __init__(self, plain: float, sizes: Sequence[float]):
        self.values = values = [plain]  #: of NODES
        for nodes, value in zip(NODES[1:], sizes, strict=True):
            values.append(max(values[-1], min(value, nodes * plain)))

    def __getitem__(self, nodes: int) -> float:
        place = PLACES.get(nodes)
        if place is not None:
            return self.values[place]
        last = min(bisect_left(NODES, nodes), len(NODES) - 1)
        before, behind = self.values[last - 1 : last + 1]
        return before + (behind - before) * (nodes - NODES[last - 1]) / (NODES[last] - NODES[last - 1])

    def at(self, nodes: np.ndarray) -> np.ndarray:
        """The same of many numbers."""
        return Costs(NODES, tuple(self.values))(nodes)


_running: dict[tuple, RunningCosts] = {}  # by folder and key: all calls in a process share them


def running_costs(model: Runner, cache: QuantisedSettings | None = None) -> Callable[[], RunningCosts]:
    """What gives the costs of a model on this machine behind texts of the lengths that they have by then.

    cache is that of the texts, None if dense.
    """
    found: dict[int, RunningCosts] = {}  # of this call, for a key takes a while

    def now() -> RunningCosts:
        shortest = _shortest(max(model.lengths(), default=0))
        if shortest not in found:
            found[shortest] = _of_texts(model, cache, shortest)
        return found[shortest]

    return now


def _of_texts(model: Runner, cache: QuantisedSettings | None, shortest: int) -> RunningCosts:
    key = key_of(model, cache, shortest)
    place = store.folder(), key
    if place not in _running:
        kept, assumed = kept_costs(key), ASSUMED
        if kept is None and shortest:
            assumed = _of_texts(model, cache, _shortest(shortest - 1)).costs
        _running[place] = RunningCosts(assumed if kept is None else kept, key, found=kept is not None)
    return _running[place]


def _shortest(length: int) -> int:
    """The tokens of the shortest text that shares its costs with those of a length."""
    shortest = SHORT
    while shortest * 4 <= length:
        shortest *= 4
    return shortest if length >= SHORT else 0
