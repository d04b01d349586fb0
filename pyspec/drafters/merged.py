"""Several drafters in one tree."""

from __future__ import annotations

from collections.abc import Sequence

from pyspec.drafters.growing import GrowingDrafter
from pyspec.drafters.lookup import Lookup
from pyspec.drafters.recycling import Recycling

__all__ = ["MergedDrafter"]


class MergedDrafter(GrowingDrafter):
    """All sources at every node: one goes on below what another found, and a token of several is one node, likelier
    than of either alone.

    Args:
        vocab_size: tokens of the target.
        fingerprint: names the target; a file saved with another one is refused.
        drafters: those to merge, by default lookup and recycling. Their tables are shared with them.

    Raises:
        ValueError: for a drafter of another vocabulary, two of one kind, or none.
        TypeError: for one whose trees do not grow from sources.
    """

    def __init__(self, vocab_size: int, fingerprint: str, drafters: Sequence[GrowingDrafter] | None = None):
        if drafters is None:
            parts = [Lookup(), Recycling(vocab_size)]
        else:
            parts = [part for drafter in drafters for part in _parts(drafter, vocab_size)]
        if not parts:
            raise ValueError("drafters must have at least one to merge, got none")
        names = [part.name for part in parts]
        if len(set(names)) < len(names):
            raise ValueError(f"drafters must be of different kinds, got {[type(part).__name__ for part in parts]}")
        super().__init__(vocab_size, parts, fingerprint)


def _parts(drafter: GrowingDrafter, vocab_size: int) -> list:
    if not isinstance(drafter, GrowingDrafter):
        raise TypeError(
            f"drafters must grow their trees from sources to be merged, got {type(drafter).__name__}: a model's drafts "
            "have laws of their own"
        )
    if drafter.vocab_size != vocab_size:
        raise ValueError(f"drafters must have the vocabulary of {vocab_size} tokens, got {drafter.vocab_size}")
    return drafter.parts
