"""Writes what the kernel-builder variant says of the sources, which change elsewhere: python torch-ext/update.py

build.toml names every source of CMakeLists.txt and the headers it includes; schemas.inc has the schemas of the compiled
ops of pyspec.ops, and pyspec_kernels/__init__.py their names.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {"cpu": ("csrc/cpu/*.cpp", "kernels/cpu/*.cpp"), "cuda": ("csrc/cuda/*.cpp", "kernels/cuda/*.cu")}


def included_by(source: str) -> set[str]:
    """Files of this repository that a file includes."""
    names = re.findall(r'#include "([^"]+)"', (ROOT / source).read_text())
    folders = ((ROOT / source).parent, ROOT / "kernels")
    found = {(folder / name).resolve() for name in names for folder in folders if (folder / name).exists()}
    return {path.relative_to(ROOT).as_posix() for path in found}


def sources(backend: str) -> list[str]:
    """All files that a backend is compiled from."""
    left = [path.relative_to(ROOT).as_posix() for pattern in SOURCES[backend] for path in ROOT.glob(pattern)]
    found: set[str] = set()
    while left:
        source = left.pop()
        if source not in found:
            found.add(source)
            left += included_by(source)
    return sorted(found)


def schemas() -> dict[str, str]:
    """Of the ops that csrc registers a kernel for, by name."""
    import torch

    import pyspec.ops  # noqa: F401  defines them

    bindings = [path.read_text() for path in sorted((ROOT / "csrc").glob("c*/*.cpp"))]
    names = sorted({name for text in bindings for name in re.findall(r'm\.impl\("(\w+)"', text)})
    return {name: str(getattr(torch.ops.pyspec, name).default._schema).removeprefix("pyspec::") for name in names}


def files() -> dict[Path, str]:
    """What the files must hold."""
    build = ROOT / "build.toml"
    text = build.read_text()
    for backend in SOURCES:
        lines = "".join(f'    "{source}",\n' for source in sources(backend))
        text = re.sub(rf"(\[kernel\.{backend}\]\n.*?\nsrc = \[\n).*?\]", rf"\g<1>{lines}]", text, flags=re.DOTALL)

    ops = schemas()
    package = ROOT / "torch-ext/pyspec_kernels/__init__.py"
    head = package.read_text().partition("from ._ops import ops\n")
    named = "".join(f"{name} = ops.{name}\n" for name in ops)
    listed = "".join(f'    "{name}",\n' for name in ops)
    return {
        build: text,
        ROOT / "torch-ext/schemas.inc": "".join(f'm.def("{schema}");\n' for schema in ops.values()),
        package: f"{head[0]}{head[1]}\n{named}\n__all__ = [\n{listed}]\n",
    }


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text)
