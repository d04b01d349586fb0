"""The controller that leaves nothing to decide: as many nodes as may be, in every round."""

from __future__ import annotations

from pyspec.controllers import CONTROLLERS, Controller

CONTROLLERS.register("fixed", lambda model, drafter, cache, largest: Controller(largest), "the budget, in every round")
