"""Caches: where a runner keeps what it knows of committed tokens."""

from pyspec.caches.dense import DenseCache
from pyspec.caches.gear import CACHES, GearCache, PackedCache, cache_from_name
from pyspec.caches.hybrid import HybridCache
from pyspec.caches.state import StateCache

__all__ = ["CACHES", "DenseCache", "GearCache", "HybridCache", "PackedCache", "StateCache", "cache_from_name"]
