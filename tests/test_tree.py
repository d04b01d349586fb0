import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyspec.host import host, twins
from pyspec.tree import DraftTree

LAYOUTS = list(dict.fromkeys((host().tree_layout, twins.tree_layout)))  # one without the compiled module


@st.composite
def tree_parents(draw, most=80):
    nodes = draw(st.integers(1, most))
    return [-1] + [draw(st.integers(0, node - 1)) for node in range(1, nodes)]


def ancestors(parents, node):
    found = {node}
    while parents[node] >= 0:
        node = parents[node]
        found.add(node)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@given(parents=tree_parents())
def test_layout_is_what_the_parents_say(layout, parents):
    depths, bits = layout(np.array(parents, np.int32))
    assert depths.dtype == bits.dtype == np.int32
    assert bits.shape == (len(parents), (len(parents) + 31) // 32)
    words = bits.view(np.uint32).tolist()
    for node in range(len(parents)):
        expected = ancestors(parents, node)
        assert {bit for bit in range(32 * bits.shape[1]) if words[node][bit // 32] >> bit % 32 & 1} == expected
        assert depths[node] == len(expected) - 1


def test_a_tree_keeps_its_fields():
    tree = DraftTree([5, 6, 7, 8], [-1, 0, 0, 2])
    assert tree.tokens.dtype == np.int64 and tree.tokens.tolist() == [5, 6, 7, 8]
    assert tree.parents.dtype == np.int32 and tree.parents.tolist() == [-1, 0, 0, 2]
    assert tree.depths.tolist() == [0, 1, 1, 2]
    assert tree.ancestor_bits.tolist() == [[1], [3], [5], [13]]
    assert [tree.children(node) for node in range(4)] == [[1, 2], [], [3], []]
    assert len(tree) == 4 and tree.q is None


def test_a_chain_is_a_tree():
    chain = DraftTree.chain([3, 1, 2])
    assert chain.parents.tolist() == [-1, 0, 1]
    assert chain.depths.tolist() == [0, 1, 2]
    assert chain.ancestor_bits.tolist() == [[1], [3], [7]]


def test_the_last_bit_of_a_word_is_the_sign():
    assert DraftTree.chain(range(33)).ancestor_bits[-1].tolist() == [-1, 1]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("parents", "words"),
    [
        ([0], r"parents\[0\] must be -1"),
        ([-1, -1], r"parents\[1\] must be in \[0, 1\)"),
        ([-1, 0, 2], r"parents\[2\] must be in \[0, 2\)"),
        ([-1, 2, 0], r"parents\[1\] must be in \[0, 1\)"),
    ],
)
def test_parents_come_before_children(layout, parents, words):
    with pytest.raises(ValueError, match=words):
        layout(np.array(parents, np.int32))
    with pytest.raises(ValueError, match=words):
        DraftTree(range(len(parents)), parents)


@pytest.mark.parametrize(("tokens", "parents"), [([], []), ([1, 2], [-1]), ([[1]], [[-1]])])
def test_sizes_must_fit(tokens, parents):
    with pytest.raises(ValueError, match="tokens and parents must be 1-D"):
        DraftTree(tokens, parents)


def test_the_likeliest_path_takes_the_likeliest_children():
    chances = torch.tensor([1.0, 0.4, 0.5, 0.3, 0.2, 0.1])
    path = DraftTree([9, 1, 2, 3, 4, 5], [-1, 0, 0, 1, 2, 2], chances=chances).likeliest_path()
    assert path.tokens.tolist() == [9, 2, 4] and path.parents.tolist() == [-1, 0, 1]
    assert path.chances.tolist() == pytest.approx([1.0, 0.5, 0.2])
    assert DraftTree([9, 1, 2], [-1, 0, 0]).likeliest_path().tokens.tolist() == [9, 1]
    assert DraftTree.chain([4]).likeliest_path().tokens.tolist() == [4]


def test_the_first_nodes_are_the_tree_that_they_would_be_alone():
    parents = [-1, *(node // 3 for node in range(69))]
    tree = DraftTree(range(70), parents, chances=torch.linspace(1, 0, 70))
    for nodes in (1, 31, 32, 33, 64, 65, 70):
        first, alone = tree.first(nodes), DraftTree(range(nodes), parents[:nodes])
        for name in ("tokens", "parents", "depths", "ancestor_bits"):
            assert np.array_equal(getattr(first, name), getattr(alone, name)), name
        assert first.ancestor_bits.flags.c_contiguous and np.array_equal(first.chances, tree.chances[:nodes])
