"""Joint Attainment and Advancement: how a state comes behind what was accepted without recorded inputs.

The accepted tokens run through the whole model again, twice in one call: below the next tree, from a copy of the state,
and beside it, to move the state itself. pyspec replays recorded inputs instead; this is here to be compared with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from inside import read

from pyspec.runners.recurrent import RecurrentRunner
from pyspec.runners.verified import Verified
from pyspec.tree import DraftTree


class JointRounds:
    """verify and commit of a batch of B prompts; takes the runner's batch, of 2 B sequences, for itself.

    Attributes:
        logits: [V] fp32 after each prompt.
    """

    def __init__(self, runner: RecurrentRunner, prompts: Sequence[Sequence[int]]):
        self._runner = runner
        self.logits = runner.prefill([*prompts, *prompts])[: len(prompts)]  # sequence B + b is b's copy
        self._behind: list[list[int]] = [[] for _ in prompts]  # tokens that are accepted and not yet in the state

    @torch.inference_mode()
    def verify(self, trees: Mapping[int, DraftTree]) -> dict[int, Verified]:
        """What the model says of the trees of all B sequences, by slot."""
        cache, batch = self._runner.cache, len(trees)
        for values in (cache.states, cache.windows):
            values[:, batch:].copy_(values[:, :batch])
        moving = [sequence for sequence in range(batch) if self._behind[sequence]]
        chains = [DraftTree.chain(self._behind[sequence]) for sequence in moving]
        below = [_below(tokens, tree) for tokens, tree in zip(self._behind, trees.values(), strict=True)]
        advances = [True] * len(chains) + [False] * batch
        logits = read(self._runner, [*chains, *below], [*moving, *range(batch, 2 * batch)], advances)
        self._verified, self._behind = trees, [[] for _ in trees]
        parts = logits.split([len(tree) for tree in (*chains, *below)])[len(chains) :]
        return {slot: Verified(part[len(part) - len(trees[slot]) :]) for slot, part in zip(trees, parts, strict=True)}

    def commit(self, paths: Mapping[int, Sequence[int]]) -> None:
        """Accepts a path, perhaps empty, of each sequence's last tree."""
        self._behind = [tree.tokens[list(paths[slot])].tolist() for slot, tree in self._verified.items()]


def _below(tokens: list[int], tree: DraftTree) -> DraftTree:
    """A tree below a chain of tokens."""
    if not tokens:
        return tree
    count = len(tokens)
    parents = [*range(-1, count - 1), count - 1, *(parent + count for parent in tree.parents.tolist()[1:])]
    return DraftTree([*tokens, *tree.tokens.tolist()], parents)
