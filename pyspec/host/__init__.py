"""Where the drafters' structures come from: the compiled host module, or plain Python without it."""

from __future__ import annotations

import warnings
from functools import cache
from types import ModuleType

__all__ = ["engine"]


@cache
def engine() -> ModuleType:
    """pyspec._host, or pyspec.host.twins, which does the same slowly and says so once."""
    try:
        from pyspec import _host
    except ImportError as error:
        from pyspec.host import twins

        warnings.warn(
            f"pyspec._host cannot be imported ({error}): drafting runs in plain Python, some 50 times slower. "
            "Install pyspec with a C++ compiler to get it.",
            RuntimeWarning,
            stacklevel=2,
        )
        return twins
    return _host
