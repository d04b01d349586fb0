"""A controller in one file, as one would add it: half as many nodes after a round without a draft, else one more."""

from pyspec.controllers import CONTROLLERS, Controller


class HalvingController(Controller):
    """Asks for fewer nodes as long as nothing is accepted."""

    def __init__(self, model, drafter, cache, largest: int):
        super().__init__(largest)
        self._nodes = largest

    @property
    def nodes(self) -> int:
        return self._nodes

    def learn(self, trees, paths, draft_seconds: float, verify_seconds: float) -> None:
        is_accepted = any(len(path) > 1 for path in paths)
        self._nodes = min(self._nodes + 1, self.largest) if is_accepted else max(self._nodes // 2, 2)


CONTROLLERS.register("halving", HalvingController, "half as many while nothing is accepted")
