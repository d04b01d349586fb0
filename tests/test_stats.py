"""Figures of a call, on a clock of the test's own."""

import itertools

import pytest

from pyspec.generate import generate
from pyspec.stats import Stats
from tests.helpers.fake_drafters import Oracle
from tests.helpers.fake_runner import FakeRunner


def test_a_phase_takes_what_the_clock_says():
    stats = Stats(seed=0)
    stats.clock = iter([1.0, 3.5, 10.0, 10.25]).__next__
    for _ in range(2):
        with stats.timed("verify"):
            pass
    assert stats.verify_seconds == 2.75 and stats.draft_seconds == 0


def test_a_phase_that_fails_counts():
    stats = Stats(seed=0)
    stats.clock = iter([0.0, 2.0]).__next__
    with pytest.raises(KeyError), stats.timed("commit"):
        raise KeyError
    assert stats.commit_seconds == 2


def test_all_phases_of_generate_are_on_the_models_clock():
    model = FakeRunner()
    model.clock = itertools.count().__next__
    stats = generate(model, [97], drafter=Oracle(model), budget=5, max_new_tokens=21).stats
    # 4 rounds; every phase is one tick long, and so is every gap between two
    assert stats.rounds == 4
    assert (stats.prefill_seconds, stats.verify_seconds, stats.commit_seconds) == (1, 4, 4)
    assert (stats.draft_seconds, stats.accept_seconds) == (8, 5)
    assert stats.total_seconds == 2 * (1 + 4 + 4 + 8 + 5) + 1


def test_lengths_are_counted():
    stats = Stats(seed=0)
    for nodes, tokens in ((5, 3), (1, 1), (4, 3), (2, 1)):
        stats.count(nodes, tokens)
    assert (stats.nodes, stats.accepted_lengths) == (12, [0, 2, 0, 2])
    assert (stats.mean_accepted_length, stats.acceptance_by_depth) == (2.0, [0.5, 0.5])
