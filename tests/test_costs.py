"""Costs and the automatic budget: the best cut against all cuts, what was promised against what was kept, the file."""

import itertools
import json
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyspec import costs, generate
from pyspec.costs import AutoBudget, Budget, Costs, DrawnBudget
from pyspec.tree import DraftTree
from tests.helpers.fake_runner import FakeRunner


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


class TimedRunner(FakeRunner):
    """Calls of verify take what `seconds` says of (nodes, earlier calls of that size), by a clock of its own."""

    fingerprint = "timed"

    def __init__(self, seconds=lambda nodes, calls: 0.01 + 0.001 * nodes):
        super().__init__()
        self.seconds, self.calls, self.now = seconds, Counter(), 0.0

    def verify(self, trees):
        nodes = sum(map(len, trees.values()))
        self.now += self.seconds(nodes, self.calls[nodes])
        self.calls[nodes] += 1
        return super().verify(trees)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "pyspec"


@pytest.fixture
def measure(monkeypatch, folder):
    """costs_of, by the runner's clock."""

    def measure(model):
        monkeypatch.setattr(costs.time, "perf_counter", lambda: model.now)
        return costs.costs_of(model)

    return measure


def test_costs_are_measured_once_for_a_machine_and_a_model(folder, measure):
    model = TimedRunner()
    found = measure(model)
    assert found.nodes == tuple(sorted(costs.SIZES))
    assert found.seconds == pytest.approx([0.01 + 0.001 * nodes for nodes in found.nodes])
    assert len(json.loads((folder / "costs.json").read_text())) == 1
    model.calls.clear()
    assert measure(model) == found and not model.calls
    costs.measure_costs(model)
    assert model.calls


@pytest.mark.parametrize("first", [2.0, 100.0, 1e5])
def test_a_first_call_of_any_size_that_is_slow_does_not_count(measure, first):
    model = TimedRunner(lambda nodes, calls: first if calls == 0 else 0.01 + 0.001 * nodes)
    found = measure(model)
    assert found.seconds == pytest.approx([0.01 + 0.001 * nodes for nodes in found.nodes])
    assert found.nodes == tuple(sorted(costs.SIZES)) and min(model.calls.values()) >= 3


def test_generation_with_a_model_whose_first_calls_are_slow(measure, monkeypatch):
    model = TimedRunner(lambda nodes, calls: 30.0 if calls == 0 else 0.01 + 0.001 * nodes)
    monkeypatch.setattr(costs.time, "perf_counter", lambda: model.now)
    for _ in range(2):  # the second time from the file
        text = generate(model, list(b"the tree"), budget="auto", max_new_tokens=30).tokens
        assert text == generate(FakeRunner(), list(b"the tree"), drafter=None, max_new_tokens=30).tokens


def test_of_a_slow_model_fewer_sizes_are_timed_but_each_twice(measure):
    model = TimedRunner(lambda nodes, calls: 20.0 + nodes)
    found = measure(model)
    assert found.nodes == (1, 16) and found.seconds == (21.0, 36.0)
    assert model.calls == {1: 3, 16: 3}


def test_a_hiccup_of_the_machine_is_measured_away(measure):
    """Of the plain step, which would make every tree look free."""
    model = TimedRunner(lambda nodes, calls: 9.0 if nodes == 1 and calls in (1, 2) else 0.5 + 0.01 * nodes)
    found = measure(model)
    assert found.seconds == pytest.approx([0.5 + 0.01 * nodes for nodes in found.nodes])


def test_costs_that_make_no_sense_are_used_once_and_not_kept(folder, measure):
    found = measure(TimedRunner(lambda nodes, calls: 1.0 / nodes))
    assert found.seconds == (1.0,) * len(found.nodes)
    assert not (folder / "costs.json").exists()
    dear = measure(TimedRunner(lambda nodes, calls: 0.001 * nodes**2))
    assert dear.seconds == pytest.approx([0.001 * nodes for nodes in dear.nodes])


@pytest.mark.parametrize(
    "nodes, seconds",
    [
        ([], []),
        ([1], [0.1]),
        ([1, 2], [0.1]),
        ([2, 4], [0.1, 0.2]),
        ([1, 4, 2], [0.1, 0.2, 0.3]),
        ([1, 2], [0.2, 0.1]),
        ([1, 2, 4], [0.1, 0.15, 0.12]),
        ([1, 2], [0.1, 0.3]),
        ([1, 2], [0.0, 0.0]),
        ([1, 2], [-0.1, 0.1]),
        ([1, 2], [0.1, float("nan")]),
        ([1, 2], [float("inf"), float("inf")]),
        ([1, 2], [1e9, 1e9]),
        (["1", "2"], [0.1, 0.2]),
        ([1, 2], ["0.1", "0.2"]),
        (3, 4),
        (None, None),
    ],
)
def test_a_bad_table_is_refused_and_a_kept_one_measured_anew(folder, measure, nodes, seconds):
    model = TimedRunner()
    folder.mkdir()
    (folder / "costs.json").write_text(json.dumps({costs._key(model): {"nodes": nodes, "seconds": seconds}}))
    assert measure(model).nodes == tuple(sorted(costs.SIZES))
    assert json.loads((folder / "costs.json").read_text())[costs._key(model)]["nodes"] == sorted(costs.SIZES)
    with pytest.raises((ValueError, TypeError)):
        Costs(tuple(nodes), tuple(seconds))


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"KEY": 3}', '{"KEY": {"nodes": [1]}}'])
def test_a_broken_file_only_means_measuring_again(folder, measure, text):
    model = TimedRunner()
    folder.mkdir()
    (folder / "costs.json").write_text(text.replace("KEY", costs._key(model)))
    assert measure(model).nodes[0] == 1
    assert costs._key(model) in json.loads((folder / "costs.json").read_text())


def test_a_folder_that_cannot_be_written_to_only_means_measuring_again(folder, measure):
    folder.write_text("a file in its place")
    assert measure(TimedRunner()).nodes[0] == 1


@pytest.mark.parametrize("context_length", [*range(1, 9), 140])
def test_a_context_shorter_than_the_largest_tree_is_enough(measure, context_length):
    model = TimedRunner()
    model.context_length = context_length
    assert max(measure(model).nodes) <= max(2, context_length - 128)


@pytest.mark.parametrize("seconds", [1.0001, 64.0])
def test_generation_with_the_automatic_budget_says_what_plain_decoding_says(monkeypatch, seconds):
    monkeypatch.setattr(sys.modules["pyspec.generate"], "costs_of", lambda model, cache: Costs((1, 64), (1.0, seconds)))
    prompts = [list(b"ab"), list(b"the tree"), list(b"q")]
    plain = generate(FakeRunner(), prompts, drafter=None, max_new_tokens=60, seed=3)
    drafted = generate(FakeRunner(), prompts, drafter="merged", budget="auto", max_new_tokens=60, seed=3)
    assert drafted.tokens == plain.tokens
    nodes = drafted.stats.nodes / sum(drafted.stats.accepted_lengths)
    assert nodes == 1 if seconds == 64.0 else nodes > 4
