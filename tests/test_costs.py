"""Costs and the automatic budget: the best cut against all cuts, what was promised against what was kept, the file."""

import itertools
import json
import sys

import numpy as np
import pytest
import torch
from fake_runner import FakeRunner
from hypothesis import given
from hypothesis import strategies as st

from pyspec import costs, generate
from pyspec.costs import AutoBudget, Budget, Costs, DrawnBudget
from pyspec.trees import DraftTree


def tree_of(chances) -> DraftTree:
    """A chain below a root, with the chances of its drafts."""
    nodes = len(chances) + 1
    return DraftTree(range(nodes), range(-1, nodes - 1), chances=torch.tensor([1.0, *chances]))


def learn(auto: Budget, tree: DraftTree, path, drafting: float = 0.0) -> None:
    """A round of one sequence, drafting taking so much of a verification."""
    auto.learn([tree], [path], drafting, 1.0)


def rest(auto: Budget) -> int:
    """Lets drafting rest as long as it should; the number of rounds."""
    rounds = 0
    while auto._resting:
        learn(auto, DraftTree.chain([0]), [0])
        rounds += 1
    return rounds


def test_costs_lie_on_lines_between_and_beyond_what_was_measured():
    found = Costs((1, 2, 8), (1.0, 1.5, 2.1))
    assert found(np.array([1, 2, 5, 8, 10, 100])) == pytest.approx([1.0, 1.5, 1.8, 2.1, 2.3, 11.3])


falling = st.lists(st.floats(0, 1, width=32), max_size=6).map(lambda chances: sorted(chances, reverse=True))


@given(st.lists(falling, min_size=1, max_size=3), st.lists(st.floats(0, 0.5), min_size=20, max_size=20))
def test_the_cut_is_the_best_of_all_cuts(chances, steps):
    table = Costs(tuple(range(1, 21)), tuple(np.cumsum([1.0, *steps[:19]]).tolist()))
    kept = AutoBudget(table).cut([tree_of(of_tree) for of_tree in chances])

    def rate(counts):
        tokens = sum(1 + sum(of_tree[: count - 1]) for of_tree, count in zip(chances, counts, strict=True))
        return tokens / table(sum(counts))

    best = max(rate(counts) for counts in itertools.product(*(range(1, len(tree) + 2) for tree in chances)))
    assert rate([len(tree) for tree in kept]) == pytest.approx(best, rel=1e-6)


def test_a_free_tree_is_kept_whole_and_a_dear_one_is_left_out():
    tree = tree_of([0.9, 0.5, 0.1])
    assert AutoBudget(Costs((1, 64), (1.0, 1.0001))).cut([tree]) == [tree]
    assert len(AutoBudget(Costs((1, 64), (1.0, 64.0))).cut([tree])[0]) == 1


def test_the_first_nodes_are_the_tree_that_they_would_be_alone():
    parents = [-1, *(node // 3 for node in range(69))]
    tree = DraftTree(range(70), parents, chances=torch.linspace(1, 0, 70))
    for nodes in (1, 31, 32, 33, 64, 65, 70):
        first, alone = tree.first(nodes), DraftTree(range(nodes), parents[:nodes])
        for name in ("tokens", "parents", "depths", "ancestor_bits"):
            assert torch.equal(getattr(first, name), getattr(alone, name)), name
        assert first.ancestor_bits.is_contiguous() and torch.equal(first.chances, tree.chances[:nodes])


def test_a_tree_without_chances_is_kept_whole():
    tree = DraftTree.chain([1, 2, 3])
    assert AutoBudget(Costs((1, 64), (1.0, 64.0))).cut([tree, tree_of([0.1])])[0] is tree


def test_a_drafter_that_promises_too_much_is_believed_less_and_can_earn_it_back():
    auto = AutoBudget(Costs((1, 64), (1.0, 14.0)))  # a draft is worth it from a chance of 0.21 on, and less
    tree = tree_of([0.6, 0.5])
    assert len(auto.cut([tree])[0]) == 3
    for _ in range(40):
        learn(auto, tree, [0])
    assert len(auto.cut([tree])[0]) == 1
    for _ in range(200):  # nothing was tried, so what was held against it fades
        learn(auto, tree.first(1), [0])
    assert len(auto.cut([tree])[0]) == 3


def test_the_next_tree_is_asked_for_about_as_large_as_was_worth_it():
    auto = AutoBudget(Costs((1, 64), (1.0, 64.0)))
    assert auto.nodes == costs.LARGEST
    auto.cut([tree_of([0.1] * 20)])
    assert auto.nodes == costs.FEWEST


def test_drawn_trees_get_the_size_that_paid_before():
    chain = DraftTree.chain(range(9))
    for accepted, fewest, most in [(8, 9, 64), (2, 2, 9), (0, 1, 2)]:
        drawn = DrawnBudget(Costs((1, 64), (1.0, 8.0)))
        assert drawn.cut([chain]) == [chain]
        for _ in range(100):
            learn(drawn, chain, range(1 + accepted))
        assert fewest <= drawn.nodes <= most
        for _ in range(300):  # without trials, what was held against them fades
            learn(drawn, chain.first(1), [0])
        assert 1 < drawn.nodes < 64
    assert DrawnBudget(Costs((1, 64), (1.0, 64.0))).nodes == 1 < DrawnBudget(Costs((1, 64), (1.0, 1.001))).nodes


@pytest.fixture
def may_rest(monkeypatch):
    monkeypatch.setattr(costs, "MOST_LOST", 2.0)


@pytest.mark.parametrize("kind", [AutoBudget, DrawnBudget])
def test_drafting_that_costs_more_than_it_brings_rests_most_of_the_time(may_rest, kind):
    auto, tree = kind(Costs((1, 64), (1.0, 1.01))), DraftTree.chain([1, 2, 3])
    tried = rounds = 0
    while rounds < 3000:  # a round with drafts takes as long as two and a half plain ones and gives two tokens
        learn(auto, tree, [0, 1], drafting=1.5)
        tried, rounds = tried + 1, rounds + 1 + rest(auto)
    assert auto.nodes > 1 and 0.01 < 0.5 * tried / rounds < 0.03
    for _ in range(30):  # it pays again, after a while
        learn(auto, tree, [0, 1, 2], drafting=1.5)
        assert rest(auto) < 60
    learn(auto, tree, [0, 1, 2], drafting=1.5)
    assert auto.nodes > 1


def test_drafting_that_pays_never_rests_and_a_hanging_machine_is_soon_forgotten(may_rest):
    auto, tree = AutoBudget(Costs((1, 64), (1.0, 1.01))), DraftTree.chain([1, 2, 3])
    for _ in range(100):
        learn(auto, tree, [0, 1], drafting=0.5)
        assert auto.nodes > 1
    learn(auto, tree, [0], drafting=1000.0)
    assert auto.nodes > 1
    fresh = AutoBudget(Costs((1, 64), (1.0, 1.01)))
    learn(fresh, tree, [0], drafting=1000.0)
    assert 0 < rest(fresh) <= 10


def test_a_batch_is_weighed_as_one(may_rest):
    auto, tree = AutoBudget(Costs((1, 64), (1.0, 1.01))), DraftTree.chain([1, 2, 3])
    for _ in range(100):  # one sequence pays for both
        auto.learn([tree, tree], [[0, 1, 2], [0]], 0.8, 1.0)
        assert auto.nodes > 1
    resting = 0
    for _ in range(200):
        auto.learn([tree, tree], [[0, 1], [0]], 0.8, 1.0)
        resting += auto.nodes == 1
    assert resting > 100


class SlowRunner(FakeRunner):
    fingerprint = "slow"

    def verify(self, trees):
        self.sizes = [*getattr(self, "sizes", []), len(trees[0])]
        return super().verify(trees)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(costs, "SECONDS", 0.2)
    return tmp_path / "pyspec"


def test_costs_are_measured_once_for_a_machine_and_a_model(folder):
    model = SlowRunner()
    found = costs.costs_of(model)
    assert found.nodes[0] == 1 and len(found.nodes) > 1 and found.seconds == tuple(sorted(found.seconds))
    assert len(json.loads((folder / "costs.json").read_text())) == 1
    model.sizes.clear()
    assert costs.costs_of(model) == found and not model.sizes
    costs.measure_costs(model)
    assert model.sizes


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"KEY": 3}', '{"KEY": {"nodes": [1]}}'])
def test_a_broken_file_only_means_measuring_again(folder, text):
    model = SlowRunner()
    folder.mkdir()
    (folder / "costs.json").write_text(text.replace("KEY", costs._key(model)))
    assert costs.costs_of(model).nodes[0] == 1
    assert costs._key(model) in json.loads((folder / "costs.json").read_text())


def test_a_folder_that_cannot_be_written_to_only_means_measuring_again(folder):
    folder.write_text("a file in its place")
    assert costs.costs_of(SlowRunner()).nodes[0] == 1


def test_a_context_shorter_than_the_largest_tree_is_enough(folder):
    model = SlowRunner()
    model.context_length = 140
    assert max(costs.costs_of(model).nodes) <= 12


@pytest.mark.parametrize("seconds", [1.0001, 64.0])
def test_generation_with_the_automatic_budget_says_what_plain_decoding_says(monkeypatch, seconds):
    monkeypatch.setattr(sys.modules["pyspec.generate"], "costs_of", lambda model, cache: Costs((1, 64), (1.0, seconds)))
    prompts = [list(b"ab"), list(b"the tree"), list(b"q")]
    plain = generate(FakeRunner(), prompts, drafter=None, max_new_tokens=60, seed=3)
    drafted = generate(FakeRunner(), prompts, drafter="merged", budget="auto", max_new_tokens=60, seed=3)
    assert drafted.tokens == plain.tokens
    nodes = drafted.stats.nodes / sum(drafted.stats.accepted_lengths)
    assert nodes == 1 if seconds == 64.0 else nodes > 4
