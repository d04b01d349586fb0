"""StateCache: paths that are kept or folded, with the bits of plain decoding; and how the history is chosen."""

import random

import pytest
import torch

import pyspec.caches.history
from pyspec import DraftTree
from pyspec.caches import StateCache
from pyspec.caches.history import ACCEPTED, MOST_KEPT, best_history, history_for, measured_history
from pyspec.ops import causal_conv, selective_state

SEQUENCES, CHANNELS, STATES, TAPS = 3, 32, 16, 4


class Layer:
    """One layer's recurrence and convolution on a cache."""

    def __init__(self, history: int):
        generator = torch.Generator().manual_seed(0)
        self.A, self.taps = -torch.rand(2, generator=generator).exp(), torch.randn(TAPS, CHANNELS, generator=generator)
        sizes = {"channels": CHANNELS, "state_size": STATES, "taps": TAPS, "conv_channels": CHANNELS}
        width = CHANNELS + 2 + STATES
        device = torch.device("cpu")
        self.cache = StateCache(1, SEQUENCES, **sizes, record_width=width, device=device, history=history)

    def run(self, trees, places, advances, inputs):
        """The two outputs of the round; what is not recorded is NaN before it."""
        x, dt, B, C = inputs
        cache = self.cache
        round = cache.round(trees, places, advances)
        for record in (cache.records, cache.conv_records):
            seen = torch.zeros(record.shape[1:4], dtype=torch.bool)
            for place in range(SEQUENCES):
                seen[cache._halves[place], place, cache._paths[place]] = True
            record[0][~seen] = torch.nan
        y = selective_state(cache.states[0], cache.records[0], x, dt, self.A, B, C, round)
        out = causal_conv(cache.windows[0], cache.conv_records[0], x, self.taps, None, round)
        cache.done(places, advances)
        return y, out


def random_inputs(rows, generator):
    return [torch.randn(rows, size, generator=generator) for size in (CHANNELS, 2, STATES, STATES)]


def random_tree(rng, size):
    return DraftTree([0] * size, [-1] + [rng.randrange(max(0, node - 3), node) for node in range(1, size)])


@pytest.mark.parametrize("history", [0, 1, 3, 8, 40])
def test_any_history_has_the_bits_of_folding_every_round(history):
    """Random trees, paths and rounds that commit nothing; states are compared whenever all was folded."""
    kept, folded = Layer(history), Layer(0)
    rng, generator, stored = random.Random(history), torch.Generator().manual_seed(1), 0
    for turn in range(120):
        places = rng.sample(range(SEQUENCES), rng.choice([1, 2, 3]))
        trees = [random_tree(rng, rng.choice([1, 2, 6])) for _ in places]
        advances = [turn % 30 == 7] * len(places)
        if advances[0]:
            trees = [DraftTree.chain([0] * len(tree)) for tree in trees]
        inputs = random_inputs(sum(map(len, trees)), generator)
        before = kept.cache.states.clone()
        found = kept.run(trees, places, advances, inputs)
        expected = folded.run(trees, places, advances, inputs)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True)), turn
        stored += not torch.equal(before, kept.cache.states)
        for place, tree, advance in zip(places, trees, advances, strict=True):
            if not kept.cache._paths[place] and not folded.cache._paths[place]:
                assert torch.equal(kept.cache.states[:, place], folded.cache.states[:, place])
                assert torch.equal(kept.cache.windows[:, place], folded.cache.windows[:, place])
            if advance or rng.random() < 0.2:
                continue
            node, path, parents = rng.randrange(len(tree)), [], tree.parents.tolist()
            while node >= 0:
                path.insert(0, node)
                node = parents[node]
            kept.cache.commit(place, path)
            folded.cache.commit(place, path)
    assert kept.cache.lengths == folded.cache.lengths
    assert stored > 60 if history == 0 else stored < 60 or history == 1
    ends = [DraftTree.chain([0])] * SEQUENCES, range(SEQUENCES), [True] * SEQUENCES
    inputs = random_inputs(SEQUENCES, generator)
    for layer in (kept, folded):  # a chain that advances folds what was kept
        layer.run(*ends, inputs)
    assert torch.equal(kept.cache.states, folded.cache.states)
    assert torch.equal(kept.cache.windows, folded.cache.windows)


def test_a_path_is_folded_exactly_when_the_next_tree_would_not_fit():
    layer, generator = Layer(100), torch.Generator().manual_seed(0)
    layer.cache._reserve(16)
    chain = DraftTree.chain([0] * 4)
    layer.cache._reserve = lambda nodes: None  # the record stays at 16 nodes
    ends = []
    for _ in range(6):
        before = layer.cache.states.clone()
        layer.run([chain], [1], [False], random_inputs(4, generator))
        ends.append(torch.equal(layer.cache.states, before))
        layer.cache.commit(1, range(4))
    # the first has nothing to fold; 4 + 4, 8 + 4 and 12 + 4 fit; 16 + 4 do not
    assert ends == [True, True, True, True, False, True]


def test_the_history_is_what_rounds_cost_least_with():
    fold, step = 10.0, 1.0
    assert best_history(lambda kept: kept * step, lambda kept: kept * step + fold) == 2 * ACCEPTED
    assert best_history(lambda kept: kept * step, lambda kept: kept * step) == 0
    assert best_history(lambda kept: 0.0, lambda kept: fold) == MOST_KEPT


def test_measuring_leaves_a_new_cache_as_it_is():
    cache = StateCache(
        2, 5, channels=32, state_size=16, taps=4, conv_channels=64, record_width=50, device=torch.device("cpu")
    )
    assert 0 <= measured_history(cache, [-torch.ones(2)] * 2, 2, 1) <= MOST_KEPT
    assert not cache.states.any() and not cache.windows.any() and cache.lengths == [0] * 5
    assert history_for(cache, [-torch.ones(2)] * 2, 2, 1) == history_for(cache, [-torch.ones(2)] * 2, 2, 1)
    one = StateCache(
        2, 1, channels=32, state_size=16, taps=4, conv_channels=64, record_width=50, device=torch.device("cpu")
    )
    assert history_for(one, [-torch.ones(2)] * 2, 2, 1) == 0


def test_a_measured_history_is_kept(monkeypatch):
    sizes = {"channels": 16, "state_size": 16, "taps": 2, "conv_channels": 16, "record_width": 33}
    cache, found = StateCache(1, 6, **sizes, device=torch.device("cpu")), iter([9, 3])
    monkeypatch.setattr(pyspec.caches.history, "measured_history", lambda *arguments: next(found))
    for _ in range(2):
        assert history_for(cache, [-torch.ones(1)], 1, 1) == 9
    other = StateCache(1, 7, **sizes, device=torch.device("cpu"))
    assert history_for(other, [-torch.ones(1)], 1, 1) == 3
