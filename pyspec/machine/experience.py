"""What requests showed of a drafter on a model: kept, so that the next request begins with it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields

from pyspec.caches import QuantisedSettings
from pyspec.drafters import Drafter
from pyspec.machine import store
from pyspec.machine.costs import key_of
from pyspec.runners import Runner

KEPT_EVERY = 64  # rounds with drafts
DRAFTING = 0.05  # plain steps that proposing is taken to need before any; OF_A_MODEL for a drafter with laws
OF_A_MODEL = 0.3
MEMORY = 0.98  # of what earlier rounds showed, from round to round
RECENT = 0.02  # what a round counts in a mean, at least; the first ones count as in a plain mean
FEW = 8  # rounds that, before any, are taken to have lost nothing
MOST_LOST = 2.0  # plain rounds that one round is taken to have lost at most: a machine may hang


@dataclass
class Experience:
    """Means over the last rounds with drafts, of all requests.

    Attributes:
        rounds: with drafts, so far.
        promised, accepted: drafts by the stated chances, and of them those that were right; older ones count less.
        drafting: plain steps that proposing took.
        lost: plain steps that a round took beyond its tokens; negative where drafts pay.
    """

    rounds: int = 0
    promised: float = 0.0
    accepted: float = 0.0
    drafting: float = DRAFTING
    lost: float = 0.0

    def learn(self, drafting: float, lost: float) -> None:
        """Learns from a round with drafts."""
        self.rounds += 1
        self.drafting += max(RECENT, 1 / self.rounds) * (drafting - self.drafting)
        self.lost += max(RECENT, 1 / (self.rounds + FEW)) * (min(lost, MOST_LOST) - self.lost)

    def learn_drafts(self, promised: float, accepted: int) -> None:
        """Learns how many of some drafts were right, of as many as their chances promised."""
        self.promised = self.promised * MEMORY + promised
        self.accepted = self.accepted * MEMORY + accepted


_kept: dict[tuple, Experience] = {}  # by folder and key: all calls in a process share them


def experience_of(model: Runner, drafter: Drafter, cache: QuantisedSettings | None = None) -> Experience:
    """What earlier requests showed of a drafter on a model on this machine; nothing at a first start.

    cache is that of the texts, None if dense.
    """
    key = f"{key_of(model, cache)}; {described(drafter)}"
    place = store.folder(), key
    if place not in _kept:
        _kept[place] = _KeptExperience.read(key, OF_A_MODEL if hasattr(drafter, "goes_on") else DRAFTING)
    return _kept[place]


class _KeptExperience(Experience):
    """Experience that is written to the user's cache folder now and then: soon at first."""

    key: str

    @classmethod
    def read(cls, key: str, drafting: float) -> _KeptExperience:
        entry = store.read("experience", key)
        names = [field.name for field in fields(Experience)]
        is_sound = isinstance(entry, dict) and sorted(entry) == sorted(names) and all(map(_is_finite, entry.values()))
        experience = cls(**entry) if is_sound else cls(drafting=drafting)
        experience.key = key
        return experience

    def learn(self, drafting: float, lost: float) -> None:
        super().learn(drafting, lost)
        if self.rounds % KEPT_EVERY == 0 or self.rounds in (8, 16, 32):
            store.keep("experience", self.key, asdict(self))


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def described(drafter: Drafter) -> str:
    """What a drafter is, as far as the next process can tell that it has the same."""
    if hasattr(drafter, "described"):
        return drafter.described
    parts = [type(drafter).__name__, *(table.name for table in getattr(drafter, "tables", ()))]
    growth = getattr(drafter, "growth", None)
    parts += [drafter.fingerprint] if hasattr(drafter, "fingerprint") else []
    return " ".join([*parts, *([] if growth is None else [type(growth).__name__])])
