"""Token Recycling: what the target last thought could follow each token."""

from __future__ import annotations

import numpy as np

from pyspec.drafters import DRAFTERS
from pyspec.drafters.saving import Arrays, Column
from pyspec.drafters.table_drafter import Table, of_tables
from pyspec.host import host


class Recycling(Table):
    """The 8 best tokens of every logits row that was seen, by the token that it came after and by the last two.

    After Luo et al., "Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token
    Recycling", arXiv 2408.08696, but grown to a budget instead of a fixed template, and read from the prompt too.
    The rows (48 bytes a token and 3 MB) outlive a request: later ones start from them.

    Args:
        vocab_size: tokens of the target.
    """

    name = ""
    needs_logits = True

    def __init__(self, vocab_size: int):
        super().__init__(vocab_size)
        self.sources = [host().Adjacency(vocab_size, context) for context in (1, 2)]

    def observe(self, tokens, parents, before: list[int], top_tokens: np.ndarray, top_logits: np.ndarray) -> None:
        for adjacency in self.sources:
            adjacency.update(tokens, parents, before[-1] if before else -1, top_tokens, top_logits)

    def saved(self) -> Arrays:
        return {
            f"{field}_{context}": getattr(adjacency, field)
            for context, adjacency in enumerate(self.sources, start=1)
            for field in ("keys", "successors", "levels")
        }

    def load(self, saved: Arrays) -> None:
        for name, table in self.saved().items():
            table[:] = saved[name]

    def layout(self) -> dict[str, Column]:
        ranges = {"successors": (-1, self.vocab_size), "levels": (0, self.sources[0].level_count)}
        return {
            name: Column(table.shape, table.dtype, *ranges.get(name.split("_")[0], ()))
            for name, table in self.saved().items()
        }


DRAFTERS.register("recycling", of_tables(Recycling), "what the target thought could follow a token or two, in any text")
