"""A drafter in one file, as one would add it: the newest token, again and again."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pyspec.drafters import DRAFTERS, NamedDrafter
from pyspec.tree import DraftTree


class EchoDrafter:
    """Guesses that the text goes on as it is."""

    proposal = "deterministic"

    def start(self, prompt: Sequence[int]) -> EchoDrafter:
        return self

    def propose(self, context: Sequence[int], budget: int) -> DraftTree:
        return DraftTree.chain([context[-1]] * budget)

    def observe(self, tree: DraftTree, logits: torch.Tensor, path: Sequence[int]) -> None:
        """Nothing is learned."""


DRAFTERS.register("echo", NamedDrafter(lambda runner: EchoDrafter()), "the newest token, again and again")
