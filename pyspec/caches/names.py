"""Caches by name: what `generate` and runners take as `cache`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from pyspec.registry import Registry

if TYPE_CHECKING:
    from pyspec.caches.blocks import QuantisedSettings

#: What makes the settings of a name; they are None for keys and values in full precision.
CACHES: Registry[Callable[[], QuantisedSettings | None]] = Registry("pyspec.caches")


def cache_from_name(cache: str | QuantisedSettings) -> QuantisedSettings | None:
    """The settings that `cache` names, None for "dense"; settings pass through.

    Raises:
        TypeError, ValueError: it is no cache.
    """
    if hasattr(cache, "start") and not isinstance(cache, type):
        return cache
    if not isinstance(cache, str):
        raise TypeError(f"cache must be a name or a GearSettings, got {cache!r}")
    return CACHES.named("cache", cache, "or a GearSettings")()
