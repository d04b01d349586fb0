"""The one door to the structures that run on the host: the compiled module pyspec._host, or their twins in Python."""

from __future__ import annotations

import warnings
from functools import cache
from types import ModuleType

__all__ = ["compiled", "host"]


@cache
def compiled() -> ModuleType | None:
    """pyspec._host, or None where it cannot be imported, which a warning says once."""
    try:
        from pyspec import _host
    except ImportError as error:
        warnings.warn(
            f"pyspec._host cannot be imported ({error}): drafting runs in plain Python, some 50 times slower. "
            "Install the wheel of this Python and processor to get it, or from source with a C++ compiler.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return _host


@cache
def host() -> ModuleType:
    """pyspec._host, or pyspec.host.twins, which does the same slowly."""
    if (module := compiled()) is not None:
        return module
    from pyspec.host import twins

    return twins
