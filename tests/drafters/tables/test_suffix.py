import numpy as np
import pytest

from pyspec.drafters.table_drafter import TableDrafter
from pyspec.drafters.tables.suffix import Suffix

VOCAB = 100


def drafter(**settings):
    return TableDrafter([Suffix(VOCAB, **settings)], "tiny")


def chain(tree):
    """Tokens of the deepest path, below the root."""
    node, tokens = int(tree.depths.argmax()), []
    while node:
        tokens.insert(0, int(tree.tokens[node]))
        node = int(tree.parents[node])
    return tokens


def test_a_reference_text_is_quoted():
    made = drafter()
    made.read_text(list(range(20, 60)))
    assert chain(made.start([1, 30, 31]).propose([1, 30, 31], 6)) == [32, 33, 34, 35, 36]


def test_earlier_requests_are_known_and_running_ones_too():
    made = drafter()
    first, second = made.start([5, 6, 7, 8]), made.start([9, 6])
    assert chain(second.propose([9, 6], 3)) == [7, 8]
    first.propose([5, 6, 7, 8, 40, 41], 2)
    assert chain(second.propose([9, 6, 7, 8], 3)) == [40, 41]


def test_the_longest_match_comes_first_and_then_the_most_frequent():
    made = drafter()
    for text in ([1, 2, 3, 10], [2, 3, 20], [2, 3, 20], [3, 30]):
        made.read_text(text)
    tree = made.start([1, 2, 3]).propose([1, 2, 3], 4)
    assert [int(tree.tokens[child]) for child in tree.children(0)] == [10, 20, 30]


def test_texts_do_not_run_into_each_other():
    made = drafter()
    made.read_text([1, 2])
    made.read_text([3, 4])
    assert len(made.start([2]).propose([2], 4)) == 1


def test_saved_texts_are_texts(tmp_path):
    saved, loaded = drafter(), drafter()
    for text in ([1, 2, 3], [], [4, 5]):
        saved.read_text(text)
    saved.start([6, 7]).propose([6, 7, 8], 2)
    saved.save(tmp_path / "texts")
    loaded.load(tmp_path / "texts")
    for context in ([1], [4], [6, 7], [3], [5]):
        ours, theirs = (made.start(context).propose(context, 9) for made in (saved, loaded))
        assert ours.tokens.tolist() == theirs.tokens.tolist()
    assert len(loaded.start([3]).propose([3], 4)) == 1


def test_bounded(tmp_path):
    made = drafter(capacity=50)
    for start in range(60):
        made.start([start, start + 1, start + 2])
        made.save(tmp_path / "texts")
        with np.load(tmp_path / "texts") as saved:
            assert len(saved["suffix_texts"]) <= 50
    assert len(made.tables[0].sources[0]) <= 50
    assert len(made.start([0]).propose([0], 4)) == 1  # forgotten
    with pytest.raises(ValueError, match="capacity must be at least 2"):
        drafter(capacity=1)


def test_texts_that_do_not_fit():
    made = drafter()
    with pytest.raises(ValueError, match=r"text tokens must be in \[0, 100\), got 1 to 100"):
        made.read_text([1, 100])
    for _ in range(3):
        made.read_text([])
    assert not made.tables[0]._texts
    assert len(made.start([1]).propose([1], 4)) == 1
