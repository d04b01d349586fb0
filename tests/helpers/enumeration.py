"""Every outcome of every coin, with its probability: what makes the law of a text exact in a test."""

import itertools
import random
from collections import defaultdict

import numpy as np
import torch

from pyspec.acceptance.exact import ExactAcceptance
from pyspec.runners.verified import Verified
from pyspec.sampling.sampler import Sampler
from pyspec.tree import DraftTree

KINDS = ("dense", "near", "equal", "zeros", "one-hot target", "one-hot draft", "disjoint")


class _Unscripted(Exception):
    """A choice that the script does not hold; carries the probabilities of its outcomes."""


class EnumeratingNoise:
    """Noise whose outcomes the script tells; at its end, asks for every continuation.

    With say_laws, draw gives the law itself: for rules whose one draw is the last thing that they do.
    """

    def __init__(self, script, say_laws=False):
        self._script, self._used, self._say_laws = script, 0, say_laws

    def _choose(self, probabilities):
        if self._used == len(self._script):
            raise _Unscripted(probabilities)
        self._used += 1
        return self._script[self._used - 1]

    def coin(self, probability):
        if not 0 < probability < 1:
            assert probability >= 0
            return bool(probability)
        return bool(self._choose([1 - probability, probability]))

    def draw(self, law):
        law = np.asarray(law, dtype=np.float64)
        assert law.min() >= 0 and law.sum() > 0
        law = law / law.sum()
        return law if self._say_laws else self._choose(law.tolist())


def outcomes(function, say_laws=False):
    """(result, probability) of function(noise) for every sequence of choices."""
    pending = [((), 1.0)]
    while pending:
        script, probability = pending.pop()
        try:
            yield function(EnumeratingNoise(script, say_laws)), probability
        except _Unscripted as choice:
            pending += [((*script, i), probability * p) for i, p in enumerate(choice.args[0]) if p > 0]


class Laws:
    """Target and drafter of a small vocabulary: laws that depend on the whole text below the root."""

    def __init__(self, vocab_size, kind, seed=0):
        self.vocab_size, self._kind, self._seed = vocab_size, kind, seed
        self._rows = {}

    def p(self, text):
        """[V] float64, of logits that are float32."""
        return self._both(text)[0]

    def q(self, text):
        return self._both(text)[1]

    def logits(self, text):
        return self._both(text)[2]

    def _both(self, text):
        if text not in self._rows:
            self._rows[text] = self._make(random.Random(repr((self._kind, self._seed, text))))
        return self._rows[text]

    def _make(self, generator):
        size, kind = self.vocab_size, self._kind
        logits = torch.tensor([generator.gauss(0, 1.2) for _ in range(size)])
        noise = torch.tensor([generator.gauss(0, 1.2) for _ in range(size)], dtype=torch.float64)
        if kind == "zeros":
            logits[generator.randrange(size)] = -torch.inf
        if kind in ("one-hot target", "disjoint"):
            logits[[token for token in range(size) if token != 1]] = -torch.inf
        p = Sampler(1.0, seed=0).probabilities(logits)
        q = p if kind == "equal" else (p + noise.softmax(0)) / 2 if kind == "near" else noise.softmax(0)
        if kind == "zeros":
            q[generator.randrange(size)] = 0
        if kind == "one-hot draft":
            q = torch.eye(size, dtype=torch.float64)[generator.randrange(size)]
        if kind == "disjoint":
            q[1] = 0
        return p.numpy(), (q / q.sum()).numpy(), logits

    def laws(self, tokens, parents, nodes):
        """The drafter as a LawSource."""
        texts = texts_of(tokens, parents)
        return np.stack([self.q(texts[node]) for node in nodes])


def texts_of(tokens, parents):
    """The drafts on the way to every node, root excluded."""
    texts = [()]
    for token, parent in list(zip(tokens, parents, strict=True))[1:]:
        texts.append((*texts[parent], token))
    return texts


def trees_of(policy, laws, budget):
    """(tree, probability) of everything that a policy may grow."""
    grown = defaultdict(float)
    for tree, probability in outcomes(lambda noise: policy.grow(laws, 0, budget, noise)):
        grown[tuple(tree.tokens.tolist()), tuple(tree.parents.tolist())] += probability
    return with_q(grown, laws)


def with_q(grown, laws):
    """(tree, probability) of {(tokens, parents): probability}, q being that of laws."""
    for (tokens, parents), probability in grown.items():
        q = torch.from_numpy(np.stack([laws.q(text) for text in texts_of(tokens, parents)]))
        yield DraftTree(tokens, parents, q=q), probability


def text_law(trees, judge, laws, length, say_laws=True):
    """The law [V] * length of the text that a round of trees and judge begins, and its expected accepted drafts."""
    emitted, accepted = np.zeros([laws.vocab_size] * length), 0.0
    continued = {}

    def continuation(text):
        if text not in continued:
            if len(text) == length:
                continued[text] = np.array(1.0)
            else:
                rows = [continuation((*text, token)) for token in range(laws.vocab_size)]
                shape = [laws.vocab_size] + [1] * (length - len(text) - 1)
                continued[text] = laws.p(text).reshape(shape) * np.stack(rows)
        return continued[text]

    for tree, tree_probability in trees:
        texts = texts_of(tree.tokens.tolist(), tree.parents.tolist())
        p, q = np.stack([laws.p(text) for text in texts]), tree.q
        for (path, said), probability in outcomes(lambda noise, t=tree, p=p, q=q: judge(t, p, q, noise), say_laws):
            probability *= tree_probability
            accepted += probability * (len(path) - 1)
            said = said if say_laws else np.eye(laws.vocab_size)[said]
            for token in range(laws.vocab_size):
                text = (*texts[path[-1]], token)
                emitted[text] += probability * said[token] * continuation(text)
    return emitted, accepted


def target_law(laws, length):
    law = np.ones([laws.vocab_size] * length)
    for text in itertools.product(range(laws.vocab_size), repeat=length):
        for end in range(length):
            law[text] *= laws.p(text[:end])[text[end]]
    return law


def total_variation(law, other):
    return 0.5 * np.abs(law - other).sum()


def exact_acceptance(laws):
    """Rule A as a judge: its draws are outcomes to enumerate, so not to be used with say_laws."""

    def judge(tree, p, q, noise):
        class Enumerating(Sampler):
            def draw(self, logits, position):
                return noise.draw(self.probabilities(logits).numpy())

        texts = texts_of(tree.tokens.tolist(), tree.parents.tolist())
        logits = torch.stack([laws.logits(text) for text in texts])
        return ExactAcceptance().accept(tree, Verified(logits), Enumerating(1.0, seed=0), 0)

    return judge
