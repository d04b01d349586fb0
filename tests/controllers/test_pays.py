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
from pyspec.machine.costs import Costs, keep_costs, key_of
from pyspec.machine.experience import Experience
from pyspec.machine.running_costs import ASSUMED, NODES, RunningCosts
from pyspec.tree import DraftTree
from tests.helpers.fake_runner import FakeRunner


def tree_of(chances) -> DraftTree:
    """A chain below a root, with the chances of its drafts."""
    nodes = len(chances) + 1
    return DraftTree(range(nodes), range(-1, nodes - 1), chances=torch.tensor([1.0, *chances]))


def by(*table, kind=CuttingController, purse: float = 1e9, **settings) -> PayingController:
    """A controller by numbers of nodes and their seconds, which knows a plain step and has won much already."""
    running = RunningCosts(Costs(*table))
    running.learn(1, table[1][0])
    controller = kind(lambda: running, **settings)
    controller._purse = purse
    return controller


def learn(controller: PayingController, tree: DraftTree, path, drafting: float = 0.0) -> None:
    """A round of one sequence that takes as long as it should, drafting taking so much of a verification."""
    seconds = controller._costs().seconds[len(tree)]
    controller.learn([tree], [path], drafting * seconds, seconds)


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
    controller = by(tuple(range(1, 21)), tuple(np.cumsum([1.0, *steps[:19]]).tolist()))
    table = controller._costs().costs
    kept = controller.cut([tree_of(of_tree) for of_tree in chances])

    def rate(counts):
        tokens = sum(1 + sum(of_tree[: count - 1]) for of_tree, count in zip(chances, counts, strict=True))
        return tokens / table(sum(counts))

    cuts = itertools.product(*(range(1, len(tree) + 2) for tree in chances))
    best = max(rate(counts) for counts in cuts if len(counts) > 1 or counts[0] in NODES)
    assert rate([len(tree) for tree in kept]) == pytest.approx(best, rel=1e-6)


def test_a_free_tree_is_kept_whole_and_a_dear_one_is_left_out():
    tree = tree_of([0.9, 0.5, 0.1])
    assert by((1, 64), (1.0, 1.0001)).cut([tree]) == [tree]
    assert len(by((1, 64), (1.0, 1.0001)).cut([tree_of([0.9] * 6)])[0]) == 4  # of a size that will come again
    assert len(by((1, 64), (1.0, 64.0)).cut([tree])[0]) == 1


def test_a_tree_without_chances_is_kept_whole():
    tree = DraftTree.chain([1, 2, 3])
    assert by((1, 64), (1.0, 64.0)).cut([tree, tree_of([0.1])])[0] is tree


def test_a_drafter_that_promises_too_much_is_believed_less_and_can_earn_it_back():
    controller = by((1, 64), (1.0, 14.0))  # a draft is worth it from a chance of 0.21 on, and less
    tree = tree_of([0.6, 0.5, 0.5])
    assert len(controller.cut([tree])[0]) == 4
    for _ in range(40):
        learn(controller, tree, [0])
    controller._trial = None  # it is about what is worth it, not about what is to be found out
    assert len(controller.cut([tree])[0]) == 1
    for _ in range(200):  # nothing was tried, so what was held against it fades
        learn(controller, tree.first(1), [0])
    controller._trial = None
    assert len(controller.cut([tree])[0]) == 4


def test_the_next_tree_is_asked_for_about_as_large_as_was_worth_it():
    controller = by((1, 64), (1.0, 64.0))
    assert controller.nodes == controllers.LARGEST
    controller.cut([tree_of([0.1] * 20)])
    assert controller.nodes == pays.FEWEST


def test_drawn_trees_get_the_size_that_paid_before():
    chain = DraftTree.chain(range(9))
    for accepted, fewest, most in [(8, 9, 64), (2, 2, 9), (0, 1, 2)]:
        drawn = by((1, 64), (1.0, 8.0), kind=SizingController)
        assert drawn.cut([chain]) == [chain]
        for _ in range(100):
            learn(drawn, chain, range(1 + accepted))
        assert fewest <= drawn._wanted() <= most
        for _ in range(300):  # without trials, what was held against them fades
            learn(drawn, chain.first(1), [0])
        assert 1 < drawn._wanted() < 64
    assert by((1, 64), (1.0, 64.0), kind=SizingController).nodes == 1
    assert by((1, 64), (1.0, 1.001), kind=SizingController).nodes > 1


@pytest.mark.parametrize("kind", [CuttingController, SizingController])
def test_drafting_that_costs_more_than_it_brings_rests_most_of_the_time(kind):
    controller, tree = by((1, 64), (1.0, 1.01), kind=kind), DraftTree.chain([1, 2, 3])
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
    controller, tree = by((1, 64), (1.0, 1.01)), DraftTree.chain([1, 2, 3])
    for _ in range(100):
        learn(controller, tree, [0, 1], drafting=0.5)
        assert controller.nodes > 1
    learn(controller, tree, [0], drafting=1000.0)
    assert controller.nodes > 1
    fresh = by((1, 64), (1.0, 1.01))
    learn(fresh, tree, [0], drafting=1000.0)
    assert 0 < rest(fresh) <= 10


def test_a_batch_is_weighed_as_one():
    controller, tree = by((1, 64), (1.0, 1.01)), DraftTree.chain([1, 2, 3])
    controller.budgets([0, 1])
    for _ in range(100):  # one sequence pays for both
        controller.learn([tree, tree], [[0, 1, 2], [0]], 0.8, 1.0)
        assert controller.nodes > 1
    resting = 0
    for _ in range(200):
        controller.learn([tree, tree], [[0, 1], [0]], 0.8, 1.0)
        resting += controller.nodes == 1
    assert resting > 100


@pytest.mark.parametrize("seconds", [1.0001, 64.0])
def test_generation_with_the_automatic_budget_says_what_plain_decoding_says(monkeypatch, tmp_path, seconds):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    keep_costs(key_of(FakeRunner(), None), Costs((1, 64), (1.0, seconds)))
    prompts = [list(b"ab"), list(b"the tree"), list(b"q")]
    plain = generate(FakeRunner(), prompts, drafter=None, max_new_tokens=60, seed=3)
    drafted = generate(FakeRunner(), prompts, drafter="merged", budget="auto", max_new_tokens=60, seed=3)
    assert drafted.tokens == plain.tokens
    nodes = drafted.stats.nodes / sum(drafted.stats.accepted_lengths)
    assert nodes == 1 if seconds == 64.0 else nodes > 4


@pytest.mark.parametrize("kind", [CuttingController, SizingController])
def test_sizes_in_doubt_are_tried_whatever_they_give_and_do_not_count_as_lost(kind):
    running, found = RunningCosts(Costs((1, 64), (1.0, 64.0)), found=False), []
    controller = kind(lambda: running)
    controller._purse = 1e9
    while not found or controller._trial is not None:
        nodes = controller.nodes
        (tree,) = controller.cut([tree_of([0.01] * (nodes - 1))])
        found.append(len(tree))
        learn(controller, tree, [0])
    assert found[:2] == [1, 1] and found.count(8) > 2 and set(found) == {1, 8}, found
    assert not controller._resting


def test_the_first_call_of_a_size_does_not_count():
    """It may be recorded, for each call of generate."""
    running = RunningCosts(Costs((1, 64), (1.0, 2.0)))
    before = running.costs
    for _ in range(3):
        controller = CuttingController(lambda: running)
        for nodes in (1, 8, 32, 5, 3, 2, 7):
            controller.learn([DraftTree.chain(range(nodes))], [[0]], 0.0, 10.0 * nodes)
    assert running.costs == before


def test_several_texts_teach_nothing_about_one():
    controller, chain = by((1, 64), (1.0, 2.0)), DraftTree.chain(range(8))
    before = controller._costs().costs
    for number in range(200):
        controller.learn([chain, chain], [[0], [0, 1]], 0.0, 100.0 if number % 2 else 1.0)
    assert controller._costs().costs == before and controller._trial is None


class Law:
    """A machine with costs of its own and a drafter whose i-th draft is right or not; counts plain rounds."""

    def __init__(self, costs: Costs, rights, drafting: float = 0.02):
        self.costs, self.rights, self.drafting = costs, rights, drafting

    def decode(self, controller: PayingController, tokens: int) -> float:
        """The plain rounds that so many tokens take."""
        said = took = 0
        while said < tokens:
            (nodes,) = controller.budgets([0])
            (tree,) = controller.cut([tree_of([0.9**depth for depth in range(1, nodes)])])
            path = range(1 + min(self.rights(said), len(tree) - 1, tokens - said - 1))
            drafting, verifying = self.drafting * (nodes > 1), float(self.costs(len(tree)))
            controller.learn([tree], [path], drafting, verifying)
            said, took = said + len(path), took + drafting + verifying
        return took


AVX2 = Costs((1, 2, 4, 8, 16, 32), (1.0, 1.05, 1.25, 1.81, 3.5, 7.0))


@pytest.mark.parametrize("tokens", [16, 32, 100, 400])
@pytest.mark.parametrize("costs", [AVX2, ASSUMED, Costs((1, 32), (1.0, 1.1))], ids=["avx2", "vnni", "flat"])
@pytest.mark.parametrize("rights", [lambda place: 0, lambda place: place % 8 == 0, lambda place: 3 * (place > 200)])
@pytest.mark.parametrize("kind", [CuttingController, SizingController])
def test_a_first_start_loses_next_to_nothing_whatever_comes(kind, rights, costs, tokens):
    """The machine is not known and drafts promise much: no text of 16 tokens or more loses much."""
    running = RunningCosts(ASSUMED, found=False)
    assert Law(costs, rights).decode(kind(lambda: running), tokens) < 1.04 * tokens


@pytest.mark.parametrize("kind", [CuttingController, SizingController])
def test_what_pays_is_soon_taken_and_by_the_next_request_from_its_first_round(kind):
    running, experience = RunningCosts(ASSUMED, found=False), Experience()
    law = Law(AVX2, lambda place: 5)
    first = law.decode(kind(lambda: running, experience=experience), 64)
    assert first < 0.75 * 64 and experience.lost < -0.5
    later = [law.decode(kind(lambda: running, experience=experience), 16) for _ in range(3)]
    assert max(later) < 0.65 * 16


def test_a_drafter_that_lost_before_rests_from_the_first_round_of_a_request():
    running, experience = RunningCosts(AVX2), Experience()
    law = Law(AVX2, lambda place: 0, drafting=0.5)
    law.decode(CuttingController(lambda: running, experience=experience), 1000)
    assert experience.lost > 0.3 and 0.4 < experience.drafting < 0.6
    assert law.decode(CuttingController(lambda: running, experience=experience), 15) == pytest.approx(15)


def test_a_dear_drafter_is_not_asked_before_the_purse_can_pay_for_it():
    controller = by((1, 64), (1.0, 1.1), purse=0.5, experience=Experience(drafting=1.0))
    while controller.nodes == 1:
        controller.learn([DraftTree.chain([0])], [[0]], 0.0, 1.0)
    assert controller._purse >= 1.0
