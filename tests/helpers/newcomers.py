"""Members of a registry that a file outside of pyspec adds, for the time of a test."""

import contextlib
import runpy

import pytest


@contextlib.contextmanager
def registered_by(registry, path):
    """What the file registers is in the registry meanwhile; gives the file's names."""
    len(registry)  # all of pyspec's own are there
    with pytest.MonkeyPatch.context() as patch:
        for table in ("_members", "_summaries"):
            patch.setattr(registry, table, dict(getattr(registry, table)))
        yield runpy.run_path(str(path))
