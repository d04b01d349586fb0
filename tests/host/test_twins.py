"""The host module does exactly what its plain-Python twin does."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyspec.host import twins
from pyspec.runners.verified import Verified

host = pytest.importorskip("pyspec._host")

VOCAB = 7  # few tokens, so that n-grams come back


def both(name, *arguments):
    return [getattr(module, name)(*arguments) for module in (host, twins)]


@pytest.mark.parametrize("kinds", [("lookup",), ("token",), ("pair",), ("lookup", "token", "pair")])
@given(
    walk=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=60),
    rounds=st.lists(st.tuples(st.integers(1, 24), st.integers(1, 4)), min_size=1, max_size=6),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=40, deadline=None)
def test_the_same_trees_from_the_same_history(kinds, walk, rounds, seed):
    random = np.random.default_rng(seed)
    sides = []
    for module in (host, twins):
        made = {"lookup": module.NgramIndex(), "token": module.Adjacency(VOCAB, 1), "pair": module.Adjacency(VOCAB, 2)}
        sources = [made[kind] for kind in kinds]
        sides.append((module, sources, module.Estimates([source.priors() for source in sources], 4.0)))
    assert sides[0][2].hits.shape == sides[1][2].hits.shape

    fresh = list(walk)
    for budget, steps in rounds:
        logits = torch.from_numpy(random.normal(scale=3, size=(budget, VOCAB)).astype(np.float32))
        grown = []
        for module, sources, estimates in sides:
            for source in sources:
                if isinstance(source, module.NgramIndex):
                    source.extend(fresh)
            tokens, parents, cells, chances = module.grow(sources, estimates, walk[-6:], budget)
            top_tokens, top_logits = Verified(logits[: len(tokens)]).top_tokens()
            for source in sources:
                if isinstance(source, module.Adjacency):
                    source.update(tokens, parents, ([-1] + walk)[-2], top_tokens, top_logits)
            estimates.learn(tokens, parents, cells, top_tokens)
            grown.append((tokens.tolist(), parents.tolist(), cells.tolist(), chances.tolist()))
        assert grown[0] == grown[1]
        fresh = random.integers(0, VOCAB, steps).tolist()
        walk = walk + fresh
    for name in ("hits", "trials"):
        np.testing.assert_array_equal(getattr(sides[0][2], name), getattr(sides[1][2], name))
    for ours, theirs in zip(sides[0][1], sides[1][1], strict=True):
        assert ours.priors() == theirs.priors()
        if "Adjacency" in type(ours).__name__:
            for name in ("keys", "successors", "levels"):
                np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))


def test_an_update_outside_the_vocabulary_changes_nothing():
    for module in (host, twins):
        adjacency = module.Adjacency(VOCAB, 1)
        tokens, parents = np.array([0, VOCAB]), np.array([-1, 0], np.int32)
        with pytest.raises(ValueError, match=r"tokens\[1\] is outside the vocabulary"):
            adjacency.update(tokens, parents, -1, np.zeros((2, 8), np.int32), np.zeros((2, 8), np.float32))
        assert (adjacency.keys == -1).all() and (adjacency.successors == -1).all()


def test_pairs_of_tokens_share_rows_alike():
    random = np.random.default_rng(0)
    tokens = random.integers(0, 1000, 120_000)  # more pairs than rows
    parents = np.arange(-1, len(tokens) - 1, dtype=np.int32)
    top_tokens = random.integers(0, 1000, (len(tokens), 8)).astype(np.int32)
    tables = both("Adjacency", 1000, 2)
    for table in tables:
        table.update(tokens, parents, -1, top_tokens, np.zeros((len(tokens), 8), np.float32))
    np.testing.assert_array_equal(tables[0].keys, tables[1].keys)
    np.testing.assert_array_equal(tables[0].successors, tables[1].successors)


def test_a_token_with_many_followers_keeps_the_frequent_and_the_recent():
    random = np.random.default_rng(0)
    context = [7] * 3
    for _ in range(300):
        context += [0, int(random.integers(1, 150) if random.random() < 0.7 else random.integers(150, 170))]
    context.append(0)
    trees = []
    for module in (host, twins):
        index = module.NgramIndex()
        index.extend(context)
        estimates = module.Estimates([index.priors()], 16.0)
        trees.append([values.tolist() for values in module.grow([index], estimates, context[-6:], 100)])
    assert trees[0] == trees[1]
    assert twins.NgramIndex.MAX_FOLLOWERS < 150
