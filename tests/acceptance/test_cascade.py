"""Speculative cascades: their laws by exact enumeration, and what they accept greedily and of chosen drafts."""

import math

import numpy as np
import pytest
import torch

from pyspec.acceptance import acceptance_from_name
from pyspec.acceptance.cascade import DEFERRALS, CascadeAcceptance, cascade_law
from pyspec.generate import generate
from pyspec.runners.verified import Verified
from pyspec.sampling.sampler import Sampler
from pyspec.tree import DraftTree
from tests.helpers.enumeration import Laws, outcomes, target_law, text_law, texts_of, total_variation, trees_of
from tests.helpers.fake_drafters import RandomTrees
from tests.helpers.fake_runner import FakeRunner


def defined(rule, p, q, alpha):
    """Which tokens are deferred, as the paper's table has it, token by token."""

    def entropy(law):
        return -sum(share * math.log(share) for share in law if share > 0)

    tv = sum(max(0.0, a - b) for a, b in zip(p, q, strict=True))
    of_position = {
        "chow": max(q) < 1 - alpha,
        "chow_log": entropy(q) > alpha,
        "diff": max(q) < max(p) - alpha,
        "diff_log": entropy(q) > entropy(p) + alpha,
        "opt": max(q) < max(p) - alpha * tv,
    }
    of_token = {
        "token_v1": lambda v: q[v] < max(p) - alpha * tv,
        "token_v2": lambda v: p[v] < max(p) - alpha * tv,
        "token_v3": lambda v: p[v] < (1 - alpha) * max(p),
    }
    return [of_position[rule] if rule in of_position else of_token[rule](v) for v in range(len(p))]


def mixture(rule, p, q, alpha):
    deferred = defined(rule, p, q, alpha)
    eta = sum(q[v] for v in range(len(p)) if deferred[v])
    return np.array([(0 if deferred[v] else q[v]) + eta * p[v] for v in range(len(p))])


class CascadeLaws(Laws):
    """Laws whose target is the cascade's for as many tokens as have drafts, and the plain one behind them."""

    def __init__(self, kind, rule, alpha, depth):
        super().__init__(3, kind)
        self._rule, self._alpha, self._depth = rule, alpha, depth

    def p(self, text):
        p, q, _ = self._both(text)
        return mixture(self._rule, p, q, self._alpha) if len(text) < self._depth else p

    def target(self, text):
        return self._both(text)[0]


class Shape:
    """Trees of one shape, whose siblings are drawn with or without replacement; every node but the last level's has
    drafts.
    """

    def __init__(self, parents, replacement):
        self.parents, self.replacement = parents, replacement

    def grow(self, laws, token, budget, noise):
        tokens, parents, left = [token], [-1], {}
        for parent in self.parents[1:]:
            law = left.setdefault(parent, laws.laws(tokens, parents, [parent])[0].copy())
            tokens.append(noise.draw(law))
            parents.append(parent)
            if not self.replacement:
                law[tokens[-1]] = 0
        return DraftTree(tokens, parents)


@pytest.mark.parametrize("kind", ["dense", "near", "zeros", "equal"])
@pytest.mark.parametrize("alpha", [0.0, 0.15, 0.6, 1.0])
@pytest.mark.parametrize("rule", DEFERRALS)
def test_the_law_of_the_text_is_pi(rule, alpha, kind):
    for parents, depth in (([-1, 0, 1], 2), ([-1, 0, 0], 1), ([-1, 0, 0, 1, 2], 2)):
        for replacement in (True, False):
            if kind == "zeros" and not replacement and parents.count(0) > 1:
                continue  # nothing may be left to draw
            laws = CascadeLaws(kind, rule, alpha, depth)

            def judge(tree, p, q, noise, laws=laws):
                own = np.stack([laws.target(text) for text in texts_of(tree.tokens.tolist(), tree.parents.tolist())])
                return CascadeAcceptance(alpha, rule).judge(tree, own, q, noise)

            emitted, _ = text_law(trees_of(Shape(parents, replacement), laws, 9), judge, laws, depth + 1)
            assert total_variation(emitted, target_law(laws, depth + 1)) < 1e-12


def test_the_ends_of_the_dial():
    generator = np.random.default_rng(0)
    for _ in range(50):
        p, q = generator.dirichlet(np.ones(5), 2)
        for rule in DEFERRALS:
            for alpha in (0.0, 0.2, 1.0):
                law = cascade_law(p, q, CascadeAcceptance(alpha, rule).deferred(p, q))
                assert law.sum() == pytest.approx(1, abs=1e-12) and law.min() >= 0
        exact = cascade_law(p, q, CascadeAcceptance(0.0).deferred(p, q))
        assert np.abs(exact - (q[p.argmax()] * np.eye(5)[p.argmax()] + (1 - q[p.argmax()]) * p)).max() < 1e-12
        np.testing.assert_allclose(cascade_law(p, q, CascadeAcceptance(1.0).deferred(p, q)), q)


def logits_of(*laws):
    return Verified(torch.tensor(laws).log())


def test_greedily_the_likeliest_child_that_is_good_enough_is_taken():
    tree = DraftTree([0, 1, 2, 3], [-1, 0, 0, 2])
    verified = logits_of([0.3, 0.27, 0.28, 0.15], [1.0, 0, 0, 0], [0.1, 0.5, 0.2, 0.2], [0, 0, 1.0, 0])
    assert CascadeAcceptance(0.1).accept(tree, verified, Sampler(), 0) == ([0, 2], 1)
    assert CascadeAcceptance(0.7).accept(tree, verified, Sampler(), 0) == ([0, 2, 3], 2)
    assert CascadeAcceptance(0.0).accept(tree, verified, Sampler(), 0) == ([0], 0)
    assert CascadeAcceptance(0.7, top=1).accept(tree, verified, Sampler(), 0) == ([0], 0)
    assert CascadeAcceptance(0.7, top=2).accept(tree, verified, Sampler(), 0) == ([0, 2, 3], 2)


def test_the_law_of_chosen_drafts():
    """One-hot at the likeliest child that is not deferred, else the target's own."""
    laws, alpha = Laws(3, "dense"), 0.5
    tree = DraftTree([0, 1, 2, 0, 2], [-1, 0, 0, 1, 2])
    texts = texts_of(tree.tokens.tolist(), tree.parents.tolist())
    rows = Verified(torch.stack([laws.logits(text) for text in texts]))

    def law(text):
        node = texts.index(text) if text in texts else None
        p = laws.p(text)
        drafted = [] if node is None else [int(tree.tokens[child]) for child in tree.children(node)]
        free = [token for token in drafted if p[token] >= (1 - alpha) * p.max()]
        return np.eye(3)[max(free, key=lambda token: p[token])] if free else p

    def judge(noise):
        class Enumerating(Sampler):
            def draw(self, logits, position):
                return noise.draw(self.probabilities(logits).numpy())

        return CascadeAcceptance(alpha).accept(tree, rows, Enumerating(1.0, seed=0), 0)

    emitted = {}
    for (path, said), probability in outcomes(judge):
        text = (*texts[path[-1]], said)
        emitted[text] = emitted.get(text, 0) + probability
    for text, probability in emitted.items():
        expected = np.prod([law(text[:end])[text[end]] for end in range(len(text))])
        assert probability == pytest.approx(expected, abs=1e-12)
    assert sum(emitted.values()) == pytest.approx(1)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_ratios_of_logits_say_what_laws_say(temperature, monkeypatch):
    """Without a sum over the vocabulary the same drafts are kept."""
    generator = np.random.default_rng(1)
    for seed in range(60):
        tree = DraftTree(generator.integers(0, 6, 7), [-1, 0, 0, 0, 1, 1, 4])
        rows = Verified(torch.from_numpy(generator.normal(0, 0.7, (7, 6))).float())
        found = []
        for keeps_all in (True, False):
            monkeypatch.setattr(Sampler, "keeps_all", keeps_all)
            found.append(CascadeAcceptance(0.4).accept(tree, rows, Sampler(temperature, seed=seed), 3))
        assert found[0] == found[1]


def test_more_deferral_keeps_more_drafts():
    def say(**rule):
        asked = dict(drafter=RandomTrees(), budget=12, max_new_tokens=200)
        return generate(FakeRunner(), list(b"once upon"), **asked, **rule)

    exact = say()
    cascades = [say(acceptance="cascade", deferral=deferral) for deferral in (0.0, 0.3, 0.9)]
    assert cascades[0].tokens == exact.tokens  # greedily nothing but the likeliest token is kept
    lengths = [each.stats.mean_accepted_length for each in (exact, *cascades)]
    assert lengths[0] == lengths[1] <= lengths[2] <= lengths[3] and lengths[3] > lengths[0]


def test_a_setting_has_what_the_rule_has():
    settings = {"deferral": {"alpha": 0.2, "top": 3}, "min_p": 0.1}
    rule = acceptance_from_name("cascade", settings)
    assert (rule.deferral, rule.rule, rule.top, settings) == (0.2, "token_v3", 3, {"min_p": 0.1})
    assert acceptance_from_name("cascade", {"deferral": None}).deferral == 0.1
    assert acceptance_from_name("cascade", {"deferral": {"alpha": 0.2, "rule": "opt"}}).rule == "opt"


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: CascadeAcceptance(1.5), "deferral must be in"),
        (lambda: CascadeAcceptance(math.nan), "deferral must be in"),
        (lambda: CascadeAcceptance(0.1, "token_v4"), "rule must be one of chow"),
        (lambda: CascadeAcceptance(0.1, "opt", top=3), "top must be"),
        (lambda: CascadeAcceptance(0.1, top=0), "top must be"),
        (lambda: acceptance_from_name("exact", {"deferral": 0.1}), "deferral is for"),
        (lambda: acceptance_from_name(CascadeAcceptance(), {"deferral": 0.1}), "deferral is for"),
        (lambda: generate(FakeRunner(), [97], acceptance="recursive", deferral=0.1), "deferral is for"),
        (lambda: acceptance_from_name("cascade", {"deferral": {"rule": "opt"}}), "must have an alpha"),
        (lambda: acceptance_from_name("cascade", {"deferral": {"alpha": 0.1, "rules": "opt"}}), "must have an alpha"),
        (lambda: generate(FakeRunner(), [97], drafter="merged", acceptance=CascadeAcceptance(rule="opt")), "do not go"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
