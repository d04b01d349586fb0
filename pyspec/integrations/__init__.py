"""pyspec inside other engines: each module is imported only when asked for, and changes nothing by being imported."""

from __future__ import annotations

__all__ = ["require"]


def require(package: str, first: str, beyond: str) -> None:
    """Raises ImportError unless a version in [first, beyond) of a package is installed."""
    from importlib.metadata import PackageNotFoundError, version

    from packaging.version import Version

    wanted = f"{package}>={first},<{beyond}"
    try:
        found = version(package)
    except PackageNotFoundError:
        raise ImportError(f"this needs {package}: pip install '{wanted}'") from None
    if not Version(first) <= Version(found) < Version(beyond):
        raise ImportError(f"{package} must be in [{first}, {beyond}), got {found}: pip install '{wanted}'")
