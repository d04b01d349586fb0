"""The base of stop rules that a network decides, which training/stop_rules.py trains."""

from __future__ import annotations

import math
import os

from pyspec.controllers.stop_rule import StopRule, check_threshold
from pyspec.controllers.trained import Classifier, read


class TrainedRule(StopRule):
    """A stop rule that goes on where a network's chance is at least a threshold.

    Args:
        model, drafter, cache, largest: see StopRule.
        file: of training/stop_rules.py; None is the one for the demo head.

    Attributes:
        chance: the network, chances [N] of features [N, F].
        threshold: in (0, 1).

    Raises:
        FileNotFoundError, ValueError: see pyspec.controllers.trained.read, or StopRule.
    """

    name: str  #: of the controller, which files must be for
    inputs: int  #: F

    def __init__(self, model, drafter, cache, largest: int, file: str | os.PathLike | None = None):
        super().__init__(model, drafter, cache, largest)
        arrays, said = read(self.name, drafter.fingerprint, file)
        self.chance = Classifier(arrays, self.inputs)
        try:
            self.threshold = check_threshold(float(said.get("threshold", math.nan)))
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
