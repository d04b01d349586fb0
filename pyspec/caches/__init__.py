"""Caches: where a runner keeps what it knows of committed tokens."""

from pyspec.caches.dense import DenseCache
from pyspec.caches.state import StateCache

__all__ = ["DenseCache", "StateCache"]
