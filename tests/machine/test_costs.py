"""Costs: what is measured, on a machine with hiccups too, and the file that keeps it."""

import json
from collections import Counter

import numpy as np
import pytest

from pyspec import generate
from pyspec.machine import costs
from pyspec.machine.costs import Costs
from tests.helpers.fake_runner import FakeRunner


def test_costs_lie_on_lines_between_and_beyond_what_was_measured():
    found = Costs((1, 2, 8), (1.0, 1.5, 2.1))
    assert found(np.array([1, 2, 5, 8, 10, 100])) == pytest.approx([1.0, 1.5, 1.8, 2.1, 2.3, 11.3])


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
