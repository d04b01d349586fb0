"""STAND: what the target thought after the newest tokens, on average."""

from __future__ import annotations

import numpy as np

from pyspec.drafters import DRAFTERS
from pyspec.drafters.saving import Column
from pyspec.drafters.table_drafter import ColumnTable, of_tables
from pyspec.host import host
from pyspec.ops.row_statistics import TOP

CAPACITY = 2**17  # n-grams


class Stand(ColumnTable):
    """The mean of the laws that the target had after an n-gram of 4 to 1 tokens, cut to the 8 best tokens.

    After Song et al., "Accelerated Test-Time Scaling with Model-Free Speculative Sampling", arXiv 2506.04708. There the
    drafts are drawn with noise that is used again and again, and judged by a rule that trusts their law. Here the noise
    is the sampler's own, so that a draft is what the target will draw if its law is the remembered one, and the text of
    a seed stays what it is. The tree is not a fixed one but grows by how often nodes of each kind were accepted. The
    memory outlives a request: several answers to one problem help each other.

    Args:
        vocab_size: tokens of the target.
        capacity: n-grams to know, of some 130 bytes each. When half of them are new, the older half is forgotten.
    """

    name = "stand_"
    needs_logits = True

    def __init__(self, vocab_size: int, *, capacity: int = CAPACITY):
        super().__init__(vocab_size)
        if capacity < 2:
            raise ValueError(f"capacity must be at least 2 n-grams, got {capacity}")
        self.sources = [host().NgramMemory(capacity)]

    def observe(self, tokens, parents, before: list[int], top_tokens: np.ndarray, top_logits: np.ndarray) -> None:
        self.sources[0].update(tokens, parents, before, top_tokens, top_logits)

    def layout(self) -> dict[str, Column]:
        return {
            "keys": Column((-1,), np.uint64),
            "counts": Column((-1,), np.int32, 1),
            "tokens": Column((-1, TOP), np.int32, -1, self.vocab_size),
            "shares": Column((-1, TOP), np.float32, 0, 1.001),
        }


DRAFTERS.register("stand", of_tables(Stand), "the mean of the target's laws after an n-gram, in any text (STAND)")
