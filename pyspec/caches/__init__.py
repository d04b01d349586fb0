"""Caches: where a runner keeps what it knows of committed tokens."""

from pyspec.caches.codebooks import Codebooks
from pyspec.caches.dense import DenseCache
from pyspec.caches.gear import CACHES, GearCache, PackedCache, PackedSettings, cache_from_name
from pyspec.caches.hybrid import HybridCache
from pyspec.caches.residual_vq import ResidualVqCache
from pyspec.caches.saved import load_packed, save_packed
from pyspec.caches.state import StateCache

__all__ = [
    "CACHES",
    "Codebooks",
    "DenseCache",
    "GearCache",
    "HybridCache",
    "PackedCache",
    "PackedSettings",
    "ResidualVqCache",
    "StateCache",
    "cache_from_name",
    "load_packed",
    "save_packed",
]
