"""Token Recycling: what the target last thought could follow each token."""

from __future__ import annotations

import numpy as np

from pyspec.drafters.growing import GrowingDrafter, Part
from pyspec.drafters.saving import Column, Tables
from pyspec.host import engine

__all__ = ["RecyclingDrafter"]


class Recycling(Part):
    """Rows of successors by the last token, and by the last two."""

    name = ""
    wants_logits = True

    def __init__(self, vocab_size: int):
        self.sources = [engine().Adjacency(vocab_size, context) for context in (1, 2)]
        self._vocab_size = vocab_size

    def observe(self, tokens, parents, before: list[int], top_tokens: np.ndarray, top_logits: np.ndarray) -> None:
        for adjacency in self.sources:
            adjacency.update(tokens, parents, before[-1] if before else -1, top_tokens, top_logits)

    def tables(self) -> Tables:
        return {
            f"{field}_{context}": getattr(adjacency, field)
            for context, adjacency in enumerate(self.sources, start=1)
            for field in ("keys", "successors", "levels")
        }

    def load(self, tables: Tables) -> None:
        for name, table in self.tables().items():
            table[:] = tables[name]

    def layout(self) -> dict[str, Column]:
        ranges = {"successors": (-1, self._vocab_size), "levels": (0, self.sources[0].level_count)}
        return {
            name: Column(table.shape, table.dtype, *ranges.get(name.split("_")[0], ()))
            for name, table in self.tables().items()
        }


class RecyclingDrafter(GrowingDrafter):
    """Keeps the 8 best tokens of every logits row it sees, by the token that it came after and by the last two.

    After Luo et al., "Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token
    Recycling", arXiv 2408.08696, but grown to a budget instead of a fixed template, and read from the prompt too.
    The tables (48 bytes a token and 3 MB) outlive a request: later ones start from them.

    Args:
        vocab_size: tokens of the target.
        fingerprint: names the target; a file saved with another one is refused.
    """

    def __init__(self, vocab_size: int, fingerprint: str):
        super().__init__(vocab_size, [Recycling(vocab_size)], fingerprint)
