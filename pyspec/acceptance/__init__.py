"""Acceptance rules: which drafts are kept, and what is emitted in place of the first that is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pyspec.registry import Registry
from pyspec.runners.verified import Verified
from pyspec.sampling.sampler import Sampler
from pyspec.tree import Accepted, DraftTree, Siblings

if TYPE_CHECKING:
    from pyspec.drafters import Drafter

__all__ = ["RULES", "AcceptanceRule", "acceptance_from_name", "check_laws", "settings_of_rules"]

#: What makes the rules that need no settings, by name. One that may have a setting has its keyword as `setting`, and
#: is made of its value by `of_setting`.
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


def acceptance_from_name(name: str | AcceptanceRule, settings: dict[str, Any] | None = None) -> AcceptanceRule:
    """The rule of a name; a rule passes through.

    Args:
        name: of RULES.
        settings: keywords of generate; those of acceptance rules, which are `setting` of theirs, are taken out.

    Raises:
        ValueError: there is no rule of this name, or a setting is that of another rule.
        TypeError: name is neither a name nor a rule.
    """
    settings = {} if settings is None else settings
    is_rule = hasattr(name, "accept") and not isinstance(name, type)
    make = None if is_rule else RULES.named("acceptance", name, "or an acceptance rule")
    for owner, setting in settings_of_rules().items():
        value = settings.pop(setting, None)
        if value is not None and (is_rule or owner != name):
            raise ValueError(f'{setting} is for acceptance="{owner}", got acceptance={name!r}')
        if value is not None:
            return make.of_setting(value)
    return name if is_rule else make()


def settings_of_rules() -> dict[str, str]:
    """The keyword of generate that is a rule's setting, by the rule's name, where it has one."""
    return {name: make.setting for name, make in RULES.items() if hasattr(make, "setting")}


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
