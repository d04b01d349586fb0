"""What was found out once and is kept in the user's cache folder for the next process: an entry a file, as JSON."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch

from pyspec.machine import cpu_name

if TYPE_CHECKING:
    from pyspec.runners import Runner


def key(model: Runner | None = None, kernel: Mapping[str, str] | None = None, **settings: object) -> str:
    """Names all that an entry depends on.

    Args:
        model: what the entry is about, by its weights and dtypes.
        kernel: what was timed, a row of pyspec.ops.backends; this machine, its threads too, is then in the key.
        settings: whatever else the entry depends on.
    """
    parts = []
    if kernel is not None:
        on_cuda = kernel["device"] == "cuda"
        device = torch.cuda.get_device_name(getattr(model, "device", None)) if on_cuda else cpu_name()
        threads = "" if on_cuda else f", {torch.get_num_threads()} threads"
        parts.append(f"{device}{threads}; {kernel['backend']} {kernel['reason']}")
    if model is not None:
        parts.append(f"{model.fingerprint} {model.dtype} {getattr(model, 'weight_dtype', model.dtype)}")
    return "; ".join([*parts, *(f"{name} {value}" for name, value in settings.items())])


def read(kind: str, key: str) -> object:
    """The entry of a key, which whoever reads it checks; None where there is none or its file is damaged."""
    try:
        kept = json.loads(_file(kind, key).read_text())
        return kept["entry"] if kept["key"] == key else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def keep(kind: str, key: str, entry: object) -> None:
    """Writes an entry; a folder that cannot be written to only means finding it out again."""
    file = _file(kind, key)
    part = file.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
    try:
        folder().mkdir(parents=True, exist_ok=True)
        try:
            part.write_text(json.dumps({"key": key, "entry": entry}))
            part.replace(file)
        finally:
            part.unlink(missing_ok=True)
    except OSError:
        pass


_apart: Path | None = None


@contextmanager
def apart() -> Iterator[None]:
    """Until it ends, this process finds nothing that is kept, and what it keeps is thrown away: for measurements."""
    global _apart
    before = _apart
    with TemporaryDirectory() as folder:
        _apart = Path(folder)
        try:
            yield
        finally:
            _apart = before


def folder() -> Path:
    """The user's cache folder for pyspec, or that of `apart`; it need not exist."""
    return _apart or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyspec"


def _file(kind: str, key: str) -> Path:
    return folder() / f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
