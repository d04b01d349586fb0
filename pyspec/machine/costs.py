"""What verifying a tree costs on this machine: found out once for a model, then kept."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pyspec.caches import QuantisedSettings
from pyspec.machine import store
from pyspec.ops._library import backend_of
from pyspec.runners import Runner
from pyspec.runners.exclusive import exclusive_use
from pyspec.stats import clock_of
from pyspec.tree import DraftTree

CONTEXT = 128  # tokens before the trees that are measured
SECONDS = 1.5  # that measuring takes, but for warming up; longer only where two passes of two sizes do
SIZES = (1, 16, 4, 32, 2, 8)  # any beginning of two or more spans the range: a slow model gets no further
ATTEMPTS = 3  # at a table without a hiccup of the machine in it
HICCUP = 0.2  # how much cheaper than a smaller tree a larger one may seem
LONGEST = 3600.0  # seconds of a verify that are believed


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
    def of_seconds(cls, found: Mapping[int, float]) -> Costs:
        """The table of what was measured: larger trees are never cheaper, nor dearer than node by node."""
        nodes, seconds = zip(*sorted(found.items()), strict=True)
        rising = np.maximum.accumulate(np.minimum(seconds, np.multiply(nodes, seconds[0])))
        return cls(nodes, tuple(rising.tolist()))

    def __call__(self, nodes: np.ndarray | int) -> np.ndarray:
        """Seconds at any number of nodes: on the lines between those measured, and on the last line beyond."""
        beyond = max(np.max(nodes), self.nodes[-1] + 1)
        slope = (self.seconds[-1] - self.seconds[-2]) / (self.nodes[-1] - self.nodes[-2])
        end = self.seconds[-1] + slope * (beyond - self.nodes[-1])
        return np.interp(nodes, (*self.nodes, beyond), (*self.seconds, end))


def kept_costs(key: str) -> Costs | None:
    """The costs that the user's cache folder keeps by a key of `key_of`, if it does."""
    try:
        nodes, seconds = store.read("costs", key)
        return Costs(tuple(nodes), tuple(seconds))
    except (TypeError, ValueError):
        return None


def keep_costs(key: str, costs: Costs) -> None:
    """Keeps costs in the user's cache folder, in place of those before."""
    store.keep("costs", key, [costs.nodes, costs.seconds])


def _is_rising(found: Mapping[int, float]) -> bool:
    """Whether no larger tree seems much cheaper than a smaller one, by seconds for numbers of nodes."""
    in_order = [found[size] for size in sorted(found)]
    return all(larger >= (1 - HICCUP) * smaller for smaller, larger in itertools.pairwise(in_order))


def measure_costs(model: Runner, cache: QuantisedSettings | None = None) -> Costs:
    """Times verify for a few numbers of nodes, in turn, and keeps the result; the model's batch is lost.

    Every tree has other tokens, because a model with experts reads those of all nodes: a token that is repeated would
    read the experts of one. Kernels are compiled and graphs captured before, and every size is called once before it
    counts: a first call may read weights from a disk. Then each is timed at least twice. A table in which larger trees
    seem cheaper is measured anew, and one that stays so is not kept.
    """
    context = min(CONTEXT, model.context_length - 2)
    if context < 1:  # no draft ever fits
        return Costs((1, 2), (1.0, 2.0))
    largest = min(model.context_length - context, max(SIZES) if cache is None else cache.largest_tree)
    sizes = [size for size in SIZES if size <= max(2, largest)]
    capacity, draw = context + max(sizes), random.Random(0)
    with exclusive_use(model):
        if cache is None and hasattr(model, "warm"):
            model.warm(capacity)
        prompt = [draw.randrange(model.vocab_size) for _ in range(context)]
        model.prefill([prompt], capacity=capacity, **({} if cache is None else {"cache": cache}))
        for _ in range(ATTEMPTS):
            found = _least(model, sizes, draw)
            if _is_rising(found):
                break
    costs = Costs.of_seconds(found)
    if _is_rising(found):
        keep_costs(key_of(model, cache), costs)
    return costs


def _least(model: Runner, sizes: Sequence[int], draw: random.Random) -> dict[int, float]:
    """The least seconds of a verify by its nodes, for as many of the sizes as there is time for, but two of them."""
    found: dict[int, list[float]] = {}
    spent = 0.0
    for size in sizes:
        if len(found) > 1 and 2 * spent > SECONDS:
            break
        _seconds(model, size, draw)
        found[size] = [_seconds(model, size, draw)]
        spent += found[size][0]
    passes = 1
    while passes < 2 or spent < SECONDS:
        for size, times in found.items():  # in turn, and the least: another process may have a processor at any time
            times.append(_seconds(model, size, draw))
            spent += times[-1]
        passes += 1
    return {size: min(times) for size, times in found.items()}


def _seconds(model: Runner, nodes: int, draw: random.Random) -> float:
    # two children a node: neither a chain nor a star
    tokens = [draw.randrange(model.vocab_size) for _ in range(nodes)]
    tree = DraftTree(tokens, [(node - 1) // 2 if node else -1 for node in range(nodes)])
    clock = clock_of(model)
    start = clock()
    model.verify({0: tree})
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return clock() - start


def key_of(model: Runner, cache: QuantisedSettings | None, shortest: int = 0) -> str:
    """Names what costs depend on.

    Args:
        cache: of the texts, None if dense.
        shortest: tokens before the trees, at least.
    """
    kernel = backend_of("linear", model.device.type)
    behind = {"behind": shortest} if shortest else {}
    return store.key(model, kernel, cache="dense" if cache is None else cache, tokens="drawn", **behind)
