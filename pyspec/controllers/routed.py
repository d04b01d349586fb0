"""The base of controllers that choose one of several drafters, or none, once for a request, by its prompt."""

from __future__ import annotations

import json
import os
from abc import abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np

from pyspec.controllers import Controller
from pyspec.controllers.prompt_features import PromptFeatures
from pyspec.controllers.trained import read
from pyspec.drafters.several import Several
from pyspec.machine.experience import described


class Routed(Controller):
    """Takes for each text the drafter that promises most by its prompt; none where that is plain decoding.

    What the prompt is like comes from the target's own pass over it. It knows no sizes: "+pays" does.

    Args:
        model, drafter, cache, largest: as every controller that has a name gets them.
        file: of training/routing.py; None is the one for drafters of the demo model.

    Raises:
        ValueError: drafter is not several, or see `choose_from`.
        FileNotFoundError, ValueError: see pyspec.controllers.trained.read.
    """

    name: str  #: of the controller, which files must be for
    chooses = True  #: which of several drafters; "best_arm" need not
    shared = frozenset({"_waiting"})

    def __init__(self, model, drafter, cache, largest: int, file: str | os.PathLike | None = None):
        super().__init__(largest)
        if not isinstance(drafter, Several):
            raise ValueError(f"drafter must be a list of drafters to choose from, got one {type(drafter).__name__}")
        arrays, said = read(self.name, None, file)
        self.choose_from(arrays, json.loads(said["drafters"]), [described(each) for each in drafter.drafters])
        self._waiting: dict[int, Several] = {}  # by slot, until their first round
        self._rests: set[int] = set()  # slots of texts that are decoded plainly

    def start(self, slot: int, drafter: Several) -> None:
        """Asks for the features of a text's prompt."""
        drafter.features = PromptFeatures(drafter.prompt)
        self._waiting[slot] = drafter
        self._rests.discard(slot)

    def budgets(self, slots: Sequence[int]) -> list[int]:
        """As many nodes as may be, or the root alone; chooses for a text in its first round."""
        for slot in slots:
            drafter = self._waiting.pop(slot, None)
            if drafter is not None:
                gains = self.gains(drafter.features.values())
                drafter.features = None
                drafter.arm = int(np.argmax(gains[:-1]))
                if gains[-1] >= gains[drafter.arm]:
                    self._rests.add(slot)
        return [1 if slot in self._rests else self.largest for slot in slots]

    @abstractmethod
    def choose_from(self, arrays: Mapping[str, np.ndarray], known: list[str], drafters: list[str]) -> None:
        """Takes what was trained for known drafters; raises ValueError where it does not do for these."""

    @abstractmethod
    def gains(self, features: np.ndarray) -> np.ndarray:
        """What each drafter promises, and last what none does, by the features of a prompt."""
