"""Suffix lookup: what followed the longest earlier occurrence of the newest tokens, in many texts."""

from __future__ import annotations

import copy
from array import array
from collections import deque
from collections.abc import Sequence

import numpy as np

from pyspec.drafters.growing import GrowingDrafter, Part
from pyspec.drafters.saving import Column, Tables
from pyspec.host import engine

__all__ = ["SuffixDrafter"]

CAPACITY = 2**18  # tokens


class Suffix(Part):
    """A suffix automaton of all sequences and of what was read beside them."""

    name = "suffix_"
    wants_texts = True

    def __init__(self, vocab_size: int, capacity: int):
        if capacity < 2:
            raise ValueError(f"capacity must be at least 2 tokens, got {capacity}")
        self.sources = [engine().SuffixLookup(capacity)]
        self._vocab_size, self._capacity = vocab_size, capacity
        self._texts: deque[array] = deque()  # for saving; shared by all sequences
        self._begin()

    def start(self) -> Suffix:
        part = copy.copy(self)
        part._begin()
        return part

    def read(self, context: Sequence[int], first: int) -> None:
        new = list(context[first:])
        self._cursor = self.sources[0].extend(self._cursor, new)
        if new and not self._text:
            self._texts.append(self._text)
        self._text.extend(new)

    def read_text(self, tokens: Sequence[int]) -> None:
        self.start().read(tokens, 0)

    def tables(self) -> Tables:
        texts = [np.array([*text, -1], np.int32) for text in self._texts]
        return {"texts": np.concatenate([np.empty(0, np.int32), *texts])[-self._capacity :]}

    def load(self, tables: Tables) -> None:
        texts = tables["texts"]
        for text in np.split(texts, np.flatnonzero(texts < 0) + 1):
            if len(known := text[text >= 0]):
                self.read_text(known.tolist())

    def layout(self) -> dict[str, Column]:
        return {"texts": Column((-1,), np.int32, -1, self._vocab_size)}

    def _begin(self) -> None:
        self._cursor, self._text = engine().Cursor(), array("i")
        while sum(map(len, self._texts)) > self._capacity:
            self._texts.popleft()


class SuffixDrafter(GrowingDrafter):
    """Continues as the same words were continued before: in this request, in earlier ones, or in a text that it was
    given (`read_text`). The longest match comes first, and of its continuations the most frequent.

    After "SuffixDecoding", Oliaro et al., arXiv 2411.04975, with an automaton for the suffix tree. A request's tokens
    stay known to later ones; where they must not, take "lookup" or a drafter of its own for each.

    Args:
        vocab_size: tokens of the target.
        fingerprint: names the target; a file saved with another one is refused.
        capacity: tokens to know, of some 120 bytes each. When half of them are new, the older half is forgotten.
    """

    def __init__(self, vocab_size: int, fingerprint: str, *, capacity: int = CAPACITY):
        super().__init__(vocab_size, [Suffix(vocab_size, capacity)], fingerprint)
