"""Recorded rounds: a controller that takes a fixed size makes of them what generate makes of the text."""

import pytest

from pyspec import generate
from pyspec.controllers import CONTROLLERS, Controller, controller_for
from pyspec.drafters.model import ModelDrafter
from pyspec.drafters.shapes.reranked import TopPaths
from pyspec.machine import store
from pyspec.machine.costs import Costs
from pyspec.measure.replays import FIRST_OF_A_SIZE, Machine, best_possible, played, record, replay, total
from tests.helpers.fake_drafters import Oracle, OracleTrees
from tests.helpers.fake_runner import FakeRunner
from tests.helpers.trained_files import write_files

PROMPT = list(b"the tree")


@pytest.mark.parametrize("kind", [Oracle, OracleTrees])
@pytest.mark.parametrize("nodes", [1, 3, 6])
def test_a_fixed_size_gives_the_rounds_of_generate(kind, nodes):
    recording = record(FakeRunner(), PROMPT, {"it": kind(FakeRunner())}, nodes=8, max_new_tokens=40)
    rounds = recording.rounds["it"]
    text = generate(FakeRunner(), PROMPT, drafter=kind(FakeRunner()), budget=nodes, max_new_tokens=40)
    assert len(rounds) == 39 and recording.text.tokens == text.tokens
    machine = Machine(Costs((1, 8), (1.0, 2.0)), 0.5)
    found = replay(rounds, Controller(nodes), machine)
    assert (found.tokens, found.rounds) == (39, text.stats.rounds)
    if kind is Oracle and 39 % nodes == 0:
        each = 1 + (nodes - 1) / 7 + (0.5 if nodes > 1 else 0)
        assert found.steps == pytest.approx(each * found.rounds + FIRST_OF_A_SIZE)
    assert total([found, found])[:3] == (78, 2 * found.rounds, 2 * found.steps)


def test_a_recorded_text_goes_on_token_by_token_and_its_drafter_learns_what_was_emitted():
    drafter = Oracle(FakeRunner())
    rounds = record(FakeRunner(), PROMPT, {"it": drafter}, nodes=5, max_new_tokens=12).rounds["it"]
    right = [len(one.path) for one in rounds]
    assert right == [5] * 7 + [4, 3, 2, 1] and all(len(one.tree) == 5 for one in rounds[:-1])
    of_rounds = [(len(tree), path) for tree, path in drafter.observed if tree.tokens[0] != PROMPT[0]]
    assert of_rounds and all(seen == (1, [0]) for seen in of_rounds[-8:])


@pytest.mark.parametrize("name", [name for name, made in CONTROLLERS.items() if not getattr(made, "chooses", False)])
def test_a_played_controller_makes_what_generate_makes(name, tmp_path, monkeypatch):
    """Of a drafter that knows nothing of other drafts; costs are flat and drafting takes no time, as by the clock."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    write_files(tmp_path, monkeypatch)

    class Flat(FakeRunner):
        def seconds(self, nodes):
            return 1.0

    def drafter(model):
        return ModelDrafter(Near(), model, TopPaths(3, 4))

    model, found = Flat(), []
    with store.apart():
        controller = controller_for(13, name, model, drafter(model))
        text = generate(model, PROMPT, drafter=drafter(model), controller=controller, max_new_tokens=60)
    with store.apart():
        recording = record(Flat(), PROMPT, {"it": drafter(model)}, nodes=64, max_new_tokens=60)
        stands = played({"it": drafter(model)})
        model.committed = []
        found = replay(
            recording.rounds["it"],
            controller_for(13, name, model, stands),
            Machine(Costs((1, 64), (1.0, 1.000001))),
            stands,
        )
    assert recording.text.tokens == text.tokens
    assert abs(found.rounds - text.stats.rounds) <= 0.1 * text.stats.rounds


class Near(FakeRunner):
    """Is right of most tokens."""

    def logits(self, context):
        logits = super().logits(context)
        return logits.roll(1) if sum(context[-2:]) % 5 == 0 else logits


def test_the_best_possible_rounds_are_those_of_all_choices():
    rounds = {
        name: record(FakeRunner(), PROMPT, {name: kind(Near())}, nodes=8, max_new_tokens=9).rounds[name]
        for name, kind in (("a", Oracle), ("b", OracleTrees))
    }
    machines = {"a": Machine(Costs((1, 8), (1.0, 1.9)), 0.3), "b": Machine(Costs((1, 8), (1.0, 2.2)))}

    def least(place):
        if place == len(rounds["a"]):
            return 0.0
        options = [1.0 + least(place + 1)]
        for name, machine in machines.items():
            for nodes in range(2, 9):
                tokens = sum(node < nodes for node in rounds[name][place].path)
                options.append(machine.proposal + float(machine.costs(nodes)) + least(place + tokens))
        return min(options)

    found = best_possible(rounds, machines)
    assert found.tokens == 8 and found.steps == pytest.approx(least(0)) and found.rounds <= 8
