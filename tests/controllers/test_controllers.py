"""Which controller a budget stands for, and a fixed number of nodes."""

import pytest

from pyspec.caches import cache_from_name
from pyspec.controllers import LARGEST, controller_for, pays
from pyspec.controllers.fixed import FixedController
from pyspec.controllers.pays import CuttingController, SizingController
from pyspec.drafters.lookup import LookupDrafter
from pyspec.machine.costs import Costs
from pyspec.tree import DraftTree
from tests.helpers.fake_runner import FakeRunner


class Draws(LookupDrafter):
    proposal = "sampled"


@pytest.mark.parametrize("drafter, kind", [(LookupDrafter, CuttingController), (Draws, SizingController)])
def test_auto_weighs_what_pays_by_how_drafts_are_made(drafter, kind):
    model = FakeRunner()
    controller = controller_for("auto", model, drafter(model.vocab_size))
    assert type(controller) is kind and 1 < controller.nodes <= controller.largest == LARGEST


@pytest.mark.parametrize("budget, drafts, nodes", [(5, True, 5), (5, False, 5), ("auto", False, LARGEST)])
def test_a_number_or_nothing_to_decide_is_fixed_and_measures_nothing(budget, drafts, nodes):
    drafter = LookupDrafter(10) if drafts else None
    controller = controller_for(budget, None, drafter)
    trees = [DraftTree.chain([1, 2, 3]), DraftTree.chain([1])]
    assert isinstance(controller, FixedController) and controller.cut(trees) == trees
    controller.learn(trees, [[0], [0]], 100.0, 1.0)
    assert controller.nodes == controller.largest == nodes


@pytest.mark.parametrize("drafter", [None, LookupDrafter(10)])
def test_no_tree_is_larger_than_a_cache_takes(drafter, monkeypatch):
    monkeypatch.setattr(pays, "costs_of", lambda *model: Costs((1, 64), (1.0, 1.001)))
    cache = cache_from_name("int4")
    monkeypatch.setattr(type(cache), "largest_tree", 3)
    controller = controller_for("auto", None, drafter, cache)
    assert controller.nodes == controller.largest == 3
