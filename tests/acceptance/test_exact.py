"""Rule A by exact enumeration: every outcome of every coin, with its probability, against the target's law."""

import itertools
import math
import random
from collections import defaultdict

import pytest
import torch

from pyspec.acceptance import acceptance_from_name
from pyspec.acceptance.exact import ExactAcceptance
from pyspec.runners.verified import Verified
from pyspec.sampling.sampler import InvalidLogits, Sampler
from pyspec.tree import DraftTree

VOCABULARY = 4


class Unscripted(Exception):
    """A coin that the script does not hold; carries its law."""


class EnumeratingSampler(Sampler):
    """Draws what the script says; at its end, asks for every continuation."""

    def __init__(self, script, **settings):
        super().__init__(seed=0, **settings)
        self.script, self.drawn = script, 0

    def draw(self, logits, position):
        if self.drawn == len(self.script):
            raise Unscripted(self.probabilities(logits).tolist())
        self.drawn += 1
        return self.script[self.drawn - 1]


def outcomes(function, settings):
    """(result, probability) of function(sampler) for every sequence of coins."""
    pending = [((), 1.0)]
    while pending:
        script, probability = pending.pop()
        try:
            yield function(EnumeratingSampler(script, **settings)), probability
        except Unscripted as coin:
            pending += [((*script, token), probability * p) for token, p in enumerate(coin.args[0]) if p > 0]


def target_logits(context, kind):
    """A law that depends on the whole context, from a hash of it."""
    generator = random.Random(repr((context, kind)))
    logits = [generator.gauss(0, 1.5) for _ in range(VOCABULARY)]
    if kind == "zeros":
        logits[generator.randrange(VOCABULARY)] = -math.inf
    if kind == "one-hot":
        logits = [0.0 if token == sum(context) % VOCABULARY else -math.inf for token in range(VOCABULARY)]
    return torch.tensor(logits, dtype=torch.float32)


def chain(context):
    return [(context[-1] + step) % VOCABULARY for step in range(4)], [-1, 0, 1, 2]


def ragged(context):
    generator = random.Random(repr(context))
    parents = [-1] + [generator.randrange(node) for node in range(1, 9)]
    return [context[-1]] + [generator.randrange(VOCABULARY) for _ in parents[1:]], parents


def duplicates(context):
    return [context[-1], 1, 1, 1, 2, 2, 0, 3, 1], [-1, 0, 0, 0, 1, 2, 2, 3, 5]


def full(context):
    return [context[-1], *range(VOCABULARY), *range(VOCABULARY)], [-1] + [0] * VOCABULARY + [2] * VOCABULARY


def root_only(context):
    return [context[-1]], [-1]


def text_of_rounds(sampler, shape, kind, length):
    """The first `length` tokens that rounds of draft and acceptance emit after a one-token prompt."""
    context = (2,)
    while len(context) < 1 + length:
        tree = DraftTree(*shape(context))
        prefixes = []
        for token, parent in zip(tree.tokens.tolist(), tree.parents.tolist(), strict=True):
            prefixes.append((*prefixes[parent], token) if prefixes else context)
        logits = torch.stack([target_logits(prefix, kind) for prefix in prefixes])
        path, next_token = ExactAcceptance().accept(tree, Verified(logits), sampler, len(context))
        assert path[0] == 0 and all(parent == tree.parents[child] for parent, child in itertools.pairwise(path))
        context += (*(int(tree.tokens[node]) for node in path[1:]), next_token)
    return context[1 : 1 + length]


@pytest.mark.parametrize("kind", ["dense", "zeros", "one-hot"])
@pytest.mark.parametrize("shape", [chain, ragged, duplicates, full, root_only])
@pytest.mark.parametrize("settings", [dict(temperature=1.0), dict(temperature=0.7, top_k=3), dict(temperature=0.0)])
def test_emitted_law_is_the_targets(shape, kind, settings):
    length = 4
    emitted = defaultdict(float)
    for text, probability in outcomes(lambda sampler: text_of_rounds(sampler, shape, kind, length), settings):
        emitted[text] += probability
    warp = Sampler(seed=0, **settings)
    for text in itertools.product(range(VOCABULARY), repeat=length):
        expected = 1.0
        for end in range(length):
            expected *= float(warp.probabilities(target_logits((2, *text[:end]), kind))[text[end]])
        assert abs(emitted[text] - expected) < 1e-12


@pytest.mark.parametrize("shape", [chain, ragged, duplicates, full])
def test_one_seed_gives_one_text_with_any_tree(shape):
    for seed in range(20):
        texts = [text_of_rounds(Sampler(1.0, seed=seed), each, "dense", 12) for each in (root_only, shape)]
        assert texts[0] == texts[1]


def test_walk():
    #      0 -> 1, 2; 1 -> 3; 3 -> 4
    tree = DraftTree([9, 5, 6, 7, 8], [-1, 0, 0, 1, 3])
    logits = torch.zeros(5, 10)
    for node, token in ((0, 5), (1, 7), (2, 1), (3, 2), (4, 3)):
        logits[node, token] = 1.0
    assert ExactAcceptance().accept(tree, Verified(logits), Sampler(), 0) == ([0, 1, 3], 2)
    logits[0, 6] = 2.0
    assert ExactAcceptance().accept(tree, Verified(logits), Sampler(), 0) == ([0, 2], 1)


def test_noise_is_that_of_the_tokens_position():
    class Recorder(Sampler):
        positions = []

        def draw(self, logits, position):
            self.positions.append(position)
            return int(logits.argmax())

    logits = torch.eye(10)[[1, 2, 3]]
    ExactAcceptance().accept(DraftTree.chain([0, 1, 2]), Verified(logits), Recorder(), 40)
    assert Recorder.positions == [40, 41, 42]


def test_invalid_logits_name_the_node_and_only_where_the_walk_comes():
    tree = DraftTree([0, 1, 2], [-1, 0, 0])
    logits = torch.eye(4)[[2, 0, 3]]
    logits[1] = torch.nan
    assert ExactAcceptance().accept(tree, Verified(logits), Sampler(), 0) == ([0, 2], 3)
    logits[2, 1] = torch.nan
    with pytest.raises(InvalidLogits, match="NaN") as error:
        ExactAcceptance().accept(tree, Verified(logits), Sampler(), 0)
    assert error.value.path == [0, 2]


def test_names():
    rule = ExactAcceptance()
    assert acceptance_from_name(rule) is rule
    assert acceptance_from_name("exact").law == "exact"
    with pytest.raises(ValueError, match="acceptance.*'exacr'"):
        acceptance_from_name("exacr")
