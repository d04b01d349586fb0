"""Drafting ends below a token that the draft was not sure of. As transformers does it, with its own tuning.

    children of a node are drafted if its chance is at least t

t begins at 0.4, transformers' assistant_confidence_threshold. Every 16 drafts it becomes the point of the ROC curve
of the last drafts, "right" against "at least t", where FPR + 3 FNR is least: a stop too early costs three times a draft
too many. transformers remembers all drafts for ever; here it is the last ones, so that another kind of text counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pyspec.controllers import CONTROLLERS
from pyspec.controllers.stop_rule import StopRule, check_threshold, verified_drafts
from pyspec.drafters.shapes import Level
from pyspec.tree import DraftTree

FIRST = 0.4
TUNED_EVERY = 16  # drafts: tuning takes a tenth of a millisecond
REMEMBERED = 256  # drafts
TOO_EARLY = 3.0  # as bad as so many drafts too many


class Confidence(StopRule):
    """Goes on below nodes whose own chance is at least a threshold, which tunes itself. All texts of a call share it.

    Args:
        model, drafter, cache, largest: see StopRule.
        threshold: to begin with, in (0, 1).

    Raises:
        ValueError: for a threshold outside (0, 1), or see StopRule.
    """

    def __init__(self, model, drafter, cache, largest: int, threshold: float = FIRST):
        super().__init__(model, drafter, cache, largest)
        self.threshold = check_threshold(threshold)
        self._chances, self._right = np.zeros(0), np.zeros(0)  # of the last drafts
        self._new = 0  # drafts since it was tuned

    def goes_on(self, slot: int, level: Level) -> np.ndarray:
        """Whether each node was likely enough; the root is sure."""
        return (level.chances >= self.threshold) | (level.depths == 0)

    def observe(self, slot: int, tree: DraftTree, path: Sequence[int], has_stopped: bool) -> None:
        """Tunes the threshold."""
        drafts = list(verified_drafts(tree, path))
        if not drafts:
            return
        found = np.array(drafts)
        self._chances = chances = np.concatenate((self._chances, found[:, 0]))[-REMEMBERED:]
        self._right = right = np.concatenate((self._right, found[:, 1]))[-REMEMBERED:]
        self._new += len(drafts)
        if self._new < TUNED_EVERY:
            return
        self._new = 0
        if 0 < right.sum() < len(right):
            order = np.argsort(-chances, kind="stable")
            hits, falls = np.cumsum(right[order]), np.cumsum(1 - right[order])
            last = np.append(np.diff(chances[order]) != 0, True)  # of drafts that one threshold takes together
            badness = (falls / falls[-1] + TOO_EARLY * (1 - hits / hits[-1]))[last]
            threshold = chances[order][last][np.argmin(badness)]
            self.threshold = float(np.clip(threshold, 0.01, 0.99))


CONTROLLERS.register("confidence", Confidence, "while the last token's chance is high; tunes itself")
