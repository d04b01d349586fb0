"""The first rounds: costs are found out while text is generated, kept if they make sense, and text is the same."""

import pytest

from pyspec import generate
from pyspec.controllers import first_rounds
from pyspec.controllers.first_rounds import ASSUMED, TIMES, FirstRounds
from pyspec.controllers.pays import CuttingController
from pyspec.drafters import new_drafter
from pyspec.machine.costs import SIZES, kept_costs
from pyspec.tree import DraftTree
from tests.helpers.fake_runner import FakeRunner


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(first_rounds, "_timings", {})
    return tmp_path / "pyspec"


def rounds(controller, count, law=lambda nodes, calls: 0.01 + 0.001 * nodes, most=64):
    """Rounds of a drafter that proposes as many nodes as it is asked for, up to a limit."""
    asked, calls = [], {}
    for _ in range(count):
        nodes = min(controller.nodes, most)
        asked.append(nodes)
        (tree,) = controller.cut([DraftTree.chain(range(nodes))])
        calls[nodes] = calls.get(nodes, 0) + 1
        controller.learn([tree], [[0]], 0.0, law(nodes, calls[nodes] - 1))
    return asked


def controller_of(model, largest=64):
    return FirstRounds(model, None, CuttingController, largest)


def test_every_size_is_timed_in_turn_and_the_costs_are_kept():
    model = FakeRunner()
    asked = rounds(controller_of(model), TIMES * len(SIZES), lambda nodes, calls: 9.0 if calls == 0 else 0.1 + nodes)
    assert asked == list(SIZES) * TIMES
    found = kept_costs(model)
    assert found.nodes == tuple(sorted(SIZES)) and found.seconds == tuple(0.1 + nodes for nodes in found.nodes)


def test_a_later_call_goes_on_where_an_earlier_one_ended():
    model = FakeRunner()
    whole = sum((rounds(controller_of(model), 4) for _ in range(TIMES * len(SIZES) // 4)), [])
    assert whole == list(SIZES) * TIMES and kept_costs(model) is not None and not first_rounds._timings


def test_calls_at_the_same_time_share_what_they_time():
    model = FakeRunner()
    both = [controller_of(model) for _ in range(2)]
    for turn in range(TIMES * len(SIZES) + 2):
        rounds(both[turn % 2], 1)
    assert kept_costs(model).nodes == tuple(sorted(SIZES)) and all(each._then is not None for each in both)


def test_a_drafter_that_never_proposes_as_much_leaves_no_costs():
    model = FakeRunner()
    controller = controller_of(model)
    rounds(controller, TIMES * len(SIZES), most=4)
    assert kept_costs(model) is None and controller._then._costs == ASSUMED
    assert controller.nodes > 1


@pytest.mark.parametrize("law", [lambda nodes, calls: 1.0 / nodes, lambda nodes, calls: 0.0])
def test_costs_that_make_no_sense_are_not_kept(law):
    model = FakeRunner()
    controller = controller_of(model)
    rounds(controller, TIMES * len(SIZES), law)
    assert kept_costs(model) is None and controller._then is not None


def test_trees_of_a_cache_that_takes_few_nodes():
    model = FakeRunner()
    assert set(rounds(controller_of(model, largest=4), TIMES * 3)) == {1, 2, 4}
    assert kept_costs(model).nodes == (1, 2, 4)
    assert controller_of(FakeRunner(), largest=1).nodes == 1


@pytest.mark.parametrize("drafter", ["merged", "recycling"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_texts_are_those_of_plain_decoding_and_nothing_else_is_verified(drafter, temperature):
    model = FakeRunner()
    options = {"max_new_tokens": 120, "seed": 3, "temperature": temperature}
    expected = generate(FakeRunner(), list(b"the tree"), drafter=None, **options).tokens
    found = generate(model, list(b"the tree"), drafter=new_drafter(drafter, model), budget="auto", **options)
    assert found.tokens == expected
    assert model.verified == found.stats.rounds


def test_a_batch_takes_assumed_costs():
    model, prompts = FakeRunner(), [list(b"the tree"), list(b"q")]
    expected = generate(FakeRunner(), prompts, drafter=None, max_new_tokens=60, seed=3).tokens
    assert generate(model, prompts, drafter="merged", budget="auto", max_new_tokens=60, seed=3).tokens == expected
    assert kept_costs(model) is None
