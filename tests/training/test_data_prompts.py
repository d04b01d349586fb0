"""Prompts about topics: what is read of WordNet and of Python's sources, and that every template can be filled."""

import numpy as np
import pytest

from training import data_prompts
from training.data_prompts import Function, Topics, Word, words_of_wordnet

MODULE = '''
def public(a):
    """Gives what was given to it, after it has had a thorough look at every bit of it."""
    return a


def _private():
    """Gives what was given to it, after it has had a thorough look at every bit of it."""


class Class:
    """A class."""

    def method(self):
        """Does a number of things that are too many to be told in a line shorter than this."""
'''


@pytest.fixture(autouse=True)
def few_functions(monkeypatch):
    monkeypatch.setattr(
        data_prompts, "functions_of_python", lambda: [Function("a.b", "Gives {x}.", "def b():\n x\n y")]
    )


def test_words_of_wordnet(tmp_path):
    (tmp_path / "cntlist.rev").write_text("tree%1:20:00:: 1 7\nhot_dog%1:13:01:: 1 2\n")
    licence = "  1 This software and database is being provided\n"
    records = [
        '00001 20 n 01 tree 0 001 @ 2 n 0000 | a tall plant; "an oak is a tree"  ',
        "00002 13 n 02 hot_dog 0 frank 0 000 | a sausage in a bun  ",
        "00003 25 n 01 tree 0 000 | a figure that branches  ",
        "00004 05 n 01 genus_Abies 0 000 | firs  ",
    ]
    (tmp_path / "data.noun").write_text(licence + "\n".join(records) + "\n")
    assert words_of_wordnet(tmp_path) == [Word("tree", "a tall plant"), Word("hot dog", "a sausage in a bun")]
    with pytest.raises(FileNotFoundError):
        words_of_wordnet(tmp_path / "none")


def test_functions_of_a_module():
    found = data_prompts._functions_of("module", MODULE)
    assert [function.name for function in found] == ["module.public", "module.Class.method"]
    assert found[0].source.startswith("def public(a):") and found[0].source.endswith("return a")


def test_every_template_can_be_filled():
    topics, random = Topics([Word("tree", "a {plant}")]), np.random.default_rng(0)
    asked = {topics.question(random) for _ in range(1500)}
    heads = [*data_prompts.ABOUT_WORDS, *data_prompts.ABOUT_PYTHON, *data_prompts.SUMS]
    for head in heads:
        beginning = head.split("{")[0]
        assert any(question.startswith(beginning) for question in asked), head
    assert any("a {plant}" in question for question in asked)


def test_prompts_are_those_of_the_seed():
    topics = Topics([])
    asked = [[topics.question(random) for _ in range(40)] for random in map(np.random.default_rng, (1, 1, 2))]
    assert asked[0] == asked[1] != asked[2]
    assert not any("{" in question and "{x}" not in question for question in asked[0])
    assert topics.beginning(np.random.default_rng(0)).startswith("def b():\n")
