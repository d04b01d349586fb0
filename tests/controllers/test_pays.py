"""What pays: the best cut against all cuts, what was promised against what was kept, and when drafting rests."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyspec import controllers, generate
from pyspec.controllers import pays
from pyspec.controllers.pays import CuttingController, PayingController, SizingController
from pyspec.machine.costs import Costs
from pyspec.tree import DraftTree
from tests.helpers.fake_runner import FakeRunner


def tree_of(chances) -> DraftTree:
    """A chain below a root, with the chances of its drafts."""
    nodes = len(chances) + 1
    return DraftTree(range(nodes), range(-1, nodes - 1), chances=torch.tensor([1.0, *chances]))


def learn(controller: PayingController, tree: DraftTree, path, drafting: float = 0.0) -> None:
    """A round of one sequence, drafting taking so much of a verification."""
    controller.learn([tree], [path], drafting, 1.0)


def rest(controller: PayingController) -> int:
    """Lets drafting rest as long as it should; the number of rounds."""
    rounds = 0
    while controller._resting:
        learn(controller, DraftTree.chain([0]), [0])
        rounds += 1
    return rounds


falling = st.lists(st.floats(0, 1, width=32), max_size=6).map(lambda chances: sorted(chances, reverse=True))


@given(st.lists(falling, min_size=1, max_size=3), st.lists(st.floats(0, 0.5), min_size=20, max_size=20))
def test_the_cut_is_the_best_of_all_cuts(chances, steps):
    table = Costs(tuple(range(1, 21)), tuple(np.cumsum([1.0, *steps[:19]]).tolist()))
    kept = CuttingController(table).cut([tree_of(of_tree) for of_tree in chances])

    def rate(counts):
        tokens = sum(1 + sum(of_tree[: count - 1]) for of_tree, count in zip(chances, counts, strict=True))
        return tokens / table(sum(counts))

    best = max(rate(counts) for counts in itertools.product(*(range(1, len(tree) + 2) for tree in chances)))
    assert rate([len(tree) for tree in kept]) == pytest.approx(best, rel=1e-6)


def test_a_free_tree_is_kept_whole_and_a_dear_one_is_left_out():
    tree = tree_of([0.9, 0.5, 0.1])
    assert CuttingController(Costs((1, 64), (1.0, 1.0001))).cut([tree]) == [tree]
    assert len(CuttingController(Costs((1, 64), (1.0, 64.0))).cut([tree])[0]) == 1


def test_a_tree_without_chances_is_kept_whole():
    tree = DraftTree.chain([1, 2, 3])
    assert CuttingController(Costs((1, 64), (1.0, 64.0))).cut([tree, tree_of([0.1])])[0] is tree


def test_a_drafter_that_promises_too_much_is_believed_less_and_can_earn_it_back():
    controller = CuttingController(
        Costs((1, 64), (1.0, 14.0))
    )  # a draft is worth it from a chance of 0.21 on, and less
    tree = tree_of([0.6, 0.5])
    assert len(controller.cut([tree])[0]) == 3
    for _ in range(40):
        learn(controller, tree, [0])
    assert len(controller.cut([tree])[0]) == 1
    for _ in range(200):  # nothing was tried, so what was held against it fades
        learn(controller, tree.first(1), [0])
    assert len(controller.cut([tree])[0]) == 3


def test_the_next_tree_is_asked_for_about_as_large_as_was_worth_it():
    controller = CuttingController(Costs((1, 64), (1.0, 64.0)))
    assert controller.nodes == controllers.LARGEST
    controller.cut([tree_of([0.1] * 20)])
    assert controller.nodes == pays.FEWEST


def test_drawn_trees_get_the_size_that_paid_before():
    chain = DraftTree.chain(range(9))
    for accepted, fewest, most in [(8, 9, 64), (2, 2, 9), (0, 1, 2)]:
        drawn = SizingController(Costs((1, 64), (1.0, 8.0)))
        assert drawn.cut([chain]) == [chain]
        for _ in range(100):
            learn(drawn, chain, range(1 + accepted))
        assert fewest <= drawn.nodes <= most
        for _ in range(300):  # without trials, what was held against them fades
            learn(drawn, chain.first(1), [0])
        assert 1 < drawn.nodes < 64
    assert SizingController(Costs((1, 64), (1.0, 64.0))).nodes == 1
    assert SizingController(Costs((1, 64), (1.0, 1.001))).nodes > 1


@pytest.mark.parametrize("kind", [CuttingController, SizingController])
def test_drafting_that_costs_more_than_it_brings_rests_most_of_the_time(kind):
    controller, tree = kind(Costs((1, 64), (1.0, 1.01))), DraftTree.chain([1, 2, 3])
    tried = rounds = 0
    while rounds < 3000:  # a round with drafts takes as long as two and a half plain ones and gives two tokens
        learn(controller, tree, [0, 1], drafting=1.5)
        tried, rounds = tried + 1, rounds + 1 + rest(controller)
    assert controller.nodes > 1 and 0.01 < 0.5 * tried / rounds < 0.03
    for _ in range(30):  # it pays again, after a while
        learn(controller, tree, [0, 1, 2], drafting=1.5)
        assert rest(controller) < 60
    learn(controller, tree, [0, 1, 2], drafting=1.5)
    assert controller.nodes > 1


def test_drafting_that_pays_never_rests_and_a_hanging_machine_is_soon_forgotten():
    controller, tree = CuttingController(Costs((1, 64), (1.0, 1.01))), DraftTree.chain([1, 2, 3])
    for _ in range(100):
        learn(controller, tree, [0, 1], drafting=0.5)
        assert controller.nodes > 1
    learn(controller, tree, [0], drafting=1000.0)
    assert controller.nodes > 1
    fresh = CuttingController(Costs((1, 64), (1.0, 1.01)))
    learn(fresh, tree, [0], drafting=1000.0)
    assert 0 < rest(fresh) <= 10


def test_a_batch_is_weighed_as_one():
    controller, tree = CuttingController(Costs((1, 64), (1.0, 1.01))), DraftTree.chain([1, 2, 3])
    for _ in range(100):  # one sequence pays for both
        controller.learn([tree, tree], [[0, 1, 2], [0]], 0.8, 1.0)
        assert controller.nodes > 1
    resting = 0
    for _ in range(200):
        controller.learn([tree, tree], [[0, 1], [0]], 0.8, 1.0)
        resting += controller.nodes == 1
    assert resting > 100


@pytest.mark.parametrize("seconds", [1.0001, 64.0])
def test_generation_with_the_automatic_budget_says_what_plain_decoding_says(monkeypatch, seconds):
    monkeypatch.setattr(pays, "kept_costs", lambda *model: Costs((1, 64), (1.0, seconds)))
    prompts = [list(b"ab"), list(b"the tree"), list(b"q")]
    plain = generate(FakeRunner(), prompts, drafter=None, max_new_tokens=60, seed=3)
    drafted = generate(FakeRunner(), prompts, drafter="merged", budget="auto", max_new_tokens=60, seed=3)
    assert drafted.tokens == plain.tokens
    nodes = drafted.stats.nodes / sum(drafted.stats.accepted_lengths)
    assert nodes == 1 if seconds == 64.0 else nodes > 4
