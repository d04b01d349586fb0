"""ADED: which tokens follow two others in texts, and lately."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pyspec.drafters import DRAFTERS
from pyspec.drafters.saving import Column
from pyspec.drafters.table_drafter import ColumnTable, of_tables
from pyspec.host import host

CAPACITY = 2**17  # pairs of tokens
FOLLOWERS = 12  # of a pair
WINDOW = 16  # newest tokens whose trigrams get a bonus in every round


class Aded(ColumnTable):
    """Counts of trigrams in all texts that are read, requests and corpora alike; those of the newest tokens come first.

    After Liu et al., "Adaptive Draft-Verification for Efficient Large Language Model Decoding", arXiv 2407.12021, with
    its table (12 followers of a pair) and its bonus (0.04 a round for each trigram of the newest 16 tokens). Their
    search of the tree by Monte Carlo tries to find what best-first growth finds at once: the likeliest nodes.

    Args:
        vocab_size: tokens of the target.
        capacity: pairs to know, of some 120 to 240 bytes each. When half of them are new, the older half is forgotten.
    """

    name = "aded_"
    keeps_texts = True

    def __init__(self, vocab_size: int, *, capacity: int = CAPACITY):
        super().__init__(vocab_size)
        if capacity < 2:
            raise ValueError(f"capacity must be at least 2 pairs, got {capacity}")
        self.sources = [host().Trigrams(capacity)]

    def read(self, context: Sequence[int], first: int) -> None:
        start = max(0, first - 2)
        self.sources[0].extend(list(context[start:]), first - start)

    def prepare(self, context: Sequence[int]) -> None:
        self.sources[0].reward(list(context[-WINDOW:]))

    def read_text(self, tokens: Sequence[int]) -> None:
        self.sources[0].extend(list(tokens), 0)

    def layout(self) -> dict[str, Column]:
        return {
            "keys": Column((-1,), np.uint64),
            "totals": Column((-1,), np.int32, 0),
            "tokens": Column((-1, FOLLOWERS), np.int32, -1, self.vocab_size),
            "counts": Column((-1, FOLLOWERS), np.int32, 0),
            "bonuses": Column((-1, FOLLOWERS), np.float32, 0, 3.001),
        }


DRAFTERS.register("aded", of_tables(Aded), "trigrams of all texts read, those of the newest tokens first (ADED)")
