"""Several drafters, of which one proposes in each round: which, a controller says."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pyspec.runners.verified import Verified
from pyspec.sampling.sampler import Sampler
from pyspec.tree import DraftTree

if TYPE_CHECKING:
    from pyspec.drafters import Drafter


class Several:
    """Drafters that take turns, `arm` being the number of the one that proposes next.

    All of them learn from every round, so each may be taken at any time: a head or a draft model reads what it missed
    in one call.

    Args:
        drafters: two or more, with deterministic proposals.

    Raises:
        ValueError: for fewer than two, one that draws, several vocabularies, or two that read other layers.
    """

    proposal = "deterministic"
    prompt: Sequence[int] = ()  #: of a sequence's own ones
    features = None  #: of its prompt, a PromptFeatures where a controller wants them

    def __init__(self, drafters: Sequence[Drafter]):
        self.drafters = list(drafters)
        self.arm = 0
        if len(self.drafters) < 2:
            raise ValueError(f"drafters must be two or more, got {len(self.drafters)}")
        for drafter in self.drafters:
            if drafter.proposal != "deterministic":
                raise ValueError(f"drafters must choose their drafts to take turns, but a {_kind(drafter)} draws them")
        sizes = [each.vocab_size for each in self.drafters if hasattr(each, "vocab_size")]
        if len(set(sizes)) > 1:
            raise ValueError(f"drafters must have one vocabulary, got some of {sizes} tokens")
        taps = {tuple(each.taps) for each in self.drafters if getattr(each, "taps", None) is not None}
        if len(taps) > 1:
            raise ValueError(f"drafters must read the same layers, got {sorted(taps)}")
        if taps:
            (self.taps,) = taps

    def start(self, prompt: Sequence[int]) -> Several:
        """Every drafter's own for one new sequence."""
        several = self._of([drafter.start(prompt) for drafter in self.drafters])
        several.prompt = prompt
        return several

    def coupled_to(self, sampler: Sampler) -> Several:
        """These for texts that a sampler draws, see Drafter."""
        return self._of([each.coupled_to(sampler) if hasattr(each, "coupled_to") else each for each in self.drafters])

    def propose(self, context: Sequence[int], budget: int) -> DraftTree:
        """The tree of the drafter whose turn it is."""
        return self.drafters[self.arm].propose(context, budget)

    def observe(self, tree: DraftTree, verified: Verified, path: Sequence[int]) -> None:
        """All of them learn."""
        if self.features is not None:
            self.features.observe(tree, verified)
        for drafter in self.drafters:
            drafter.observe(tree, verified, path)

    def _of(self, drafters: list[Drafter]) -> Several:
        several = copy.copy(self)
        several.drafters = drafters
        return several


def _kind(drafter: Drafter) -> str:
    return type(drafter).__name__
