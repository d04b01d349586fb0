"""Prompt lookup: what followed earlier occurrences of the newest tokens."""

from __future__ import annotations

from collections.abc import Sequence

from pyspec.drafters.growing import GrowingDrafter, Part
from pyspec.host import engine

__all__ = ["LookupDrafter"]


class Lookup(Part):
    """The n-grams of one sequence."""

    name = "lookup_"

    def __init__(self):
        self.sources = [engine().NgramIndex()]

    def start(self) -> Lookup:
        return Lookup()

    def read(self, context: Sequence[int], first: int) -> None:
        self.sources[0].extend(context[first:])


class LookupDrafter(GrowingDrafter):
    """Continues as the same words were continued before, in this sequence.

    All matches become one tree: longer ones first, then the more frequent, then the more recent. Where nothing
    matches, the sequence's frequent tokens are tried.
    """

    def __init__(self, vocab_size: int):
        super().__init__(vocab_size, [Lookup()])
