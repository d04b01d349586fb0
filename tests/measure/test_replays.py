"""Recorded rounds: a controller that takes a fixed size makes of them what generate makes of the text."""

import pytest

from pyspec import generate
from pyspec.controllers import Controller
from pyspec.machine.costs import Costs
from pyspec.measure.replays import FIRST_OF_A_SIZE, Machine, record, replay, total
from tests.helpers.fake_drafters import Oracle, OracleTrees
from tests.helpers.fake_runner import FakeRunner

PROMPT = list(b"the tree")


@pytest.mark.parametrize("kind", [Oracle, OracleTrees])
@pytest.mark.parametrize("nodes", [1, 3, 6])
def test_a_fixed_size_gives_the_rounds_of_generate(kind, nodes):
    rounds = record(FakeRunner(), PROMPT, kind(FakeRunner()), nodes=8, max_new_tokens=40)
    text = generate(FakeRunner(), PROMPT, drafter=kind(FakeRunner()), budget=nodes, max_new_tokens=40)
    assert len(rounds) == 39
    machine = Machine(Costs((1, 8), (1.0, 2.0)), lambda nodes: 0.5)
    found = replay(rounds, Controller(nodes), machine)
    assert (found.tokens, found.rounds) == (39, text.stats.rounds)
    if kind is Oracle and 39 % nodes == 0:
        each = 1 + (nodes - 1) / 7 + (0.5 if nodes > 1 else 0)
        assert found.steps == pytest.approx(each * found.rounds + FIRST_OF_A_SIZE)
    assert total([found, found]) == (78, 2 * found.rounds, 2 * found.steps)


def test_a_recorded_text_goes_on_token_by_token_and_its_drafter_learns_what_was_emitted():
    drafter = Oracle(FakeRunner())
    rounds = record(FakeRunner(), PROMPT, drafter, nodes=5, max_new_tokens=12)
    assert all(len(path) == len(tree) for tree, path in rounds)  # it is always right
    of_rounds = [(len(tree), path) for tree, path in drafter.observed if tree.tokens[0] != PROMPT[0]]
    assert of_rounds and all(seen == (1, [0]) for seen in of_rounds[-8:])
