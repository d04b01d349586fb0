"""Caches: where a runner keeps the keys and values of committed tokens."""

from pyspec.caches.dense import DenseCache
from pyspec.caches.gear import CACHES, GearCache, PackedCache, cache_from_name

__all__ = ["CACHES", "DenseCache", "GearCache", "PackedCache", "cache_from_name"]
