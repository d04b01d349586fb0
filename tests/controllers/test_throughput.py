"""The windows of the last rounds: the best size of all by what they hold, and what no round has had."""

import numpy as np
import pytest

from pyspec.controllers import throughput
from pyspec.controllers.throughput import EVERY, FIRST, WINDOW, Throughput
from pyspec.machine.costs import Costs
from pyspec.machine.running_costs import NODES, RunningCosts
from pyspec.tree import DraftTree


def controller(monkeypatch, *costs, largest=64):
    running = RunningCosts(Costs(*costs))
    monkeypatch.setattr(throughput, "running_costs", lambda model, cache: lambda: running)
    return Throughput(None, None, None, largest), running


def decode(it, running, rounds, right, drafting=0.0):
    for _ in range(rounds):
        nodes = it.nodes
        path = range(1 + min(right, nodes - 1))
        seconds = running.seconds[nodes]
        it.learn([DraftTree.chain(range(nodes))], [path], drafting * seconds, seconds)


@pytest.mark.parametrize("right, nodes", [(0, 2), (3, 4), (7, 8)])
def test_it_finds_the_size_that_gives_most(monkeypatch, right, nodes):
    it, running = controller(monkeypatch, (1, 64), (1.0, 16.0))
    assert it.nodes == FIRST
    decode(it, running, EVERY - 1, right)
    assert it.nodes == FIRST
    decode(it, running, EVERY * 5, right)
    assert nodes in (it.nodes, it.nodes / 2)
    decode(it, running, EVERY * 5, 1)  # another kind of text
    assert it.nodes in (2, 4)  # now and then a larger one is tried


def test_dear_drafting_makes_larger_trees_worth_it(monkeypatch):
    sizes = []
    for drafting in (0.0, 3.0):
        it, running = controller(monkeypatch, (1, 64), (1.0, 32.0))
        for number in range(40):  # every draft is right half of the time, with those before it
            nodes = it.nodes
            right = next(place for place in range(9) if place == 8 or number >> place & 1)
            path, seconds = range(1 + min(right, nodes - 1)), running.seconds[nodes]
            it.learn([DraftTree.chain(range(nodes))], [path], drafting, seconds)
        sizes.append(it.nodes)
    assert sizes[1] > sizes[0]


def test_the_chances_are_shares_of_the_window_and_fall_on_beyond_it(monkeypatch):
    it, running = controller(monkeypatch, (1, 64), (1.0, 64.0), largest=9)
    for number in range(3 * WINDOW):
        path = [0] if number < WINDOW else [0, 1, 2] if number % 2 else [0, 1]
        it.learn([DraftTree.chain(range(4))], [path], 0.0, 1.0)
    found = it._chances()
    assert found[:3] == pytest.approx([20 / 21, 10 / 21, 0.0])
    assert (np.diff(found[2:]) <= 0).all() and (found[3:] <= throughput.LEAST).all()
    assert it.nodes in NODES and Throughput(None, None, None, 1).nodes == 1


def test_a_snapshot_leaves_the_costs_where_they_are(monkeypatch):
    it, running = controller(monkeypatch, (1, 64), (1.0, 2.0))
    before = it.snapshot()
    decode(it, running, 40, 0)
    it.restore(before)
    assert it.nodes == FIRST and not it._window and it._costs() is running
