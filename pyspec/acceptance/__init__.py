"""Acceptance rules: which drafts are kept, and what is said instead of the first that is not."""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

import torch

from pyspec.acceptance.sampling import Sampler
from pyspec.trees import DraftTree

__all__ = ["Accepted", "AcceptanceRule", "acceptance_from_name"]


class Accepted(NamedTuple):
    """path: accepted nodes from the root on, root included; next_token: what the target says after it."""

    path: list[int]
    next_token: int


class AcceptanceRule(Protocol):
    """Turns target logits at every node into an accepted path and the next token."""

    law: Literal["exact", "mixture", "heuristic"]

    def accept(self, tree: DraftTree, logits: torch.Tensor, sampler: Sampler, position: int) -> Accepted:
        """logits [T, V] fp32; position is that of the token which the root's logits predict."""
        ...


def acceptance_from_name(name: str | AcceptanceRule) -> AcceptanceRule:
    """The rule of a name ("exact"); a rule passes through. Raises ValueError for a name there is no rule for."""
    if not isinstance(name, str):
        return name
    if name == "exact":
        from pyspec.acceptance.exact import ExactAcceptance

        return ExactAcceptance()
    raise ValueError(f'acceptance must be "exact" or an acceptance rule, got {name!r}')
