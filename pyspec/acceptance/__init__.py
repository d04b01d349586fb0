"""Acceptance rules: which drafts are kept, and what is emitted in place of the first that is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, Protocol

from pyspec.registry import Registry
from pyspec.runners.verified import Verified
from pyspec.sampling.sampler import Sampler
from pyspec.tree import Accepted, DraftTree, Siblings

if TYPE_CHECKING:
    from pyspec.drafters import Drafter

__all__ = ["RULES", "AcceptanceRule", "acceptance_from_name", "check_laws"]

#: What makes the rules that need no settings, by name.
RULES: Registry[Callable[[], AcceptanceRule]] = Registry("pyspec.acceptance")


class AcceptanceRule(Protocol):
    """Turns target logits at every node into an accepted path and the next token.

    Attributes:
        law: of the text. "exact" is the target's, "mixture" a stated mixture with the drafter's, "heuristic" neither.
        siblings: None if the rule takes every tree, whoever made it. A rule that trusts tree.q takes drawn trees only,
            and of those the ones whose siblings were drawn in one of these ways.
    """

    law: Literal["exact", "mixture", "heuristic"]
    siblings: frozenset[Siblings] | None

    def accept(self, tree: DraftTree, verified: Verified, sampler: Sampler, position: int) -> Accepted:
        """Judges a verified tree; position is that of the token which the root's logits predict."""
        ...


def acceptance_from_name(name: str | AcceptanceRule) -> AcceptanceRule:
    """The rule of a name; a rule passes through. Raises ValueError for a name there is no rule for, else TypeError."""
    if hasattr(name, "accept") and not isinstance(name, type):
        return name
    return RULES.named("acceptance", name, "or an acceptance rule")()


def check_laws(drafter: Drafter | None, rule: AcceptanceRule) -> None:
    """Raises ValueError for a drafter and a rule that together would bias the text, saying what to use instead."""
    if drafter is None or rule.siblings is None:
        return
    names = f"{type(rule).__name__} and {type(drafter).__name__}"
    if drafter.proposal == "deterministic":
        raise ValueError(
            f"{names} do not go together: the rule takes drafts for draws from a law q, but these are chosen, and "
            f'scoring them as if they were drawn biases the text. Use acceptance="exact", or a drafter that draws'
        )
    if drafter.siblings not in rule.siblings:
        raise ValueError(
            f"{names} do not go together: the rule is for siblings drawn as {' or '.join(sorted(rule.siblings))}, the "
            f"drafter's are {drafter.siblings}, and the wrong q biases the text or fails. Use "
            'acceptance="traversal" or "recursive", which take what was drawn out of q'
        )
