"""Drafters that know the fake models, or know nothing."""

import random

from pyspec.tree import DraftTree
from tests.helpers.fake_runner import FakeRunner


class Drafts:
    """Base of the others: no state, and what it saw is kept for the tests."""

    proposal = "deterministic"

    def __init__(self):
        self.started, self.observed = [], []

    def start(self, prompt):
        self.started.append(list(prompt))
        return self

    def observe(self, tree, verified, path):
        assert verified.logits.shape == (len(tree), FakeRunner.vocab_size)
        self.observed.append((tree, list(path)))


class Oracle(Drafts):
    """A chain of what the model says greedily."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def propose(self, context, budget):
        said = list(context)
        while len(said) < len(context) + budget - 1:
            said.append(int(self.model.logits(said).argmax()))
        return DraftTree.chain(said[len(context) - 1 :])


class AlwaysWrong(Oracle):
    def propose(self, context, budget):
        wrong = (int(self.model.logits(context).argmax()) + 1) % FakeRunner.vocab_size
        return DraftTree.chain([context[-1]] + [wrong] * (budget - 1))


class RandomTrees(Drafts):
    """Trees of any shape, with likely tokens, some of them twice below one parent."""

    def __init__(self, seed=0):
        super().__init__()
        self.random = random.Random(seed)

    def propose(self, context, budget):
        nodes = self.random.randint(1, budget)
        parents = [-1] + [self.random.randrange(node) for node in range(1, nodes)]
        return DraftTree([context[-1]] + [self.random.randrange(97, 123) for _ in parents[1:]], parents)


class OracleTrees(Oracle):
    """The greedy chain, hidden between wrong branches."""

    def propose(self, context, budget):
        tokens, parents, tip, said = [context[-1]], [-1], 0, list(context)
        while len(tokens) + 2 <= budget:
            said.append(int(self.model.logits(said).argmax()))
            tokens += [(said[-1] + 1) % 100, said[-1]]
            parents += [tip, tip]
            tip = len(tokens) - 1
        return DraftTree(tokens, parents)
