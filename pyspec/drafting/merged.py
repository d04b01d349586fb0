"""Prompt lookup and Token Recycling in one tree."""

from __future__ import annotations

from pyspec.drafting.recycling import RecyclingDrafter

__all__ = ["MergedDrafter"]


class MergedDrafter(RecyclingDrafter):
    """Both sources at every node: recycling goes on below what lookup found, and the other way round.

    A token that both offer is one node, likelier than either alone.
    """

    _lookup = True
