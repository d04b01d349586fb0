"""Pace: how many levels of a tree pay, by what a level costs and what a token costs without it."""

from __future__ import annotations

RISE = 1.05  # of the least time of a level, from round to round: the machine may have become slower
RECENT = 0.1  # what the last round counts in the mean seconds of a token
RIGHT = 0.6  # of the guesses below a right one, as far as is known beforehand


class Pace:
    """Shared by the drafter that a call of generate has and the controller, each of which knows one of two costs.

    Another level, of guesses below nodes that are right with some chances, is expected to save RIGHT times their sum
    in tokens. It pays where that many tokens take longer than the level.
    """

    def __init__(self):
        self._level = self._token = 0.0  # seconds; 0 where nothing is known

    def took_level(self, seconds: float) -> None:
        """Notes the seconds of a level. The least count, for others may have had the processor."""
        self._level = min(seconds, RISE * self._level) if self._level else seconds

    def took_token(self, seconds: float) -> None:
        """Notes the seconds of a round by its tokens."""
        self._token += (RECENT if self._token else 1) * (seconds - self._token)

    @property
    def least(self) -> float:
        """The least sum of chances of the nodes that a level is worth guessing below; 0 while costs are unknown."""
        return self._level / (RIGHT * self._token) if self._token else 0.0
