"""A controller in one file, as one would add it: half as many nodes after a round without a draft, else one more."""

from collections.abc import Sequence

from pyspec.controllers import CONTROLLERS
from pyspec.tree import DraftTree


class HalvingController:
    """Asks for fewer nodes as long as nothing is accepted."""

    def __init__(self, model, drafter, cache, largest: int):
        self.nodes = self.largest = largest

    def cut(self, trees: Sequence[DraftTree]) -> list[DraftTree]:
        return list(trees)

    def learn(self, trees, paths, draft_seconds: float, verify_seconds: float) -> None:
        is_accepted = any(len(path) > 1 for path in paths)
        self.nodes = min(self.nodes + 1, self.largest) if is_accepted else max(self.nodes // 2, 2)


CONTROLLERS.register("halving", HalvingController, "half as many while nothing is accepted")
