"""Stats: what a call of generate did, and where its time went."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from pyspec.runners import Runner

PHASES = ("draft", "verify", "accept", "commit")  # of a round


@dataclass
class Stats:
    """What a call of generate did, and where the time went.

    A batch counts a round once; its accepted lengths are counted for each sequence that took part.
    """

    seed: int
    new_tokens: int = 0
    prefix_tokens: int = 0  #: of prompts that need not be read, for they were known: see docs/serving.md
    rounds: int = 0
    nodes: int = 0  #: tree nodes verified, roots included
    accepted_lengths: list[int] = field(default_factory=list)  #: at k, how often one sequence's round gave k tokens
    prefill_seconds: float = 0.0  #: with the drafter's reading of the prompt
    draft_seconds: float = 0.0  #: propose and observe
    verify_seconds: float = 0.0
    accept_seconds: float = 0.0
    commit_seconds: float = 0.0
    total_seconds: float = 0.0  #: without what it waited for other calls on the model

    clock: ClassVar[Callable[[], float]] = staticmethod(time.perf_counter)  # tests put in their own

    def timed(self, phase: str) -> _Timed:
        """A context whose time is added to a phase: "prefill", "draft", "verify", "accept", "commit" or "total"."""
        return _Timed(self, f"{phase}_seconds")

    def count(self, nodes: int, tokens: int) -> None:
        """Counts one sequence's part of a round: a tree of so many nodes gave so many tokens."""
        self.nodes += nodes
        self.accepted_lengths += [0] * (tokens + 1 - len(self.accepted_lengths))
        self.accepted_lengths[tokens] += 1

    @property
    def mean_accepted_length(self) -> float:
        """Tokens that a round gave a sequence; 1 is plain decoding, 0 means that there was no round."""
        tokens = sum(length * count for length, count in enumerate(self.accepted_lengths))
        return tokens / max(1, sum(self.accepted_lengths))

    @property
    def acceptance_by_depth(self) -> list[float]:
        """The acceptance rate at each depth d, at d - 1: shares of all rounds, whose sum is the mean length - 1."""
        rounds = max(1, sum(self.accepted_lengths))
        return [sum(self.accepted_lengths[length:]) / rounds for length in range(2, len(self.accepted_lengths))]

    @property
    def decode_seconds(self) -> float:
        """All time but the prefill."""
        return self.total_seconds - self.prefill_seconds

    @property
    def tokens_per_second(self) -> float:
        """Tokens of the rounds over the decode time; the tokens that the prefill gave are not counted."""
        tokens = sum(length * count for length, count in enumerate(self.accepted_lengths))
        return tokens / self.decode_seconds if tokens else 0.0

    @property
    def tokens_per_second_with_prefill(self) -> float:
        """All new tokens over all time."""
        return self.new_tokens / self.total_seconds if self.new_tokens else 0.0

    def to_dict(self) -> dict:
        """All figures, the derived ones included, ready for JSON."""
        derived = (
            "mean_accepted_length",
            "acceptance_by_depth",
            "decode_seconds",
            "tokens_per_second",
            "tokens_per_second_with_prefill",
        )
        return asdict(self) | {name: getattr(self, name) for name in derived}


class _Timed:
    """A context whose time is added to a field of stats."""

    __slots__ = ("_stats", "_name", "_start")

    def __init__(self, stats: Stats, name: str):
        self._stats, self._name = stats, name

    def __enter__(self) -> None:
        self._start = self._stats.clock()

    def __exit__(self, *error) -> None:
        seconds = self._stats.clock() - self._start
        setattr(self._stats, self._name, getattr(self._stats, self._name) + seconds)


def clock_of(model: Runner) -> Callable[[], float]:
    """What tells the seconds that calls of a model take: this process's clock, unless the model has one of its own."""
    return getattr(model, "clock", time.perf_counter)
