"""Which growth fits which acceptance rule."""

from __future__ import annotations

from pyspec.acceptance import AcceptanceRule, acceptance_from_name
from pyspec.drafters.shapes import GrowthPolicy
from pyspec.drafters.shapes.dyspec import DySpecThreshold
from pyspec.drafters.shapes.reranked import TopPaths
from pyspec.drafters.shapes.static import FixedBranching


def growth_for(acceptance: str | AcceptanceRule, depth: int = 5) -> GrowthPolicy:
    """The growth policy whose trees a rule keeps most of, of those that it takes: the likeliest paths for a rule that
    takes every tree, else draws without replacement where it takes them, independent ones, or a chain.

    Args:
        acceptance: a rule or its name, as for generate.
        depth: levels of the likeliest paths.
    """
    siblings = acceptance_from_name(acceptance).siblings
    if siblings is None:
        return TopPaths(width=4, depth=depth)
    if "without replacement" in siblings:
        return DySpecThreshold(0.05)
    if "with replacement" in siblings:
        return FixedBranching((3, 2, 1, 1), "with replacement")
    return FixedBranching((1,) * 6)
