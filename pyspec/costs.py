"""What verifying a tree costs on this machine, and so how many draft nodes are worth verifying.

A round gives one token and its accepted drafts, and takes as long as verifying its nodes. The best number of nodes m
maximises

    (1 + sum of the chances of the first m - 1 drafts) / seconds(m)

over trees that drafters grow best node first. m = 1 is plain decoding, so speculation that does not pay is left out.
Drafting takes time too: while rounds with it lose against plain decoding, it is tried rarely (Budget).
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pyspec.caches import PackedSettings
from pyspec.drafters import Drafter
from pyspec.machine import cpu_name, measured
from pyspec.ops import backends
from pyspec.runners import Runner
from pyspec.runners.exclusive import exclusive_use
from pyspec.tree import DraftTree

__all__ = ["AutoBudget", "Budget", "Costs", "DrawnBudget", "auto_budget", "costs_of", "measure_costs"]

FEWEST, LARGEST = 8, 64  # nodes of a tree that "auto" considers
CONTEXT = 128  # tokens before the trees that are measured
SECONDS = 1.5  # that measuring takes, but for warming up; longer only where two passes of two sizes do
SIZES = (1, 16, 4, 32, 2, 8)  # any beginning of two or more spans the range: a slow model gets no further
ATTEMPTS = 3  # at a table without a hiccup of the machine in it
HICCUP = 0.2  # how much cheaper than a smaller tree a larger one may seem
LONGEST = 3600.0  # seconds of a verify that are believed
TRUST = 8.0  # accepted drafts that the drafter's own word is worth
MEMORY = 0.98  # of what earlier rounds showed, from round to round
RECENT = 0.1  # what the last round counts in the mean of what rounds with drafts lost
MOST_LOST = 2.0  # plain rounds that one round is taken to have lost at most: a machine may hang
LEARNING = 0.1  # plain rounds that a round may lose for what is learned from it
TRIALS = 0.02  # share of the time that drafting may lose


@dataclass(frozen=True)
class Costs:
    """Seconds of a verification, measured at some numbers of nodes.

    Args:
        nodes: two or more numbers, ascending from 1.
        seconds: of each, never falling.

    Raises:
        ValueError: it is no such table, or an absurd one: more than so many plain steps, or than an hour.
    """

    nodes: tuple[int, ...]
    seconds: tuple[float, ...]

    def __post_init__(self):
        nodes, seconds = self.nodes, self.seconds
        if not (len(nodes) == len(seconds) > 1 and nodes[0] == 1 and all(a < b for a, b in itertools.pairwise(nodes))):
            raise ValueError(f"nodes must ascend from 1 with a time for each, got {nodes} and {seconds}")
        if not (all(map(math.isfinite, seconds)) and 0 < seconds[0] <= seconds[-1] <= LONGEST):
            raise ValueError(f"seconds must be in (0, {LONGEST}], got {seconds}")
        if list(seconds) != sorted(seconds) or any(s > n * seconds[0] for n, s in zip(nodes, seconds, strict=True)):
            raise ValueError(f"seconds must not fall with nodes, nor exceed as many plain steps, got {seconds}")

    @classmethod
    def of_medians(cls, medians: Mapping[int, float]) -> Costs:
        """The table of what was measured: larger trees are never cheaper, nor dearer than node by node."""
        nodes, seconds = zip(*sorted(medians.items()), strict=True)
        rising = np.maximum.accumulate(np.minimum(seconds, np.multiply(nodes, seconds[0])))
        return cls(nodes, tuple(rising.tolist()))

    def __call__(self, nodes: np.ndarray | int) -> np.ndarray:
        """Seconds at any number of nodes: on the lines between those measured, and on the last line beyond."""
        beyond = max(np.max(nodes), self.nodes[-1] + 1)
        slope = (self.seconds[-1] - self.seconds[-2]) / (self.nodes[-1] - self.nodes[-2])
        end = self.seconds[-1] + slope * (beyond - self.nodes[-1])
        return np.interp(nodes, (*self.nodes, beyond), (*self.seconds, end))


class Budget(ABC):
    """How many nodes of a round pay, decided from what earlier rounds cost and gave.

    When rounds with drafts give much less than plain decoding would in their time, drafting with it, as many plain
    rounds follow each of them as keep the loss at about TRIALS of the time.
    """

    def __init__(self, costs: Costs):
        self._costs = costs
        self._seconds: list[float] = []  # by number of nodes, as far as they were asked for
        self._lost = 0.0  # plain rounds that a round with drafts loses, lately; negative where it wins
        self._resting = 0  # plain rounds that are left

    @property
    def nodes(self) -> int:
        """Nodes that a drafter should propose; 1 while drafting rests."""
        return 1 if self._resting else self._wanted()

    def learn(
        self,
        trees: Sequence[DraftTree],
        paths: Sequence[Sequence[int]],
        draft_seconds: float,
        verify_seconds: float,
    ) -> None:
        """How much of a round's trees was accepted, and what proposing and verifying them took."""
        for tree, path in zip(trees, paths, strict=True):
            self._learn(tree, path)
        if self._resting:
            self._resting -= 1
            return
        # both times were taken on the machine as it is now, the costs when it was perhaps less busy
        nodes = sum(map(len, trees))
        costs = self._costs_up_to(nodes)
        plain_rounds = costs[nodes] / costs[len(trees)] * (1 + draft_seconds / verify_seconds)
        lost = plain_rounds - sum(map(len, paths)) / len(trees)
        self._lost += RECENT * (min(lost, MOST_LOST) - self._lost)
        self._resting = max(0, int((self._lost - LEARNING) / TRIALS))

    def _costs_up_to(self, nodes: int) -> list[float]:
        if len(self._seconds) <= nodes:
            self._seconds = self._costs(np.arange(2 * nodes + 1)).tolist()
        return self._seconds

    @abstractmethod
    def cut(self, trees: Sequence[DraftTree]) -> list[DraftTree]:
        """What is verified of the trees of a round."""

    @abstractmethod
    def _wanted(self) -> int: ...

    @abstractmethod
    def _learn(self, tree: DraftTree, path: Sequence[int]) -> None: ...


class AutoBudget(Budget):
    """Cuts the trees of a round to the nodes that pay.

    Drafters state chances for greedy text and are sometimes wrong; what they promised is therefore scaled by what was
    accepted of it lately.
    """

    def __init__(self, costs: Costs):
        super().__init__(costs)
        self._promised = self._accepted = 0.0
        self._largest_kept = LARGEST

    def _wanted(self) -> int:
        # twice what was worth it last time, for growing costs time too
        return min(max(2 * self._largest_kept, FEWEST), LARGEST)

    def cut(self, trees: Sequence[DraftTree]) -> list[DraftTree]:
        """The first nodes of each tree; all of a tree that has no chances."""
        scale = (self._accepted + TRUST) / (self._promised + TRUST)
        drafts = []  # (chance, tree) of all that may be left out
        for index, tree in enumerate(trees):
            chance = 1.0
            for stated in [] if tree.chances is None else tree.chances[1:].tolist():
                chance = min(chance, stated * scale)
                drafts.append((chance, index))
        if len(trees) > 1:
            drafts.sort(key=lambda draft: draft[0], reverse=True)  # the drafts of one tree stay in their order
        nodes = sum(len(tree) if tree.chances is None else 1 for tree in trees)
        seconds = self._costs_up_to(nodes + len(drafts))
        tokens = float(len(trees))
        best, most = 0, tokens / seconds[nodes]
        for taken, (chance, _) in enumerate(drafts, start=1):
            tokens += chance
            if tokens / seconds[nodes + taken] > most:
                best, most = taken, tokens / seconds[nodes + taken]
        kept = [len(tree) if tree.chances is None else 1 for tree in trees]
        for _, index in drafts[:best]:
            kept[index] += 1
        self._largest_kept = max(kept)
        return [tree.first(count) for tree, count in zip(trees, kept, strict=True)]

    def _learn(self, tree: DraftTree, path: Sequence[int]) -> None:
        if tree.chances is not None:
            self._promised = self._promised * MEMORY + sum(tree.chances[1:].tolist())
            self._accepted = self._accepted * MEMORY + len(path) - 1


class DrawnBudget(Budget):
    """The number of nodes that pays, for drafters that draw: decided before, for no drawn node may be left out.

    How likely the i-th node of a tree is to be accepted is learned from earlier rounds, whose draws are over.
    """

    def __init__(self, costs: Costs):
        super().__init__(costs)
        # until more is known, a tree of m nodes gives about log(m) + 1 tokens
        self._promised = 1 / (1 + np.arange(1, LARGEST))
        self._accepted, self._tried = (np.zeros(LARGEST - 1) for _ in range(2))
        self._trees = 1

    def _wanted(self) -> int:
        tried = self._tried @ self._promised
        scale = (self._accepted.sum() + TRUST) / (tried + TRUST)
        chances = (self._accepted + TRUST * scale * self._promised) / (self._tried + TRUST)
        tokens = 1 + np.concatenate(([0.0], np.cumsum(chances)))
        return 1 + int(np.argmax(tokens / self._costs(self._trees * np.arange(1, LARGEST + 1))))

    def cut(self, trees: Sequence[DraftTree]) -> list[DraftTree]:
        """The trees, whole."""
        self._trees = len(trees)
        return list(trees)

    def _learn(self, tree: DraftTree, path: Sequence[int]) -> None:
        self._accepted *= MEMORY
        self._tried *= MEMORY
        self._tried[: len(tree) - 1] += 1
        self._accepted[np.array(path[1:], int) - 1] += 1


def auto_budget(drafter: Drafter, costs: Costs) -> Budget:
    """The budget for a drafter: drawn trees may not be cut, chosen ones may."""
    return (DrawnBudget if drafter.proposal == "sampled" else AutoBudget)(costs)


def costs_of(model: Runner, cache: PackedSettings | None = None) -> Costs:
    """The costs of a model on this machine, measured once and then kept in the user's cache folder.

    The model's batch is lost when they are measured. cache is that of the texts to come, None if dense.
    """
    try:
        kept = measured.read("costs")[_key(model, cache)]
        return Costs(tuple(kept["nodes"]), tuple(kept["seconds"]))
    except (KeyError, TypeError, ValueError):
        return measure_costs(model, cache)


def measure_costs(model: Runner, cache: PackedSettings | None = None) -> Costs:
    """Times verify for a few numbers of nodes, in turn, and keeps the result; the model's batch is lost.

    Kernels are compiled and graphs captured before, and every size is called once before it counts: a first call may
    read weights from a disk. Then each is timed at least twice. A table in which larger trees seem cheaper is measured
    anew, and one that stays so is not kept.
    """
    context = min(CONTEXT, model.context_length - 2)
    if context < 1:  # no draft ever fits
        return Costs((1, 2), (1.0, 2.0))
    largest = min(LARGEST, model.context_length - context, LARGEST if cache is None else cache.largest_tree)
    sizes = [size for size in SIZES if size <= max(2, largest)]
    capacity = context + max(sizes)
    with exclusive_use(model):
        if cache is None and hasattr(model, "warm"):
            model.warm(capacity)
        model.prefill([[0] * context], capacity=capacity, **({} if cache is None else {"cache": cache}))
        for _ in range(ATTEMPTS):
            medians = _medians(model, sizes)
            in_order = [medians[size] for size in sorted(medians)]
            has_hiccup = any(larger < (1 - HICCUP) * smaller for smaller, larger in itertools.pairwise(in_order))
            if not has_hiccup:
                break
    costs = Costs.of_medians(medians)
    if not has_hiccup:
        measured.keep("costs", _key(model, cache), {"nodes": costs.nodes, "seconds": costs.seconds})
    return costs


def _medians(model: Runner, sizes: Sequence[int]) -> dict[int, float]:
    """Seconds of a verify by its number of nodes, for as many of the sizes as there is time for, but two of them."""
    found: dict[int, list[float]] = {}
    spent = 0.0
    for size in sizes:
        if len(found) > 1 and 2 * spent > SECONDS:
            break
        _seconds(model, size)
        found[size] = [_seconds(model, size)]
        spent += found[size][0]
    passes = 1
    while passes < 2 or spent < SECONDS:
        for size, times in found.items():  # in turn, and medians: a busy machine is slower for all sizes
            times.append(_seconds(model, size))
            spent += times[-1]
        passes += 1
    return {size: statistics.median(times) for size, times in found.items()}


def _seconds(model: Runner, nodes: int) -> float:
    # two children a node: neither a chain nor a star
    tree = DraftTree([0] * nodes, [(node - 1) // 2 if node else -1 for node in range(nodes)])
    start = time.perf_counter()
    model.verify({0: tree})
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter() - start


def _key(model: Runner, cache: PackedSettings | None = None) -> str:
    on_cuda = model.device.type == "cuda"
    device = torch.cuda.get_device_name(model.device) if on_cuda else f"{cpu_name()}, {torch.get_num_threads()} threads"
    kernels = next(row for row in backends() if row["op"] == "linear" and row["device"] == model.device.type)
    weights = getattr(model, "weight_dtype", model.dtype)
    packed = "" if cache is None else f" {cache}"
    return f"{device}; {kernels['backend']} {kernels['reason']}; {model.fingerprint} {model.dtype} {weights}{packed}"
