"""Running costs: rounds show the law of a machine whatever is assumed or kept, and a busy minute leaves no trace."""

import numpy as np
import pytest

from pyspec import generate
from pyspec.machine import running_costs
from pyspec.machine.costs import Costs, keep_costs, kept_costs, key_of
from pyspec.machine.running_costs import ASSUMED, KEPT_EVERY, NODES, SHORT, RunningCosts
from tests.helpers.fake_runner import FakeRunner

LAW = Costs((1, 4, 16, 32), (0.010, 0.013, 0.031, 0.064))  # dearer than what is assumed


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def rounds(running, count, law=LAW, sizes=(1, 3, 8, 13, 16, 27, 32, 50), seed=0):
    """Rounds of some sizes in any order, some of them by a tenth slower than the law and a few by much."""
    draw = np.random.default_rng(seed)
    for nodes in draw.choice(sizes, count).tolist():
        running.learn(nodes, float(law(nodes)) * (1 + 0.1 * draw.random()) * (8 if draw.random() < 0.02 else 1))


def proportions(costs, sizes):
    return np.asarray(costs(np.array(sizes)) / costs(1))


def test_whatever_is_assumed_rounds_show_the_law():
    running = RunningCosts(ASSUMED)
    assert running.costs(np.array(NODES)) == pytest.approx(ASSUMED(np.array(NODES)))
    rounds(running, 150)
    sizes = [1, 8, 16, 32, 64]
    assert proportions(running.costs, sizes) == pytest.approx(proportions(LAW, sizes), rel=0.12)
    assert running.costs(16) == pytest.approx(LAW(16), rel=0.2)
    table = [running.costs(max(nodes, 1)) for nodes in range(201)]
    assert [running.seconds[nodes] for nodes in range(201)] == pytest.approx(table)
    assert running.seconds.at(np.arange(1, 201)) == pytest.approx(table[1:])


@pytest.mark.parametrize("law", [Costs((1, 32), (0.001, 0.0011)), Costs((1, 32), (0.2, 3.0))])
def test_sizes_that_no_round_had_do_not_contradict_those_that_rounds_had(law):
    running = RunningCosts(ASSUMED)
    rounds(running, 100, law, sizes=(1, 8))
    assert proportions(running.costs, [8]) == pytest.approx(proportions(law, [8]), rel=0.12)
    assert list(running.costs.seconds) == sorted(running.costs.seconds)


def test_a_busy_minute_leaves_no_trace():
    running = RunningCosts(ASSUMED)
    rounds(running, 400)
    calm = proportions(running.costs, NODES)
    busy = Costs(LAW.nodes, tuple(3 * seconds for seconds in LAW.seconds))
    for law, sizes in [(busy, (8, 16)), (LAW, (1, 3)), (busy, (1,)), (LAW, (8, 16))]:
        rounds(running, 200, law, sizes, seed=1)
    assert proportions(running.costs, NODES) == pytest.approx(calm, rel=0.15)
    assert running.costs(16) == pytest.approx(LAW(16), rel=0.2)


def test_a_machine_that_hangs_for_a_round_teaches_next_to_nothing():
    running = RunningCosts(ASSUMED)
    for number in range(30):
        nodes = (1, 16)[number % 2]
        running.learn(nodes, 30.0 if number in (0, 11) else float(ASSUMED(nodes)))
    assert proportions(running.costs, NODES) == pytest.approx(proportions(ASSUMED, NODES), rel=0.5)
    assert proportions(running.costs, [2, 4, 8, 16]) == pytest.approx(proportions(ASSUMED, [2, 4, 8, 16]), rel=0.25)


@pytest.mark.parametrize("seconds", [0.0, -1.0])
def test_a_clock_that_stands_teaches_nothing(seconds):
    running = RunningCosts(ASSUMED)
    for _ in range(20):
        running.learn(8, seconds)
    assert running.costs(8) == pytest.approx(ASSUMED(8))


@pytest.mark.parametrize("law", [LAW, ASSUMED, Costs((1, 32), (0.01, 0.0102)), Costs((1, 8, 32), (0.1, 0.2, 0.68))])
def test_the_first_rounds_tell_about_what_all_sizes_cost(law):
    """They are plain and of eight nodes in turn, a few of each."""
    running, asked = RunningCosts(ASSUMED, found=False), []
    while (nodes := running.size_to_try()) is not None:
        asked.append(nodes)
        running.learn(nodes, float(law(nodes)))
    assert 4 <= len(asked) <= 12 and asked == ([8, 1] * 6)[: len(asked)]
    assert proportions(running.costs, [8]) == pytest.approx(proportions(law, [8]), rel=0.1)
    assert proportions(running.costs, [32]) == pytest.approx(proportions(law, [32]), rel=0.7)


def test_trees_of_all_rounds_are_held_against_a_plain_step_again_and_again():
    """Or what makes all of them seem cheap would never be found out."""
    running, plain = RunningCosts(Costs((1, 64), (0.01, 0.0101))), []
    for number in range(600):
        nodes = running.size_to_try() or 64
        running.learn(nodes, 0.01 * nodes)
        if nodes == 1:
            plain.append(number)
    assert len(plain) < 60 and plain[-1] > 300
    assert proportions(running.costs, [64]) > 10


def test_rounds_are_kept_and_later_processes_begin_with_them(monkeypatch):
    model = FakeRunner()
    running = running_costs.running_costs(model)()
    assert running_costs.running_costs(model)() is running and running.costs == RunningCosts(ASSUMED).costs
    rounds(running, 4 * KEPT_EVERY)
    kept = kept_costs(key_of(model, None))
    assert kept(32) == pytest.approx(LAW(32), rel=0.2)
    monkeypatch.setattr(running_costs, "_running", {})
    assert running_costs.running_costs(model)().costs.seconds == pytest.approx(kept.seconds)


def test_an_absurd_clock_keeps_nothing():
    running = RunningCosts(ASSUMED, key_of(FakeRunner(), None))
    rounds(running, KEPT_EVERY, Costs((1, 2), (100.0, 100.0)), sizes=(1,))
    kept = kept_costs(key_of(FakeRunner(), None))
    for _ in range(KEPT_EVERY):
        running.learn(1, 1e9)
    assert kept is not None and kept_costs(key_of(FakeRunner(), None)) == kept


def test_long_texts_have_costs_of_their_own_that_begin_with_those_of_shorter_ones():
    model, length = FakeRunner(), [0]
    model.lengths = lambda: length
    keep_costs(key_of(model, None), LAW)
    now = running_costs.running_costs(model)
    short = now()
    assert short.costs(np.array([1, 16, 32])) == pytest.approx(LAW(np.array([1, 16, 32])))
    length[0] = SHORT - 1
    assert now() is short
    length[0] = 20 * SHORT
    longest = now()
    assert longest is not short and longest.costs == short.costs
    rounds(longest, 200, Costs((1, 32), (0.02, 0.03)))
    assert longest.costs(32) == pytest.approx(0.03, rel=0.2) and short.costs(32) == pytest.approx(LAW(32))
    length[0] = 4 * SHORT
    between = now()
    assert between is not longest and between.costs == short.costs
    length[0] = 63 * SHORT
    assert now() is longest


@pytest.mark.parametrize("drafter", ["merged", "recycling"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_texts_are_those_of_plain_decoding_and_nothing_else_is_verified(drafter, temperature):
    model = FakeRunner()
    options = {"max_new_tokens": 300, "seed": 3, "temperature": temperature}
    expected = generate(FakeRunner(), list(b"the tree"), drafter=None, **options).tokens
    found = generate(model, list(b"the tree"), drafter=drafter, budget="auto", **options)
    assert found.tokens == expected
    assert model.verified == found.stats.rounds
