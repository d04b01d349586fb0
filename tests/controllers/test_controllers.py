"""Which controller a budget stands for, and a fixed number of nodes."""

from pathlib import Path

import pytest

from pyspec.caches import cache_from_name
from pyspec.controllers import CONTROLLERS, LARGEST, Controller, controller_for
from pyspec.controllers.pays import CuttingController, SizingController
from pyspec.drafters.table_drafter import TableDrafter
from pyspec.drafters.tables.lookup import Lookup
from pyspec.generate import generate
from pyspec.tree import DraftTree
from tests.helpers.fake_runner import FakeRunner
from tests.helpers.newcomers import registered_by


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def after_plain_rounds(controller):
    """By then it knows a plain step, and can pay for a draft."""
    for _ in range(10):
        controller.learn([DraftTree.chain([1])], [[0]], 0.0, 1.0)
    return controller


class Draws(TableDrafter):
    proposal = "sampled"


@pytest.mark.parametrize("drafter, kind", [(TableDrafter, CuttingController), (Draws, SizingController)])
def test_auto_weighs_what_pays_by_how_drafts_are_made(drafter, kind):
    model = FakeRunner()
    controller = after_plain_rounds(controller_for("auto", None, model, drafter([Lookup(model.vocab_size)])))
    assert type(controller) is kind and 1 < controller.nodes <= controller.largest == LARGEST


@pytest.mark.parametrize("budget, drafts, nodes", [(5, True, 5), (5, False, 5), ("auto", False, LARGEST)])
def test_a_number_or_nothing_to_decide_is_fixed_and_measures_nothing(budget, drafts, nodes):
    drafter = TableDrafter([Lookup(10)]) if drafts else None
    controller = controller_for(budget, None, None, drafter)
    trees = [DraftTree.chain([1, 2, 3]), DraftTree.chain([1])]
    assert type(controller) is Controller and controller.cut(trees) == trees
    controller.learn(trees, [[0], [0]], 100.0, 1.0)
    assert controller.nodes == controller.largest == nodes


@pytest.mark.parametrize("drafter", [None, TableDrafter([Lookup(10)])])
def test_no_tree_is_larger_than_a_cache_takes(drafter, monkeypatch):
    cache = cache_from_name("int4")
    monkeypatch.setattr(type(cache), "largest_tree", 3)
    controller = after_plain_rounds(controller_for("auto", None, FakeRunner(), drafter, cache))
    assert 2 <= controller.nodes <= controller.largest == 3 or drafter is None and controller.nodes == 3


def test_halving():
    with registered_by(CONTROLLERS, Path(__file__).with_name("halving.py")):
        controller = controller_for("auto", "halving", None, TableDrafter([Lookup(10)]))
    found = []
    for path in ([0], [0], [0, 1], [0]):
        found.append(controller.nodes)
        controller.learn([DraftTree.chain([1, 2])], [path], 1.0, 1.0)
    assert found == [64, 32, 16, 17]


def test_a_controller_decides_within_the_budget():
    drafter = TableDrafter([Lookup(10)])
    assert controller_for("auto", "fixed", None, drafter).nodes == LARGEST
    assert controller_for(7, "fixed", None, drafter).nodes == 7
    own = Controller(5)
    assert controller_for("auto", own, None, drafter) is own
    model = FakeRunner()
    controller = after_plain_rounds(controller_for(9, "pays", model, TableDrafter([Lookup(model.vocab_size)])))
    assert 1 <= controller.nodes <= controller.largest == 9


@pytest.mark.parametrize(
    "wrong, error",
    [("all", ValueError), ("pays+all", ValueError), ("", ValueError), (3, TypeError), (Controller, TypeError)],
)
def test_what_is_no_controller_is_refused(wrong, error):
    model = FakeRunner()
    with pytest.raises(error, match="controller must be one of .*pays"):
        generate(model, [97], controller=wrong)
    assert model.now == 0
