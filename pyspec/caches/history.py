"""How many accepted nodes a StateCache keeps before it folds them into the state, by what rounds cost on this machine.

A fold stores every state, which is half of a round's traffic; a kept node is replayed in every round until its fold. So
keeping pays where states are many, and never for one sequence.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from pyspec.caches.state import StateCache
from pyspec.machine import cpu_name, measured
from pyspec.ops import backends
from pyspec.ops.selective_state import Round, selective_state
from pyspec.tree import DraftTree

__all__ = ["best_history", "history_for", "measured_history"]

FEWEST_SEQUENCES = 4  # for fewer, paths are folded in every round
ACCEPTED, NODES = 3, 6  # of the rounds that are measured
MOST_KEPT = 4 * ACCEPTED
REPEATS = 3


def best_history(keeping: Callable[[int], float], folding: Callable[[int], float]) -> int:
    """The history for which a round costs least on average.

    keeping and folding give what a round costs that replays so many nodes; ACCEPTED more of them come with every round.
    """
    best, least, spent = 0, folding(ACCEPTED), 0.0
    for kept in range(ACCEPTED, MOST_KEPT + 1, ACCEPTED):  # then the next round folds
        spent += keeping(kept)
        average = (spent + folding(kept + ACCEPTED)) / (kept // ACCEPTED + 1)
        if average < least:
            best, least = kept, average
    return best


def history_for(cache: StateCache, rates: list[torch.Tensor], heads: int, groups: int) -> int:
    """`measured_history`, measured once for a size of batch and then kept in the user's cache folder."""
    sequences, device = cache.states.shape[1], cache.states.device
    if sequences < FEWEST_SEQUENCES:
        return 0
    machine = f"{cpu_name()}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    shape = "x".join(map(str, cache.states.shape))
    kernel = next(row for row in backends() if row["op"] == "selective_state" and row["device"] == device.type)
    key = f"{machine}; {kernel['backend']} {kernel['reason']}; {shape} in {heads} heads and {groups} groups"
    kept = measured.read("histories").get(key)
    if isinstance(kept, dict) and kept.get("nodes") in range(0, MOST_KEPT + 1):
        return int(kept["nodes"])
    found = measured_history(cache, rates, heads, groups)
    measured.keep("histories", key, {"nodes": found})
    return found


def measured_history(cache: StateCache, rates: list[torch.Tensor], heads: int, groups: int) -> int:
    """`best_history` of the recurrences of all layers, run on a new cache, whose states are zero and stay so.

    rates: A of each layer, as selective_state takes it.
    """
    _, sequences, panels, states, lanes = cache.states.shape
    device = cache.states.device
    record = cache.records.new_zeros(2, sequences, MOST_KEPT + ACCEPTED + NODES, cache.records.shape[4])
    x, dt, B = (record.new_zeros(sequences * NODES, size) for size in (panels * lanes, heads, groups * states))
    trees, places = [DraftTree.chain([0] * NODES)] * sequences, list(range(sequences))

    def seconds(accepted: int, fold: bool) -> float:
        keeps = [-1 if fold else accepted] * sequences
        round = Round.of(trees, places, [range(accepted)] * sequences, [0] * sequences, keeps=keeps, device=device)
        times = []
        for _ in range(1 + REPEATS):  # the first may compile
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            for state, A in zip(cache.states, rates, strict=True):
                selective_state(state, record, x, dt, A, B, B, round)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])

    return best_history(lambda kept: seconds(kept, False), lambda kept: seconds(kept, True))
