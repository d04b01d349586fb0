"""Prompt lookup: what followed earlier occurrences of the newest tokens."""

from __future__ import annotations

from collections.abc import Sequence

from pyspec.drafters import DRAFTERS
from pyspec.drafters.table_drafter import Table, of_tables
from pyspec.host import host


class Lookup(Table):
    """The n-grams of one sequence, which is continued as the same words were continued before.

    All matches are offered: longer ones first, then the more frequent, then the more recent. Where nothing matches, the
    sequence's frequent tokens are tried.

    Args:
        vocab_size: tokens of the target.
    """

    name = "lookup_"

    def __init__(self, vocab_size: int):
        super().__init__(vocab_size)
        self.sources = [host().NgramIndex()]

    def start(self) -> Lookup:
        return Lookup(self.vocab_size)

    def read(self, context: Sequence[int], first: int) -> None:
        self.sources[0].extend(context[first:])


DRAFTERS.register("lookup", of_tables(Lookup), "what followed earlier occurrences of the newest tokens in this text")
