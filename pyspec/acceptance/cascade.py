"""Speculative cascades, lossy by a stated law: where the drafter is good enough, its law is the text's."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from pyspec.acceptance import RULES
from pyspec.acceptance.laws import DraftLaws, LawRule, TargetLaws, children_of
from pyspec.acceptance.recursive import recursive_rejection
from pyspec.arguments import described, read_integer, read_number
from pyspec.runners.verified import Verified
from pyspec.sampling.noise import Noise
from pyspec.sampling.sampler import InvalidLogits, Sampler
from pyspec.tree import Accepted, DraftTree

Deferral = Callable[[np.ndarray, np.ndarray, float], "np.ndarray | bool"]
Free = Callable[[int, list[int]], "int | None"]


def entropy(law: np.ndarray) -> float:
    """The entropy of a law [V], in nats."""
    positive = law[law > 0]
    return float(-(positive * np.log(positive)).sum())


def distance(p: np.ndarray, q: np.ndarray) -> float:
    """The total variation of two laws [V]."""
    return float(np.maximum(p - q, 0).sum())


#: Whether a position, or each of its tokens [V], is left to the target: functions of p, q [V] and alpha. Those of
#: tokens are named token_..., and of those token_v3 alone needs no q.
DEFERRALS: dict[str, Deferral] = {
    "chow": lambda p, q, alpha: q.max() < 1 - alpha,
    "chow_log": lambda p, q, alpha: entropy(q) > alpha,
    "diff": lambda p, q, alpha: q.max() < p.max() - alpha,
    "diff_log": lambda p, q, alpha: entropy(q) > entropy(p) + alpha,
    "opt": lambda p, q, alpha: q.max() < p.max() - alpha * distance(p, q),
    "token_v1": lambda p, q, alpha: q < p.max() - alpha * distance(p, q),
    "token_v2": lambda p, q, alpha: p < p.max() - alpha * distance(p, q),
    "token_v3": lambda p, q, alpha: p < (1 - alpha) * p.max(),
}


def cascade_law(p: np.ndarray, q: np.ndarray, deferred: np.ndarray) -> np.ndarray:
    """The law pi [V] of a cascade: pi(v) = (1 - r(v)) q(v) + eta p(v), where eta is the sum of r(v) q(v).

    It is q where nothing is deferred, and p where all is.

    Args:
        p, q: [V] float64 laws of target and drafter.
        deferred: [V] bool, r: whether a token is left to the target.
    """
    return np.where(deferred, 0, q) + q[deferred].sum() * p


class CascadeAcceptance(LawRule):
    """Accepts drafts for draws of pi, a law between drafter and target (Narasimhan et al., arXiv 2405.19261).

    With drawn drafts (tree.q is there), the text's law after a node with drafts is exactly pi of `cascade_law`, and p
    after a leaf. With chosen ones, which token_v3 alone takes, the likeliest child whose token is not deferred is
    accepted, else the target's own draw is followed: "relaxed acceptance".

    Greedily, p is the law at temperature 1: the likeliest child whose token is not deferred is accepted, else the
    target's likeliest token is followed.

    Args:
        deferral: alpha, in [0, 1]: what deferring costs: 0 defers most. Greedily, token_v3 is exact then.
        rule: a name of DEFERRALS. Chow's two look at the drafter alone; opt and the token rules are the paper's.
        top: token_v3 also defers all but so many likeliest tokens; None defers none for that.

    Raises:
        ValueError, TypeError: naming the argument that is out of range.
    """

    law = "mixture"
    setting = "deferral"

    def __init__(self, deferral: float = 0.1, rule: str = "token_v3", top: int | None = None):
        self.deferral = read_number("deferral", deferral)
        if not 0 <= self.deferral <= 1:
            raise ValueError(f"deferral must be in [0, 1], got {deferral}")
        if not isinstance(rule, str) or rule not in DEFERRALS:
            raise ValueError(f"rule must be one of {', '.join(DEFERRALS)}, got {rule!r}")
        if top is not None and (rule != "token_v3" or read_integer("top", top, "an integer or None") < 1):
            raise ValueError(f"top must be at least 1, and is for token_v3, got {top} for {rule}")
        self.rule, self.top = rule, top
        self.siblings = None if rule == "token_v3" else frozenset({"none", "with replacement", "without replacement"})

    @classmethod
    def of_setting(cls, setting: float | Mapping) -> CascadeAcceptance:
        """The rule of generate's `deferral`: alpha, or a mapping with alpha and perhaps rule and top."""
        if not isinstance(setting, Mapping):
            return cls(setting)
        if "alpha" not in setting or set(setting) - {"alpha", "rule", "top"}:
            raise ValueError(f"deferral must have an alpha, and perhaps rule and top, got {described(setting)}")
        return cls(setting["alpha"], setting.get("rule", "token_v3"), setting.get("top"))

    def accept(self, tree: DraftTree, verified: Verified, sampler: Sampler, position: int) -> Accepted:
        if sampler.temperature and tree.q is not None:
            return super().accept(tree, verified, sampler, position)
        draw = sampler.draws(tree, verified)
        if self.rule == "token_v3" and self.top is None and isinstance(sampler, Sampler) and sampler.keeps_all:
            return self._follow(tree, _Ratios(verified, sampler.temperature or 1.0, self.deferral), draw, position)
        return self._follow(tree, _Deferred(self, tree, verified, sampler), draw, position)

    def judge(self, tree: DraftTree, p, q, noise: Noise) -> Accepted:
        return recursive_rejection(tree, _Mixed(self, tree, p, q), q, noise)

    def deferred(self, p: np.ndarray, q: np.ndarray | None) -> np.ndarray:
        """Which tokens [V] are left to the target, from the laws [V] of target and drafter; token_v3 needs no q."""
        deferred = np.broadcast_to(DEFERRALS[self.rule](p, q, self.deferral), p.shape)
        if self.top is not None and self.top < len(p):
            deferred = deferred | (p < np.partition(p, -self.top)[-self.top])
        return deferred

    def _follow(self, tree: DraftTree, free: Free, draw: Callable[[int, int], int], position: int) -> Accepted:
        """Goes to the likeliest child that is not deferred, else to the target's own draw."""
        children, tokens = children_of(tree), tree.tokens.tolist()
        path, node = [], 0
        while True:
            path.append(node)
            below = children[node]
            if below and (best := free(node, [tokens[child] for child in below])) is not None:
                node = below[best]
                continue
            try:
                token = draw(node, position + len(path) - 1)
            except InvalidLogits as error:
                raise InvalidLogits(str(error), path) from error
            node = next((child for child in below if tokens[child] == token), None)
            if node is None:
                return Accepted(path, token)


class _Deferred:
    """The place of the likeliest of some tokens after a node that are not deferred, None if all are."""

    def __init__(self, rule: CascadeAcceptance, tree: DraftTree, verified: Verified, sampler: Sampler):
        self._rule, self._p = rule, TargetLaws(tree, verified, sampler, greedy_at=1.0)
        self._q = None if tree.q is None else DraftLaws(tree)

    def __call__(self, node: int, tokens: list[int]) -> int | None:
        law = self._p[node]
        deferred = self._rule.deferred(law, None if self._q is None else self._q[node])
        free = [place for place, token in enumerate(tokens) if not deferred[token]]
        return max(free, key=lambda place: law[tokens[place]]) if free else None


class _Ratios:
    """_Deferred of token_v3 over whole laws, from logits alone: p(v) / max p needs no sum over the vocabulary."""

    def __init__(self, verified: Verified, temperature: float, deferral: float):
        self._logits, self._temperature, self._least = verified.logits, temperature, 1 - deferral

    def __call__(self, node: int, tokens: list[int]) -> int | None:
        row = self._logits[node]
        below_best = (row[tokens] - row.max()).double().cpu().numpy() / self._temperature
        best = int(below_best.argmax())
        return best if np.exp(below_best[best]) >= self._least else None  # never where the best logit is NaN


class _Mixed:
    """The laws of a cascade, by node; p where nothing is drafted."""

    def __init__(self, rule: CascadeAcceptance, tree: DraftTree, p, q):
        self._rule, self._p, self._q = rule, p, q
        self._has_children = set(tree.parents.tolist())

    def __getitem__(self, node: int) -> np.ndarray:
        p = self._p[node]
        if node not in self._has_children:
            return p
        q = self._q[node]
        return cascade_law(p, q, self._rule.deferred(p, q))


RULES.register(
    "cascade", CascadeAcceptance, "every tree; a law between drafter and target, by deferral (arXiv 2405.19261)"
)
