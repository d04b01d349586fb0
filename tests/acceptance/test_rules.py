"""The rules that trust q, and the lossy ones: their laws by exact enumeration, and their seeds."""

import random

import numpy as np
import pytest
import torch
from scipy import stats

from pyspec import acceptance
from pyspec.acceptance import acceptance_from_name
from pyspec.acceptance.block import block_verification
from pyspec.acceptance.k_seq import k_seq
from pyspec.acceptance.lenient import LenientAcceptance
from pyspec.acceptance.recursive import recursive_rejection
from pyspec.acceptance.target_roots import TargetRoots, target_roots
from pyspec.acceptance.traversal import traversal_verification
from pyspec.acceptance.typical import TypicalAcceptance, typical
from pyspec.acceptance.with_replacement import with_replacement
from pyspec.runners.verified import Verified
from pyspec.sampling.noise import Noise
from pyspec.sampling.sampler import InvalidLogits, Sampler
from pyspec.tree import Accepted, DraftTree
from tests.helpers.enumeration import (
    KINDS,
    Laws,
    exact_acceptance,
    target_law,
    text_law,
    texts_of,
    total_variation,
    trees_of,
    with_q,
)

RULES = {
    "with_replacement": with_replacement,
    "recursive": recursive_rejection,
    "k_seq": k_seq,
    "block": block_verification,
    "traversal": traversal_verification,
}


class Fixed:
    """Trees of one shape, children drawn in order, written without the policies: with or without replacement."""

    def __init__(self, parents, replacement):
        self.parents, self.replacement = parents, replacement

    def grow(self, laws, token, budget, noise):
        tokens, parents, taken = [token], [-1], {}
        places = {0: 0}
        for place, parent in list(enumerate(self.parents))[1:]:
            if parent not in places:
                continue
            node = places[parent]
            left = taken.setdefault(node, laws.laws(tokens, parents, [node])[0].copy())
            if not left.any():
                continue
            child = noise.draw(left)
            if not self.replacement:
                left[child] = 0
            places[place] = len(tokens)
            tokens.append(child)
            parents.append(node)
        return DraftTree(tokens, parents)


SHAPES = {
    "root": [-1],
    "chain": [-1, 0, 1, 2],
    "pair": [-1, 0, 0],
    "star": [-1, 0, 0, 0, 0],  # more siblings than tokens: duplicates, or none left
    "fork": [-1, 0, 0, 1, 1],
    "ragged": [-1, 0, 0, 2, 0],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name, shape",
    [(name, shape) for name in RULES for shape in SHAPES if name != "block" or shape in ("root", "chain")],
)
def test_emitted_law_is_the_targets(name, shape, kind):
    siblings = acceptance_from_name(name).siblings
    laws = Laws(3, kind)
    length = 4 if shape == "chain" else 3
    for replacement in ("with replacement", "without replacement"):
        if replacement in siblings or shape == "chain":
            trees = trees_of(Fixed(SHAPES[shape], replacement == "with replacement"), laws, 9)
            emitted, _ = text_law(trees, RULES[name], laws, length)
            assert total_variation(emitted, target_law(laws, length)) < 1e-12


@pytest.mark.parametrize("name", ["recursive", "traversal"])
def test_a_token_that_comes_twice_changes_nothing(name):
    laws = Laws(4, "dense")
    grown = {}
    for tree, probability in trees_of(Fixed([-1, 0, 0, 1], False), laws, 9):
        tokens, parents = tree.tokens.tolist(), tree.parents.tolist()
        # once more each child of the root, and a child below that
        grown[(*tokens, tokens[2], tokens[1], 2), (*parents, 0, 0, 4)] = probability
    emitted, _ = text_law(with_q(grown, laws), RULES[name], laws, 3)
    assert total_variation(emitted, target_law(laws, 3)) < 1e-12


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["dense", "near", "zeros"])
def test_expected_accepted_drafts(kind, seed):
    laws = Laws(3, kind, seed)

    def expected(name, parents, replacement=False):
        return text_law(trees_of(Fixed(parents, replacement), laws, 9), RULES[name], laws, 4)[1]

    for parents in ([-1, 0, 1, 2], [-1, 0, 0, 1, 1], [-1, 0, 0, 0, 1]):
        assert expected("traversal", parents) >= expected("recursive", parents) - 1e-12
    chain = [-1, 0, 1, 2]
    assert expected("block", chain) == pytest.approx(expected("traversal", chain), abs=1e-12)
    assert expected("recursive", chain) == pytest.approx(expected("with_replacement", chain), abs=1e-12)
    single = [-1, 0]
    overlap = np.minimum(laws.p(()), laws.q(())).sum()
    for name in RULES:
        assert expected(name, single) == pytest.approx(overlap, abs=1e-12)


def test_block_is_traversal_on_chains_coin_by_coin():
    generator = np.random.default_rng(0)
    for seed in range(10_000):
        length, size = int(generator.integers(1, 7)), int(generator.integers(2, 9))
        p, q = (generator.dirichlet(np.full(size, 0.5), length) for _ in range(2))
        noise = Noise(seed, 0, Noise.DRAFTS)
        tree = DraftTree.chain([0, *(noise.draw(row) for row in q[:-1])])
        said = [rule(tree, p, q, Noise(seed, 0, 1)) for rule in (block_verification, traversal_verification)]
        assert said[0] == said[1]


# ---- the bugs that were published: the same enumeration finds each


def top(laws, count):
    """The likeliest tokens at the root, as one tree."""
    tokens = np.argsort(-laws.q(()))[:count]
    return {((0, *tokens.tolist()), (-1, *[0] * count)): 1.0}


def bias(trees, judge, laws):
    return total_variation(text_law(trees, judge, laws, 2)[0], target_law(laws, 2))


@pytest.mark.parametrize("seed", range(3))
def test_published_bugs_are_caught(seed):
    laws = Laws(5, "near", seed)
    without, with_ = Fixed([-1, 0, 0, 0], False), Fixed([-1, 0, 0, 0], True)
    assert bias(trees_of(without, laws, 4), recursive_rejection, laws) < 1e-12
    assert bias(trees_of(with_, laws, 4), with_replacement, laws) < 1e-12
    # q not renormalised after a rejection
    assert bias(trees_of(without, laws, 4), with_replacement, laws) > 1e-3
    assert bias(trees_of(without, laws, 4), k_seq, laws) > 1e-3
    # the other way round there is no harm: a token that comes twice is passed over
    assert bias(trees_of(with_, laws, 4), recursive_rejection, laws) < 1e-12
    # the top tokens, scored as if they had been drawn from q
    for rule in (with_replacement, recursive_rejection, traversal_verification):
        assert bias(with_q(top(laws, 3), laws), rule, laws) > 1e-2

    # draft temperature 0: the top tokens, q being the softmax of their logits
    def of_top(tree, p, q, noise):
        q = np.where(np.isin(np.arange(5), tree.tokens[1:]), q, 0)
        return recursive_rejection(tree, p, q / q.sum(1, keepdims=True), noise)

    assert bias(with_q(top(laws, 3), laws), of_top, laws) > 1e-2
    # two draws, of which the likelier one is kept
    kept = {}
    for tree, probability in trees_of(Fixed([-1, 0, 0], True), laws, 3):
        edge = (0, int(max(tree.tokens[1:], key=lambda token: laws.q(())[token]))), (-1, 0)
        kept[edge] = kept.get(edge, 0) + probability
    assert bias(with_q(kept, laws), with_replacement, laws) > 1e-2
    # the same trees do no harm where q is not believed
    for trees in (top(laws, 3), kept):
        emitted, _ = text_law(with_q(trees, laws), exact_acceptance(laws), laws, 2, say_laws=False)
        assert total_variation(emitted, target_law(laws, 2)) < 1e-12


def test_roots_drawn_from_the_target_bias_the_text_unless_it_is_one():
    laws = Laws(4, "near")

    def biased_by(width):
        trees = trees_of(Fixed([-1, 0, 0, 1], False), laws, 9)
        judge = lambda tree, p, q, noise: target_roots(tree, p, noise, width)  # noqa: E731
        return total_variation(text_law(trees, judge, laws, 3, say_laws=False)[0], target_law(laws, 3))

    assert biased_by(1) < 1e-12
    assert biased_by(2) > 1e-3


# ---- the lossy rules keep what they promise


@pytest.mark.parametrize("lenience", [1.0, 0.7, 0.3])
def test_lenience_is_bounded_on_chains(lenience):
    laws = Laws(4, "dense")
    judge = LenientAcceptance(lenience).judge
    emitted, accepted = text_law(trees_of(Fixed([-1, 0], False), laws, 2), judge, laws, 2)
    emitted = emitted.sum(1)
    assert (emitted <= laws.p(()) / lenience + 1e-12).all()
    assert accepted == pytest.approx(np.minimum(laws.p(()) / lenience, laws.q(())).sum())
    assert (total_variation(emitted, laws.p(())) < 1e-12) == (lenience == 1)


def test_typical_acceptance():
    #      0 -> 1, 2; 1 -> 3
    tree = DraftTree([0, 1, 2, 3], [-1, 0, 0, 1])
    p = np.full((4, 4), 0.01)
    p[0], p[1] = (0.1, 0.35, 0.45, 0.1), (0.01, 0.01, 0.01, 0.97)
    p[3] = (0, 0, 1, 0)
    assert typical(tree, p, Noise(0, 0, 1), 0.3, 0.09) == Accepted([0, 1, 3], 2)
    p[1] = (0.97, 0.01, 0.01, 0.01)  # 3 is too unlikely now, so the likelier of two paths of one draft
    p[2] = (0, 1, 0, 0)
    assert typical(tree, p, Noise(0, 0, 1), 0.3, 0.09) == Accepted([0, 2], 1)
    p[0] = (1, 0, 0, 0)
    assert typical(tree, p, Noise(0, 0, 1), 0.3, 0.09) == Accepted([0], 0)


@pytest.mark.parametrize("make", [lambda: LenientAcceptance(0), lambda: LenientAcceptance(1.5), lambda: TargetRoots(0)])
def test_bad_settings_of_lossy_rules(make):
    with pytest.raises(ValueError, match="lenience|width"):
        make()
    with pytest.raises(ValueError, match="alpha"):
        TypicalAcceptance(alpha=0)


# ---- accept: from logits and a seed


def all_rules():
    """Those that look at what the target says of drafts."""
    named = [acceptance_from_name(name) for name in acceptance.RULES if name != "unverified"]
    return named + [LenientAcceptance(0.5), TargetRoots(2)]


def chain_of(length, size, seed=0):
    torch.manual_seed(seed)
    q = torch.randn(length, size).softmax(1)
    return DraftTree(torch.randint(size, (length,)), torch.arange(-1, length - 1), q=q), torch.randn(length, size)


@pytest.mark.parametrize("rule", all_rules(), ids=lambda rule: type(rule).__name__)
def test_greedily_every_rule_follows_the_target(rule):
    for seed in range(30):
        tree, logits = chain_of(4, 5, seed)
        said = [int(row.argmax()) for row in logits]
        tree.tokens[1] = said[0]
        expected = [0, 1]
        while expected[-1] < 3 and tree.tokens[expected[-1] + 1] == said[expected[-1]]:
            expected.append(expected[-1] + 1)
        for temperature in (0.0, 1e-30) if rule.law != "mixture" else (1e-30,):  # a mixture is one greedily too
            accepted = rule.accept(tree, Verified(logits), Sampler(temperature, seed=3), 7)
            assert accepted == (expected, said[expected[-1]])


@pytest.mark.parametrize("rule", all_rules(), ids=lambda rule: type(rule).__name__)
def test_a_root_alone_needs_no_q(rule):
    tree = DraftTree([3], [-1])
    logits = torch.full((1, 5), -torch.inf)
    logits[0, 2] = 0
    assert rule.accept(tree, Verified(logits), Sampler(1.0, top_k=100, seed=0), 7) == ([0], 2)


@pytest.mark.parametrize("rule", all_rules(), ids=lambda rule: type(rule).__name__)
def test_logits_that_are_no_law_matter_only_where_they_are_needed(rule):
    tree, logits = chain_of(4, 5)
    logits[0] = torch.nan
    with pytest.raises(InvalidLogits, match="NaN") as error:
        rule.accept(tree, Verified(logits), Sampler(1.0, seed=0), 7)
    assert error.value.path == [0]
    # the draft is what the target says, so that node 1 is reached
    logits[0] = torch.eye(5)[tree.tokens[1]].log()
    logits[1] = torch.inf
    with pytest.raises(InvalidLogits, match="inf") as error:
        rule.accept(tree, Verified(logits), Sampler(1.0, seed=0), 7)
    assert error.value.path == [0, 1]
    # and now it is not
    logits[0] = torch.eye(5)[(tree.tokens[1] + 1) % 5].log()
    assert rule.accept(tree, Verified(logits), Sampler(1.0, seed=0), 7) == ([0], (tree.tokens[1] + 1) % 5)


@pytest.mark.parametrize("rule", [rule for rule in all_rules() if rule.siblings], ids=lambda rule: type(rule).__name__)
def test_a_q_that_is_no_law_is_named(rule):
    tree, logits = chain_of(3, 5)

    def accept():
        rule.accept(tree, Verified(logits), Sampler(1.0, seed=0), 7)

    good = tree.q.copy()
    for value in (torch.nan, torch.inf, -0.1):
        tree.q = good.copy()
        tree.q[0, 2] = value
        with pytest.raises(ValueError, match=r"tree.q\[0\] must be a law"):
            accept()
    tree.q = good * 0
    with pytest.raises(ValueError, match=r"tree.q\[0\] must be a law"):
        accept()
    tree.q = good.copy()
    tree.q[0, tree.tokens[1]] = 0
    with pytest.raises(ValueError, match=rf"above 0 at the tokens drawn from it, got 0 at token {tree.tokens[1]}"):
        accept()
    tree.q = None
    with pytest.raises(ValueError, match="tree.q must hold the laws"):
        accept()


def test_block_takes_chains_only():
    tree = DraftTree([0, 1, 2], [-1, 0, 0], q=torch.full((3, 4), 0.25))
    with pytest.raises(ValueError, match="must be a chain"):
        acceptance_from_name("block").accept(tree, Verified(torch.zeros(3, 4)), Sampler(1.0, seed=0), 0)


def test_rows_that_are_not_needed_are_not_read():
    class Reads(dict):
        def __missing__(self, node):
            return read.append(node) or np.full(8, 1 / 8)

    #      0 -> 1, 2; 1 -> 3, 4; 2 -> 5; uniform laws accept the first child always
    tree = DraftTree([0, 1, 2, 3, 4, 5], [-1, 0, 0, 1, 1, 2])
    for rule in (recursive_rejection, traversal_verification, with_replacement):
        read = []
        assert rule(tree, Reads(), np.full((6, 8), 1 / 8), Noise(0, 0, 1)).path == [0, 1, 3]
        assert read == [0, 1, 3]


# ---- seeds and positions


@pytest.mark.parametrize("name", RULES)
def test_every_position_has_coins_of_its_own(name):
    tree, logits = chain_of(3, 6)
    rule = acceptance_from_name(name)
    here, again, next_round = (
        [rule.accept(tree, Verified(logits), Sampler(1.0, seed=seed), position) for seed in range(40)]
        for position in (5, 5, 6)
    )
    assert here == again and sum(a != b for a, b in zip(here, next_round, strict=True)) > 10


@pytest.mark.parametrize("name", RULES)
def test_rounds_of_a_seed_follow_the_law(name):
    """Texts of three tokens, round after round as generate makes them: coins of one round must not tell on the next."""
    laws = Laws(3, "dense", seed=4)
    shape = Fixed(SHAPES["chain" if name == "block" else "fork"], name in ("with_replacement", "k_seq"))
    rule, texts, length = acceptance_from_name(name), 1_000, 3
    counts = np.zeros([3] * length)
    for seed in range(texts):
        text = ()
        while len(text) < length:
            below = Below(laws, text)
            tree = shape.grow(below, 0, 9, Noise(seed, len(text), Noise.DRAFTS))
            nodes = texts_of(tree.tokens.tolist(), tree.parents.tolist())
            tree.q = np.stack([laws.q(text + node) for node in nodes])
            logits = torch.stack([laws.logits(text + node) for node in nodes])
            path, token = rule.accept(tree, Verified(logits), Sampler(1.0, seed=seed), len(text))
            text += (*nodes[path[-1]], token)
        counts[text[:length]] += 1
    assert stats.chisquare(counts.ravel(), texts * target_law(laws, length).ravel()).pvalue > 1e-4


class Below:
    """The drafter after some text."""

    def __init__(self, laws, text):
        self._laws, self._text = laws, text

    def laws(self, tokens, parents, nodes):
        texts = texts_of(tokens, parents)
        return np.stack([self._laws.q(self._text + texts[node]) for node in nodes])


def test_random_trees_never_fail():
    generator = random.Random(0)
    for seed in range(300):
        size, nodes = generator.randint(1, 6), generator.randint(1, 12)
        parents = [-1] + [generator.randrange(node) for node in range(1, nodes)]
        laws = Laws(size, generator.choice([kind for kind in KINDS if size > 2 or kind != "disjoint"]), seed)
        if size < 3:
            laws = Laws(size, "dense", seed)
        noise = Noise(seed, 0, Noise.DRAFTS)
        for name in ("with_replacement", "k_seq", "recursive", "traversal"):
            tree = Fixed(parents, name in ("with_replacement", "k_seq")).grow(laws, 0, nodes, noise)
            texts = texts_of(tree.tokens.tolist(), tree.parents.tolist())
            p, q = (np.stack([law(text) for text in texts]) for law in (laws.p, laws.q))
            path, token = RULES[name](tree, p, q, noise)
            assert path[0] == 0 and [int(tree.parents[node]) for node in path[1:]] == path[:-1]
            assert p[path[-1], token] > 0
