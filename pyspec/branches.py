"""Branches: several texts that go on from one, as nodes of a tree, each computed once."""

from __future__ import annotations

from collections.abc import Sequence

from pyspec.generate import check_model, prompts_of
from pyspec.runners import Runner
from pyspec.runners.verified import Verified
from pyspec.tree import DraftTree

FEW_NODES = 64  # a tree of so many is never pruned: reading the living nodes again would cost more than it saves


def trunk_of(tokens, model: Runner) -> list[int]:
    """The one prompt that branches grow from, as token ids, at least 2: their tree begins with the last of them."""
    check_model(model)
    batched, prompts = prompts_of(tokens, model)
    if batched:
        raise TypeError("tokens must be one prompt, got a batch")
    if len(prompts[0]) < 2:
        raise ValueError(f"tokens must be at least 2: a tree begins with the last of them, got {len(prompts[0])}")
    return prompts[0]


class Branches:
    """What several texts have beyond the committed text of a runner's first slot, as one tree that grows and is pruned.

    Texts share the nodes of what they begin with. A node's logits have the bits that plain decoding of its text gives.

    Args:
        model: a runner whose slot 0 has committed the text up to `root`.
        root: the token behind that.
    """

    def __init__(self, model: Runner, root: int):
        self._model = model
        self.tokens, self.parents = [root], [-1]
        self._verified = 0  # of these, nodes that were verified since the last commit
        self._told = 0  # and nodes whose rows were given

    @classmethod
    def after(cls, model: Runner, prompt: Sequence[int], living: int) -> Branches:
        """Branches behind a prompt of at least two tokens: so many are committed or needed at once, at most."""
        # a tree is pruned before more than half of it can go
        model.prefill([prompt[:-1]], capacity=len(prompt) + FEW_NODES + 2 * living)
        return cls(model, prompt[-1])

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, parents: Sequence[int], tokens: Sequence[int]) -> list[int]:
        """New nodes below some others; gives their numbers. They are verified with the next `rows`."""
        first = len(self.tokens)
        self.parents += parents
        self.tokens += tokens
        return list(range(first, len(self.tokens)))

    def rows(self) -> Verified:
        """What the model says after every node that came since the last call, in their order."""
        tree, first, told = DraftTree(self.tokens, self.parents), self._verified, self._told
        if not getattr(self._model, "keeps_tree_keys", False):
            first = 0
        verified = self._model.verify({0: tree.later(first) if first else tree})[0]
        self._verified = self._told = len(self.tokens)
        return Verified(verified.logits[told - first :]) if told > first else verified

    def prune(self, leaves: Sequence[int]) -> list[int]:
        """Forgets what leads to none of these nodes, where that pays; gives what their numbers are then.

        What they all share is committed. The nodes that are left are verified again with the next new ones. Leaves may
        be nodes that `rows` has not told of yet.
        """
        living = self._living(leaves)
        shared = self._shared(living, leaves)[:-1]
        kept = living[len(shared) :]  # what is shared comes first
        if len(self) <= FEW_NODES or 2 * len(kept) > len(self) or not self._verified:
            return list(leaves)
        if shared:
            self._model.commit({0: shared})
        places = {node: place for place, node in enumerate(kept)}
        parents = self.parents
        self.tokens = [self.tokens[node] for node in kept]
        self.parents = [-1, *(places[parents[node]] for node in kept[1:])]
        self._verified, self._told = 0, sum(node < self._told for node in kept)
        return [places[leaf] for leaf in leaves]

    def _living(self, leaves: Sequence[int]) -> list[int]:
        living = set()
        for node in leaves:
            while node >= 0 and node not in living:
                living.add(node)
                node = self.parents[node]
        return sorted(living)

    def _shared(self, living: Sequence[int], leaves: Sequence[int]) -> list[int]:
        """The path from the root that all leaves share."""
        children: dict[int, list[int]] = {}
        for node in living[1:]:
            children.setdefault(self.parents[node], []).append(node)
        path, ends = [0], set(leaves)
        while path[-1] not in ends and len(children[path[-1]]) == 1:
            path += children[path[-1]]
        return path
