"""Caches: where a runner keeps what it knows of committed tokens."""

from pyspec.caches.dense import DenseCache
from pyspec.caches.gear import CACHES, GearCache, PackedCache, cache_from_name
from pyspec.caches.saved import load_packed, save_packed
from pyspec.caches.state import StateCache

__all__ = [
    "CACHES",
    "DenseCache",
    "GearCache",
    "PackedCache",
    "StateCache",
    "cache_from_name",
    "load_packed",
    "save_packed",
]
