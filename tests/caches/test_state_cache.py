"""StateCache: rounds of trees with the bits of steps from token to token, and the shape of its records."""

import random

import torch

from pyspec import DraftTree
from pyspec.caches import StateCache
from pyspec.ops import Round, causal_conv, selective_state

SEQUENCES, CHANNELS, STATES, TAPS = 3, 32, 16, 4


class Layer:
    """One layer's recurrence and convolution on a cache."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.A, self.taps = -torch.rand(2, generator=generator).exp(), torch.randn(TAPS, CHANNELS, generator=generator)
        sizes = {"channels": CHANNELS, "state_size": STATES, "taps": TAPS, "conv_channels": CHANNELS}
        width = CHANNELS + 2 + STATES
        self.cache = StateCache(1, SEQUENCES, **sizes, record_width=width, device=torch.device("cpu"))

    def run(self, trees, sequences, advances, inputs):
        """The two outputs of the round; what is not recorded is NaN before it."""
        x, dt, B, C = inputs
        cache = self.cache
        by_slot = dict(zip(sequences, trees, strict=True))
        moving = [sequence for sequence, moves in zip(sequences, advances, strict=True) if moves]
        paths, halves = cache.plan(by_slot, moving)
        paths, halves = ([values[sequence] for sequence in sequences] for values in (paths, halves))
        round = Round.of(trees, sequences, paths, halves, advances=advances)
        for record in (cache.records, cache.conv_records):
            seen = torch.zeros(record.shape[1:4], dtype=torch.bool)
            for sequence in range(SEQUENCES):
                seen[cache._halves[sequence], sequence, cache._paths[sequence]] = True
            record[0][~seen] = torch.nan
        y = selective_state(cache.states[0], cache.records[0], x, dt, self.A, B, C, round)
        out = causal_conv(cache.windows[0], cache.conv_records[0], x, self.taps, None, round)
        cache.done(by_slot, moving)
        return y, out


def random_inputs(rows, generator):
    return [torch.randn(rows, size, generator=generator) for size in (CHANNELS, 2, STATES, STATES)]


def random_tree(rng, size):
    return DraftTree([0] * size, [-1] + [rng.randrange(max(0, node - 3), node) for node in range(1, size)])


def random_path(rng, tree):
    node, path, parents = rng.randrange(len(tree)), [], tree.parents.tolist()
    while node >= 0:
        path.insert(0, node)
        node = parents[node]
    return path


def test_rounds_of_trees_have_the_bits_of_steps():
    """Random trees and paths, chains that advance, rounds that accept nothing, and sequences that sit out."""
    rounds, steps = Layer(), Layer()
    rng, generator = random.Random(0), torch.Generator().manual_seed(1)
    for turn in range(60):
        sequences = rng.sample(range(SEQUENCES), rng.choice([1, 2, 3]))
        advance = turn % 20 == 7
        sizes = [rng.choice([1, 2, 6]) for _ in sequences]
        trees = [DraftTree.chain([0] * size) if advance else random_tree(rng, size) for size in sizes]
        inputs = random_inputs(sum(sizes), generator)
        found = rounds.run(trees, sequences, [advance] * len(sequences), inputs)
        first = 0
        for sequence, tree in zip(sequences, trees, strict=True):
            path = range(len(tree)) if advance else random_path(rng, tree) if rng.random() < 0.8 else []
            for node in path:
                row = [values[first + node, None] for values in inputs]
                expected = steps.run([DraftTree.chain([0])], [sequence], [True], row)
                assert all(torch.equal(y[first + node], step[0]) for y, step in zip(found, expected, strict=True)), turn
            if not advance:
                rounds.cache.commit(sequence, path)
            steps.cache.advance(sequence, len(path))
            first += len(tree)
            if advance:
                rounds.cache.advance(sequence, len(path))
    assert rounds.cache.lengths == steps.cache.lengths
    rounds.run([DraftTree.chain([0])] * SEQUENCES, range(SEQUENCES), [False] * SEQUENCES, random_inputs(3, generator))
    assert torch.equal(rounds.cache.states, steps.cache.states)
    assert torch.equal(rounds.cache.windows, steps.cache.windows)


def test_records_have_room_for_the_largest_tree_that_does_not_advance():
    layer, generator = Layer(), torch.Generator().manual_seed(0)
    for size, advance, room in ((40, True, 0), (3, False, 16), (17, False, 32), (5, False, 32)):
        layer.run([DraftTree.chain([0] * size)], [1], [advance], random_inputs(size, generator))
        assert layer.cache.records.shape[3] == layer.cache.conv_records.shape[3] == room
