"""What was measured on this machine, kept in the user's cache folder for the next process."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

__all__ = ["folder", "keep", "read"]


def read(name: str) -> dict[str, dict]:
    """All entries of a file, by key; empty where there is none or it is damaged."""
    try:
        kept = json.loads(_file(name).read_text())
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def keep(name: str, key: str, entry: dict) -> None:
    """Adds an entry to a file; a folder that cannot be written to only means measuring again."""
    try:
        _file(name).parent.mkdir(parents=True, exist_ok=True)
        part = _file(name).with_suffix(f".{os.getpid()}-{threading.get_ident()}")
        try:
            part.write_text(json.dumps(read(name) | {key: entry}, indent=1))
            part.replace(_file(name))
        finally:
            part.unlink(missing_ok=True)
    except OSError:
        pass


def folder() -> Path:
    """The user's cache folder for pyspec; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyspec"


def _file(name: str) -> Path:
    return folder() / f"{name}.json"
