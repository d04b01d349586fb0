from tests.helpers.table_drafters import drafter_of


def propose(context, budget):
    return drafter_of("lookup", 100).start(context).propose(context, budget)


def paths(tree):
    """Each node's tokens from below the root on, in the order of the tree."""
    found = [()]
    for token, parent in list(zip(tree.tokens.tolist(), tree.parents.tolist(), strict=True))[1:]:
        found.append((*found[parent], token))
    return found[1:]


def test_a_repeated_phrase_is_continued():
    assert paths(propose([1, 2, 3, 4, 5, 9, 1, 2], 5)) == [(3,), (3, 4), (3, 4, 5), (3, 4, 5, 9)]


def test_several_matches_are_one_tree_the_most_recent_first():
    context = [7, 1, 2, 3, 7, 4, 5, 6, 7]
    found = paths(propose(context, 9))
    assert found[0] == (4,) and (1,) in found
    assert (4, 5) in found and (1, 2) in found


def test_the_most_frequent_comes_before_the_most_recent():
    assert paths(propose([7, 1, 0, 7, 1, 4, 7, 2, 5, 7], 2)) == [(1,)]


def test_a_longer_match_comes_first_and_a_shorter_one_adds_to_it():
    context = [5, 6, 7, 1, 0, 9, 7, 2, 0, 8, 7, 3, 0, 5, 6, 7]
    found = paths(propose(context, 16))
    assert found[0] == (1,)
    assert {(2,), (3,)} < set(found)


def test_a_match_may_run_on_into_what_was_drafted():
    assert paths(propose([1, 2, 1, 2, 1], 6)) == [(2,), (2, 1), (2, 1, 2), (2, 1, 2, 1), (2, 1, 2, 1, 2)]


def test_new_words_are_followed_by_frequent_ones():
    found = paths(propose([1, 8, 2, 8, 3, 9], 4))
    assert found[0] == (8,)
    assert paths(propose([1], 2)) == [(1,)]


def test_sequences_do_not_see_each_other():
    drafter = drafter_of("lookup", 100)
    drafter.start([1, 2, 3, 1])
    assert set(drafter.start([1]).propose([1], 16).tokens.tolist()) == {1}
