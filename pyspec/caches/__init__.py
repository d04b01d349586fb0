"""Caches: where a runner keeps the keys and values of committed tokens."""

from pyspec.caches.dense import DenseCache

__all__ = ["DenseCache"]
