"""Costs: what is measured, on a machine with hiccups too, and the file that keeps it."""

import json
from collections import Counter

import numpy as np
import pytest

from pyspec import generate
from pyspec.machine import costs, store
from pyspec.machine.costs import Costs, kept_costs, key_of, measure_costs
from tests.helpers.fake_runner import FakeRunner


def test_costs_lie_on_lines_between_and_beyond_what_was_measured():
    found = Costs((1, 2, 8), (1.0, 1.5, 2.1))
    assert found(np.array([1, 2, 5, 8, 10, 100])) == pytest.approx([1.0, 1.5, 1.8, 2.1, 2.3, 11.3])


class TimedRunner(FakeRunner):
    """Calls of verify take what `law` says of (nodes, earlier calls of that size)."""

    fingerprint = "timed"

    def __init__(self, law=lambda nodes, calls: 0.01 + 0.001 * nodes):
        super().__init__()
        self.law, self.calls = law, Counter()

    def seconds(self, nodes):
        self.calls[nodes] += 1
        return self.law(nodes, self.calls[nodes] - 1)


def costs_of(model):
    """What is kept, or else measured."""
    return kept_costs(key_of(model, None)) or measure_costs(model)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "pyspec"


def test_costs_are_measured_once_for_a_machine_and_a_model(folder):
    model = TimedRunner()
    found = costs_of(model)
    assert found.nodes == tuple(sorted(costs.SIZES))
    assert found.seconds == pytest.approx([0.01 + 0.001 * nodes for nodes in found.nodes])
    assert len(list(folder.glob("costs-*"))) == 1
    model.calls.clear()
    assert costs_of(model) == found and not model.calls
    measure_costs(model)
    assert model.calls


def test_every_tree_has_other_tokens():
    """A model with experts reads those of all nodes, and finds none of them in the cache of the last call."""
    seen = []

    class Recording(TimedRunner):
        def verify(self, trees):
            seen.append(trees[0].tokens.tolist())
            return super().verify(trees)

    measure_costs(Recording())
    large = [tokens for tokens in seen if len(tokens) >= 16]
    assert all(len(set(tokens)) > 0.8 * len(tokens) for tokens in large)
    assert len(set(map(tuple, large))) == len(large) > 4


@pytest.mark.parametrize("first", [2.0, 100.0, 1e5])
def test_a_first_call_of_any_size_that_is_slow_does_not_count(first):
    model = TimedRunner(lambda nodes, calls: first if calls == 0 else 0.01 + 0.001 * nodes)
    found = costs_of(model)
    assert found.seconds == pytest.approx([0.01 + 0.001 * nodes for nodes in found.nodes])
    assert found.nodes == tuple(sorted(costs.SIZES)) and min(model.calls.values()) >= 3


def test_generation_with_a_model_whose_first_calls_are_slow():
    model = TimedRunner(lambda nodes, calls: 30.0 if calls == 0 else 0.01 + 0.001 * nodes)
    for _ in range(2):  # the second time from the file
        text = generate(model, list(b"the tree"), budget="auto", max_new_tokens=30).tokens
        assert text == generate(FakeRunner(), list(b"the tree"), drafter=None, max_new_tokens=30).tokens


def test_of_a_slow_model_fewer_sizes_are_timed_but_each_twice():
    model = TimedRunner(lambda nodes, calls: 20.0 + nodes)
    found = costs_of(model)
    assert found.nodes == (1, 16) and found.seconds == (21.0, 36.0)
    assert model.calls == {1: 3, 16: 3}


def test_a_hiccup_of_the_machine_is_measured_away():
    """Of the plain step, which would make every tree look free."""
    model = TimedRunner(lambda nodes, calls: 9.0 if nodes == 1 and calls in (1, 2) else 0.5 + 0.01 * nodes)
    found = costs_of(model)
    assert found.seconds == pytest.approx([0.5 + 0.01 * nodes for nodes in found.nodes])


def test_a_neighbour_that_has_the_processor_most_of_the_time_is_measured_away():
    model = TimedRunner(lambda nodes, calls: (0.05 if calls % 4 else 0.01) + 0.001 * nodes)
    found = costs_of(model)
    assert found.seconds == pytest.approx([0.01 + 0.001 * nodes for nodes in found.nodes])


def test_costs_that_make_no_sense_are_used_once_and_not_kept(folder):
    found = costs_of(TimedRunner(lambda nodes, calls: 1.0 / nodes))
    assert found.seconds == (1.0,) * len(found.nodes)
    assert not list(folder.glob("costs-*"))
    dear = costs_of(TimedRunner(lambda nodes, calls: 0.001 * nodes**2))
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
def test_a_bad_table_is_refused_and_a_kept_one_measured_anew(folder, nodes, seconds):
    model = TimedRunner()
    found = costs_of(model)
    (file,) = folder.glob("costs-*")
    key = json.loads(file.read_text())["key"]
    store.keep("costs", key, [nodes, seconds])
    assert costs_of(model).nodes == found.nodes and store.read("costs", key)[0] == list(found.nodes)
    with pytest.raises((ValueError, TypeError)):
        Costs(tuple(nodes), tuple(seconds))


@pytest.mark.parametrize("entry", [None, 3, [], [1], {"nodes": [1]}])
def test_a_damaged_entry_only_means_measuring_again(folder, entry):
    model = TimedRunner()
    found = costs_of(model)
    (file,) = folder.glob("costs-*")
    store.keep("costs", json.loads(file.read_text())["key"], entry)
    model.calls.clear()
    assert costs_of(model).nodes == found.nodes and model.calls


def test_a_folder_that_cannot_be_written_to_only_means_measuring_again(folder):
    folder.write_text("a file in its place")
    assert costs_of(TimedRunner()).nodes[0] == 1


@pytest.mark.parametrize("context_length", [*range(1, 9), 140])
def test_a_context_shorter_than_the_largest_tree_is_enough(context_length):
    model = TimedRunner()
    model.context_length = context_length
    assert max(costs_of(model).nodes) <= max(2, context_length - 128)
