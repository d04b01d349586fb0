"""Prompt lookup: what followed earlier occurrences of the newest tokens."""

from __future__ import annotations

from pyspec.drafting.growing import GrowingDrafter

__all__ = ["LookupDrafter"]


class LookupDrafter(GrowingDrafter):
    """Continues as the same words were continued before, in this sequence.

    All matches become one tree: longer ones first, then the more frequent, then the more recent. Where nothing
    matches, the sequence's frequent tokens are tried.
    """

    def __init__(self, vocab_size: int):
        super().__init__(vocab_size, lookup=True, recycling=False)
