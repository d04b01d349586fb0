"""Suffix lookup: what followed the longest earlier occurrence of the newest tokens, in many texts."""

from __future__ import annotations

import copy
from array import array
from collections import deque
from collections.abc import Sequence

import numpy as np

from pyspec.drafters import DRAFTERS
from pyspec.drafters.saving import Arrays, Column
from pyspec.drafters.table_drafter import Table, of_tables
from pyspec.host import host

CAPACITY = 2**18  # tokens


class Suffix(Table):
    """A suffix automaton of all sequences, this request's and earlier ones, and of texts beside them (`read_text`).

    The longest match comes first, and of its continuations the most frequent. After "SuffixDecoding", Oliaro et al.,
    arXiv 2411.04975, with an automaton for the suffix tree. A request's tokens stay known to later ones; where they
    must not, take Lookup, or a table of its own for each.

    Args:
        vocab_size: tokens of the target.
        capacity: tokens to know, of some 120 bytes each. When half of them are new, the older half is forgotten.
    """

    name = "suffix_"
    keeps_texts = True

    def __init__(self, vocab_size: int, *, capacity: int = CAPACITY):
        super().__init__(vocab_size)
        if capacity < 2:
            raise ValueError(f"capacity must be at least 2 tokens, got {capacity}")
        self.sources = [host().SuffixLookup(capacity)]
        self._capacity = capacity
        self._texts: deque[array] = deque()  # for saving; shared by all sequences
        self._begin()

    def start(self) -> Suffix:
        table = copy.copy(self)
        table._begin()
        return table

    def read(self, context: Sequence[int], first: int) -> None:
        new = list(context[first:])
        self._cursor = self.sources[0].extend(self._cursor, new)
        if new and not self._text:
            self._texts.append(self._text)
        self._text.extend(new)

    def read_text(self, tokens: Sequence[int]) -> None:
        self.start().read(tokens, 0)

    def saved(self) -> Arrays:
        texts = [np.array([*text, -1], np.int32) for text in self._texts]
        return {"texts": np.concatenate([np.empty(0, np.int32), *texts])[-self._capacity :]}

    def load(self, saved: Arrays) -> None:
        texts = saved["texts"]
        for text in np.split(texts, np.flatnonzero(texts < 0) + 1):
            if len(known := text[text >= 0]):
                self.read_text(known.tolist())

    def layout(self) -> dict[str, Column]:
        return {"texts": Column((-1,), np.int32, -1, self.vocab_size)}

    def _begin(self) -> None:
        self._cursor, self._text = host().Cursor(), array("i")
        while sum(map(len, self._texts)) > self._capacity:
            self._texts.popleft()


DRAFTERS.register(
    "suffix", of_tables(Suffix), "what followed the longest earlier match of the newest tokens, in any text"
)
