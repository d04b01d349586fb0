"""What requests showed of a drafter: means, kept by model, drafter and cache, and read again by the next process."""

import pytest

from pyspec.drafters.model import ModelDrafter
from pyspec.drafters.table_drafter import TableDrafter
from pyspec.drafters.tables.lookup import Lookup
from pyspec.drafters.tables.recycling import Recycling
from pyspec.machine import experience, store
from pyspec.machine.experience import MOST_LOST, Experience, experience_of
from tests.helpers.fake_runner import FakeRunner


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_means_begin_at_what_is_assumed_and_follow_the_rounds():
    found = Experience(drafting=1.0)
    found.learn(0.2, 0.9)
    assert found.drafting == pytest.approx(0.2) and 0 < found.lost < 0.2  # one round is no evidence
    for _ in range(300):
        found.learn(0.4, -0.5)
    assert found.drafting == pytest.approx(0.4, rel=0.02) and found.lost == pytest.approx(-0.5, rel=0.02)
    found.learn(0.4, 1e9)  # a machine that hangs
    assert found.lost < -0.45 + 0.02 * (MOST_LOST - 0.5)


def test_the_next_process_begins_with_it(monkeypatch):
    model, drafter = FakeRunner(), TableDrafter([Lookup(10)])
    first = experience_of(model, drafter)
    assert first == experience_of(model, TableDrafter([Lookup(10)])) and first.rounds == 0
    first.learn_drafts(3.0, 2)
    for _ in range(8):
        first.learn(0.1, -0.4)
    monkeypatch.setattr(experience, "_kept", {})
    again = experience_of(model, drafter)
    assert again is not first and again == first and again.promised == 3.0
    other = experience_of(model, TableDrafter([Lookup(10), Recycling(10)]))
    assert other.rounds == 0 and other.drafting < 0.1
    assert experience_of(model, ModelDrafter(FakeRunner(), model)).drafting == 0.3  # a draft model is dearer


@pytest.mark.parametrize("entry", [None, [], {"rounds": 1}, {name: "x" for name in vars(Experience())}])
def test_what_is_damaged_is_not_believed(entry, monkeypatch):
    model, drafter = FakeRunner(), TableDrafter([Lookup(10)])
    kept = []
    monkeypatch.setattr(store, "read", lambda kind, key: kept.append(kind) or entry)
    monkeypatch.setattr(experience, "_kept", {})
    assert experience_of(model, drafter).rounds == 0 and kept == ["experience"]
