"""Several drafters that take turns: the text stays, all of them learn, and the best is found and kept."""

import pytest

from pyspec import generate
from pyspec.controllers.best_arm import BestArm
from pyspec.drafters.several import Several
from pyspec.drafters.table_drafter import TableDrafter
from pyspec.drafters.tables.lookup import Lookup
from pyspec.machine.experience import experience_of
from tests.helpers.fake_drafters import AlwaysWrong, Oracle
from tests.helpers.fake_runner import FakeRunner

PROMPT = list(b"the tree")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def oracles(model):
    return [AlwaysWrong(model), Oracle(model), AlwaysWrong(model)]


@pytest.mark.parametrize(
    "asked", [{}, {"budget": 6}, {"controller": "best_arm"}, {"controller": "best_arm+heuristic"}], ids=str
)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_texts_are_those_of_plain_decoding(asked, temperature):
    settings = {"max_new_tokens": 60, "temperature": temperature, "seed": 2}
    prompts = [PROMPT, list(b"ab")]
    model = FakeRunner()
    text = generate(model, prompts, drafter=["merged", Oracle(model), "suffix"], **asked, **settings)
    assert text.tokens == generate(FakeRunner(), prompts, drafter=None, **settings).tokens


def test_the_best_is_taken_most_and_all_learn():
    model = FakeRunner()
    drafters = oracles(model)
    text = generate(model, PROMPT, drafter=drafters, budget=6, max_new_tokens=300)
    assert text.stats.mean_accepted_length > 4
    seen = [len(drafter.observed) for drafter in drafters]
    assert seen[0] == seen[1] == seen[2] > text.stats.rounds
    lost = [experience_of(model, drafter).lost for drafter in drafters]
    assert lost[1] < -1


def test_the_next_request_begins_with_the_best():
    model = FakeRunner()
    drafters = [Oracle(model), TableDrafter([Lookup(model.vocab_size)])]
    generate(model, PROMPT, drafter=drafters, budget=6, max_new_tokens=100)
    controller = BestArm(model, Several(drafters), None, 8)
    started = Several(drafters).start(PROMPT)
    controller.start(0, started)
    assert controller.budgets([0]) == [8] and started.arm == controller.arm == 0


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: [Oracle(None)], "drafters must be two or more, got 1"),
        (lambda: [TableDrafter([Lookup(size)]) for size in (5, 6)], "one vocabulary, got"),
        (lambda: [Oracle(None), drawing()], "must choose their drafts to take turns, but a Draws draws them"),
        (lambda: [tapping((1, 2)), tapping((1, 3))], "must read the same layers"),
    ],
)
def test_what_cannot_take_turns_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        generate(FakeRunner(), PROMPT, drafter=make())


def test_one_drafter_is_nothing_to_choose_from():
    model = FakeRunner()
    with pytest.raises(ValueError, match="a list of drafters to choose from, got one Oracle"):
        generate(model, PROMPT, drafter=Oracle(model), controller="best_arm")
    with pytest.raises(ValueError, match="drafter must be one of .*, got 'none such'"):
        generate(model, PROMPT, drafter=["merged", "none such"])


def drawing():
    class Draws(Oracle):
        proposal = "sampled"

    return Draws(None)


def tapping(layers):
    drafter = Oracle(None)
    drafter.taps = layers
    return drafter
