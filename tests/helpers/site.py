"""The pages of docs/, and its modules as Sphinx loads them."""

import importlib
import importlib.util
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = {str(path.relative_to(DOCS).with_suffix("")): path.read_text() for path in DOCS.rglob("*.md")}


def load_extension(name: str):
    """A module of docs/, as Sphinx loads it."""
    spec = importlib.util.spec_from_file_location(f"site_{name}", DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    with mock.patch.object(sys, "path", [str(DOCS), *sys.path]):  # conf.py does the same
        spec.loader.exec_module(module)
    return module
