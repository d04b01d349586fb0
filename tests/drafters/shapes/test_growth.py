"""Growth policies: what they draw is lossless with every rule that takes it, by exact enumeration."""

import itertools
from collections import defaultdict

import numpy as np
import pytest
from scipy import stats

from pyspec.acceptance import RULES, acceptance_from_name
from pyspec.drafters.shapes import top_tokens
from pyspec.drafters.shapes.dyspec import DySpecGreedy, DySpecThreshold
from pyspec.drafters.shapes.reranked import Reranked, TopPaths
from pyspec.drafters.shapes.static import FixedBranching, Sequoia, sibling_acceptance
from pyspec.drafters.shapes.stochastic_beam import StochasticBeam
from pyspec.sampling.noise import Noise
from pyspec.tree import DraftTree
from tests.helpers.enumeration import (
    EnumeratingNoise,
    Laws,
    exact_acceptance,
    outcomes,
    target_law,
    text_law,
    texts_of,
    total_variation,
    trees_of,
    with_q,
)

WITH, WITHOUT = "with replacement", "without replacement"
# name: policy and budget
DRAWN = {
    "chain": (FixedBranching((1, 1, 1)), 4),
    "RSD-C 2, 2": (FixedBranching((2, 2)), 7),
    "RSD-C 5, 1": (FixedBranching((5, 1)), 9),
    "RSD-C 1, 2, 1": (FixedBranching((1, 2, 1)), 6),
    "RSD-C 2, 2, cut": (FixedBranching((2, 2)), 4),
    "fixed 2, 1": (FixedBranching((2, 1), WITH), 5),
    "fixed 4": (FixedBranching((4,), WITH), 5),
    "Sequoia": (Sequoia((0.6, 0.2, 0.1), 3), 5),
    "Sequoia, independent": (Sequoia((0.6, 0.2), 2, WITH), 4),
    "DySpec": (DySpecGreedy(), 5),
    "DySpec, threshold": (DySpecThreshold(0.15), 5),
    "RSD-S": (StochasticBeam(2, 2), 9),
    "RSD-S, cut": (StochasticBeam(3, 2), 5),
}
CHOSEN = {
    "top 2, 2": (FixedBranching((2, 2), "top"), 7),
    "top of more than there are": (FixedBranching((9,), "top"), 16),
    "Sequoia, top": (Sequoia((0.6, 0.2, 0.1), 3, "top"), 6),
    "top paths": (TopPaths(3, 3), 5),
    "re-ranked fixed": (Reranked(FixedBranching((3, 3), "top")), 5),
}


def beams_of(policy, laws, budget):
    """Trees of a StochasticBeam by its definition: paths of full length in the order of a race, each level's first."""
    paths = {
        text: float(np.prod([laws.q(text[:end])[text[end]] for end in range(policy.depth)]))
        for text in itertools.product(range(laws.vocab_size), repeat=policy.depth)
    }
    paths = {text: rate for text, rate in paths.items() if rate > 0}
    grown = defaultdict(float)

    def run(order, probability, left):
        levels = [list(dict.fromkeys(text[: end + 1] for text in order)) for end in range(policy.depth)]
        if left and len(levels[0]) < policy.width:
            total = sum(left.values())
            for text, rate in left.items():
                run([*order, text], probability * rate / total, {t: r for t, r in left.items() if t != text})
            return
        nodes = [(), *(text for level in levels for text in level[: policy.width])][:budget]
        parents = [-1, *(nodes.index(text[:-1]) for text in nodes[1:])]
        grown[tuple(text[-1] if text else 0 for text in nodes), tuple(parents)] += probability

    run([], 1.0, paths)
    return grown


def drawn_trees(name, laws):
    policy, budget = DRAWN[name]
    if isinstance(policy, StochasticBeam):
        return list(with_q(beams_of(policy, laws, budget), laws))
    return list(trees_of(policy, laws, budget))


@pytest.mark.parametrize("kind", ["dense", "zeros", "one-hot target", "one-hot draft", "disjoint"])
@pytest.mark.parametrize("name", DRAWN)
def test_every_exact_rule_that_takes_the_trees_says_what_the_target_says(name, kind):
    laws = Laws(3, kind)
    trees = drawn_trees(name, laws)
    assert sum(probability for _, probability in trees) == pytest.approx(1, abs=1e-12)
    length = 1 + max(int(tree.depths.max()) for tree, _ in trees)
    target = target_law(laws, length)
    accepted = {}
    for rule_name in RULES:
        rule = acceptance_from_name(rule_name)
        if rule.law != "exact" or (rule.siblings is not None and DRAWN[name][0].siblings not in rule.siblings):
            continue
        judge = rule.judge if rule.siblings else exact_acceptance(laws)
        emitted, accepted[rule_name] = text_law(trees, judge, laws, length, say_laws=bool(rule.siblings))
        assert total_variation(emitted, target) < 1e-12, rule_name
    assert len(accepted) == {"none": 6, WITH: 5, WITHOUT: 3}[DRAWN[name][0].siblings]
    assert accepted["traversal"] >= accepted["recursive"] - 1e-12


@pytest.mark.parametrize("name", CHOSEN)
def test_chosen_trees_say_what_the_target_says(name):
    laws = Laws(3, "dense")
    policy, budget = CHOSEN[name]
    assert policy.proposal == "deterministic"
    [(tree, probability)] = outcomes(lambda noise: policy.grow(laws, 0, budget, noise))
    assert probability == 1 and tree.q is None and 1 < len(tree) <= budget
    emitted, _ = text_law([(tree, 1.0)], exact_acceptance(laws), laws, 4, say_laws=False)
    assert total_variation(emitted, target_law(laws, 4)) < 1e-12
    for node, text in enumerate(texts_of(tree.tokens.tolist(), tree.parents.tolist())):
        chance = np.prod([laws.q(text[:end])[text[end]] for end in range(len(text))])
        assert float(tree.chances[node]) == pytest.approx(chance)


@pytest.mark.parametrize("width, budget", [(2, 9), (3, 9), (3, 5)])
def test_stochastic_beam_search_is_a_race_of_paths(width, budget):
    laws, policy, draws = Laws(3, "dense", seed=1), StochasticBeam(width, 2), 5_000
    expected = beams_of(policy, laws, budget)
    counts = defaultdict(int)
    for seed in range(draws):
        tree = policy.grow(laws, 0, budget, Noise(seed, 0, Noise.DRAFTS))
        counts[tuple(tree.tokens.tolist()), tuple(tree.parents.tolist())] += 1
    assert set(counts) <= set(expected)
    likely = [grown for grown, probability in expected.items() if probability * draws >= 5]
    observed = [counts[grown] for grown in likely]
    predicted = [expected[grown] * draws for grown in likely]
    assert len(likely) > 5 and sum(predicted) > 0.8 * draws
    rest = draws - sum(observed), draws - sum(predicted)
    if rest[1] > 5:
        observed, predicted = [*observed, rest[0]], [*predicted, rest[1]]
    predicted = np.array(predicted) * sum(observed) / sum(predicted)
    assert stats.chisquare(observed, predicted).pvalue > 1e-4


def test_threshold_trees_are_greedy_trees():
    def law_of(policy, budget):
        law = defaultdict(float)
        for tree, probability in trees_of(policy, laws, budget):
            law[frozenset(texts_of(tree.tokens.tolist(), tree.parents.tolist()))] += probability
        return law

    laws = Laws(3, "dense")
    for budget in (3, 4):
        greedy, threshold = law_of(DySpecGreedy(), budget), law_of(DySpecThreshold(1e-9), budget)
        assert set(greedy) == set(threshold)
        assert all(threshold[nodes] == pytest.approx(greedy[nodes], abs=1e-12) for nodes in greedy)


def test_greedy_takes_the_slot_that_is_likeliest_reached():
    class Table:
        vocab_size = 3

        def laws(self, tokens, parents, nodes):
            return np.array([[0.7, 0.2, 0.1]] * len(nodes))

    class First:
        def draw(self, law):
            return int(np.argmax(law))

    tree = DySpecGreedy().grow(Table(), 9, 6, First())
    # slots: root 1; below 0: .7; below 0, 0: .49; below those: .343; sibling of 0: .3; sibling below 0: .21
    assert tree.tokens.tolist() == [9, 0, 0, 0, 0, 1]
    assert tree.parents.tolist() == [-1, 0, 1, 2, 3, 0]


def test_levels_are_asked_for_at_once():
    calls = []

    class Counting(Laws):
        def laws(self, tokens, parents, nodes):
            calls.append(len(nodes))
            return super().laws(tokens, parents, nodes)

    laws, noise = Counting(4, "dense"), Noise(0, 0, Noise.DRAFTS)
    for policy, budget, expected in (
        (FixedBranching((2, 3, 1)), 40, [1, 2, 6]),
        (StochasticBeam(3, 3), 40, [1, 3, 3]),
        (TopPaths(2, 3), 40, [1, 2, 2]),
        (FixedBranching((1, 1, 1)), 3, [1, 1]),
    ):
        calls.clear()
        policy.grow(laws, 0, budget, noise)
        assert calls == expected


@pytest.mark.parametrize("policy", [policy for policy, _ in (DRAWN | CHOSEN).values()], ids=lambda p: type(p).__name__)
def test_a_budget_of_one_asks_nothing(policy):
    class Silent:
        vocab_size = 3

    tree = policy.grow(Silent(), 2, 1, EnumeratingNoise(()))
    assert tree.tokens.tolist() == [2] and tree.parents.tolist() == [-1]


@pytest.mark.parametrize("policy", [policy for policy, _ in (DRAWN | CHOSEN).values()], ids=lambda p: type(p).__name__)
def test_bad_budgets_and_laws(policy):
    for budget, error in ((0, ValueError), (-1, ValueError), (4097, ValueError), (2.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="budget"):
            policy.grow(Laws(3, "dense"), 0, budget, Noise(0, 0, 2))

    class Table:
        vocab_size = 3

        def __init__(self, law):
            self.law = law

        def laws(self, tokens, parents, nodes):
            return np.array([self.law] * len(nodes))

    for law in ([np.nan, 0, 1], [np.inf, 0, 1], [-0.1, 0.5, 0.6], [0.0, 0.0, 0.0]):
        with pytest.raises(ValueError, match="law after node 0"):
            policy.grow(Table(law), 0, 4, Noise(0, 0, 2))
    with pytest.raises(ValueError, match=r"laws must be \[1, 3\], got \[1, 2\]"):
        policy.grow(Table([0.5, 0.5]), 0, 4, Noise(0, 0, 2))


@pytest.mark.parametrize("name", DRAWN)
def test_trees_keep_to_the_budget_and_hold_their_q(name):
    policy, _ = DRAWN[name]
    laws = Laws(5, "near")
    for budget in (2, 3, 8, 30):
        tree = policy.grow(laws, 4, budget, Noise(budget, 0, 2))
        assert 1 < len(tree) <= budget and tree.tokens[0] == 4 and tree.chances is None
        texts = texts_of(tree.tokens.tolist(), tree.parents.tolist())
        for node, text in enumerate(texts):
            children = tree.children(node)
            if children:
                np.testing.assert_allclose(tree.q[node], laws.q(text), rtol=1e-12)
            tokens = [int(tree.tokens[child]) for child in children]
            assert policy.siblings != WITHOUT or len(set(tokens)) == len(tokens)
            assert policy.siblings != "none" or len(tokens) <= 1


def test_shapes():
    assert FixedBranching((2, 1)).shape(10) == [-1, 0, 0, 1, 2]
    assert FixedBranching((2, 2)).shape(4) == [-1, 0, 0, 1]
    # a chain while the next level is worth more than a sibling
    assert Sequoia((0.9, 0.05), 8).shape(5) == [-1, 0, 1, 2, 3]
    assert Sequoia((0.4, 0.3, 0.2), 8).shape(4) == [-1, 0, 0, 0]
    assert Sequoia((0.4, 0.3, 0.2), 1).shape(9) == [-1, 0, 0, 0]
    assert Sequoia((0.5, 0.0), 2).shape(9) == [-1, 0, 1]


def best_by_trying(acceptance, depth, nodes):
    """Expected tokens of the best tree of at most that many nodes."""
    best = {(0, size): 1.0 for size in range(1, nodes + 1)}

    def forests(ranks, level, size):
        """The most that children from rank `ranks` on give with at most size nodes."""
        if ranks == len(acceptance) or size == 0:
            return 0.0
        return max(
            [0.0]
            + [
                acceptance[ranks] * best[level, taken] + forests(ranks + 1, level, size - taken)
                for taken in range(1, size + 1)
            ]
        )

    for level in range(1, depth + 1):
        for size in range(1, nodes + 1):
            best[level, size] = 1 + forests(0, level - 1, size - 1)
    return best[depth, nodes]


@pytest.mark.parametrize("seed", range(6))
def test_sequoia_is_the_best_shape(seed):
    generator = np.random.default_rng(seed)
    acceptance = (np.sort(generator.dirichlet(np.ones(4)))[::-1] * 0.9)[:3].tolist()
    for depth, nodes in ((1, 3), (2, 6), (3, 7), (5, 8)):
        parents = Sequoia(acceptance, depth).shape(nodes)
        assert len(parents) <= nodes and parents[1:] == sorted(parents[1:])
        chances, ranks = [1.0], defaultdict(int)
        for parent in parents[1:]:
            chances.append(chances[parent] * acceptance[ranks[parent]])
            ranks[parent] += 1
        assert DraftTree([0] * len(parents), parents).depths.max() <= depth
        assert sum(chances) == pytest.approx(best_by_trying(acceptance, depth, nodes))


def test_sibling_acceptance_counts_where_there_was_a_sibling():
    #      0 -> 1, 2; 1 -> 3; 2 -> 4, 5
    tree = DraftTree([0, 1, 2, 3, 4, 5], [-1, 0, 0, 1, 2, 2])
    assert sibling_acceptance([(tree, [0, 2, 4]), (tree, [0, 1]), (tree, [0])], 3) == [2 / 5, 1 / 4, 0]


def test_re_ranking_keeps_the_likeliest_paths():
    laws = Laws(4, "dense")
    tree = Reranked(FixedBranching((4, 4), "top")).grow(laws, 0, 8, EnumeratingNoise(()))
    texts = [text for length in (1, 2) for text in itertools.product(range(4), repeat=length)]
    chance = {text: np.prod([laws.q(text[:end])[text[end]] for end in range(len(text))]) for text in texts}
    best = sorted(texts, key=lambda text: -chance[text])[:7]
    assert set(texts_of(tree.tokens.tolist(), tree.parents.tolist())) == {(), *best}
    assert tree.chances.tolist() == sorted(tree.chances.tolist(), reverse=True)


def test_top_tokens():
    assert top_tokens(np.array([0.2, 0.0, 0.4, 0.2, 0.2]), 3) == [2, 0, 3]
    assert top_tokens(np.array([0.2, 0.0, 0.8]), 99) == [2, 0]


# ---- what would bias the text cannot be made


@pytest.mark.parametrize("policy", [policy for policy, _ in DRAWN.values()], ids=lambda p: type(p).__name__)
def test_drawn_trees_are_not_re_ranked(policy):
    with pytest.raises(ValueError, match="bias the text. Use StochasticBeam or DySpecGreedy"):
        Reranked(policy)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: FixedBranching(()), "branching"),
        (lambda: FixedBranching((2, 0)), "branching"),
        (lambda: FixedBranching((2,), "sampled"), "children must be"),
        (lambda: Sequoia((), 3), "acceptance"),
        (lambda: Sequoia((0.9, 0.2), 3), "acceptance"),
        (lambda: Sequoia((0.9, np.nan), 3), "acceptance"),
        (lambda: Sequoia((0.9,), 0), "depth"),
        (lambda: StochasticBeam(0, 2), "width"),
        (lambda: StochasticBeam(2, 0), "depth"),
        (lambda: TopPaths(0, 2), "width"),
        (lambda: DySpecThreshold(0.0), "threshold"),
        (lambda: DySpecThreshold(np.nan), "threshold"),
    ],
)
def test_bad_settings(make, words):
    with pytest.raises(ValueError, match=words):
        make()
