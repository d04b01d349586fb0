"""An acceptance rule in one file, as one would add it: recursive rejection that keeps at most one draft a round."""

from pyspec.acceptance import RULES
from pyspec.acceptance.laws import LawRule, children_of
from pyspec.acceptance.recursive import recursive_rejection
from pyspec.sampling.noise import Noise
from pyspec.tree import Accepted, DraftTree


class OneDraft(LawRule):
    """Looks at the root's children alone."""

    siblings = frozenset({"none", "with replacement", "without replacement"})

    def judge(self, tree: DraftTree, p, q, noise: Noise) -> Accepted:
        children = children_of(tree)[0]
        star = DraftTree([int(tree.tokens[node]) for node in (0, *children)], [-1] + [0] * len(children))
        path, next_token = recursive_rejection(star, {at: p[([0] + children)[at]] for at in range(len(star))}, q, noise)
        return Accepted([([0] + children)[node] for node in path], next_token)


RULES.register("one_draft", OneDraft, "every drawn tree, of which one draft is kept; exact law")
