"""build.toml builds what CMake builds: all sources and headers are named, and the schemas are those of pyspec/ops."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import pyspec.ops  # noqa: F401  defines the ops

tomllib = pytest.importorskip("tomllib")

ROOT = Path(__file__).parent.parent
BUILD = tomllib.loads((ROOT / "build.toml").read_text())
CMAKE = (ROOT / "CMakeLists.txt").read_text()
SCHEMAS = re.findall(r'^m\.def\("(.*)"\);$', (ROOT / "torch-ext/schemas.inc").read_text(), re.MULTILINE)
COMPILED = (".cpp", ".cu")


def cmake_sources(*variables: str) -> set[str]:
    """The files of some file(GLOB ...) of CMakeLists.txt."""
    patterns = dict(re.findall(r"file\(GLOB (\w+) CONFIGURE_DEPENDS (\S+)\)", CMAKE))
    return {str(path.relative_to(ROOT)) for variable in variables for path in ROOT.glob(patterns[variable])}


def included_by(source: str) -> set[str]:
    """Files of this repository that a file includes."""
    found = set()
    for name in re.findall(r'#include "([^"]+)"', (ROOT / source).read_text()):
        for folder in (ROOT / source).parent, ROOT / "kernels":
            if (folder / name).exists():
                found.add(str((folder / name).resolve().relative_to(ROOT)))
    return found


@pytest.mark.parametrize(
    "backend, variables",
    [("cpu", ("CPU_BINDINGS", "CPU_KERNELS")), ("cuda", ("CUDA_BINDINGS", "CUDA_KERNELS"))],
)
def test_sources_are_those_of_cmake(backend, variables):
    listed = set(BUILD["kernel"][backend]["src"])
    assert {source for source in listed if source.endswith(COMPILED)} == cmake_sources(*variables)
    headers = set().union(*map(included_by, listed))  # the builder copies what is listed, and nothing else
    assert headers <= listed, f"build.toml lacks {sorted(headers - listed)}"
    assert {source for source in listed if not source.endswith(COMPILED)} <= headers, "a header that nothing includes"


def test_every_kernel_is_listed():
    listed = {source for kernel in BUILD["kernel"].values() for source in kernel["src"]}
    folders = ("kernels/cpu", "kernels/cuda", "kernels/params", "csrc/cpu", "csrc/cuda")
    files = {str(path.relative_to(ROOT)) for folder in folders for path in (ROOT / folder).iterdir()}
    assert files <= listed, f"build.toml lacks {sorted(files - listed)}"


def test_files_exist():
    sections = [BUILD["torch"], *BUILD["kernel"].values()]
    for name in (name for section in sections for name in (*section["src"], *section.get("include", ()))):
        assert (ROOT / name).exists(), name
    assert (ROOT / "flake.nix").exists()


def test_flags_are_those_of_cmake():
    flags = re.search(r"set\(KERNEL_FLAGS (.*)\)", CMAKE)[1].split()
    assert flags == BUILD["kernel"]["cpu"]["cxx-flags"][: len(flags)]
    target = re.search(r"TORCH_TARGET_VERSION=(0x\w+)ULL", CMAKE)[1]
    for version in BUILD["torch"]["stable-abi"].values():
        major, minor = map(int, version.split("."))
        assert (major << 56) + (minor << 48) == int(target, 16)


def test_general_section():
    general = BUILD["general"]
    assert re.fullmatch("[a-z][-a-z0-9]*[a-z0-9]", general["name"])
    assert set(general["backends"]) == {kernel["backend"] for kernel in BUILD["kernel"].values()}
    assert set(general) == {"name", "version", "edition", "license", "backends"}


def test_schemas_are_those_of_the_package():
    registered = {
        name for path in (ROOT / "csrc").glob("c*/*.cpp") for name in re.findall(r'm\.impl\("(\w+)"', path.read_text())
    }
    assert {schema.split("(")[0] for schema in SCHEMAS} == registered
    for schema in SCHEMAS:
        ours = getattr(torch.ops.pyspec, schema.split("(")[0]).default._schema
        assert torch._C.parse_schema(f"pyspec::{schema}") == ours


def test_lists_are_as_update_writes_them():
    spec = importlib.util.spec_from_file_location("update", ROOT / "torch-ext/update.py")
    update = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(update)
    for path, text in update.files().items():
        assert path.read_text() == text, f"{path.name} is old: python torch-ext/update.py"


def test_package_exports_every_op(monkeypatch):
    """The package as the builder lays it out, with its generated _ops.py made by hand."""
    folder = ROOT / "torch-ext" / BUILD["general"]["name"].replace("-", "_")
    spec = importlib.util.spec_from_file_location("built", folder / "__init__.py", submodule_search_locations=[])
    package = importlib.util.module_from_spec(spec)
    generated = ModuleType("built._ops")
    generated.ops = torch.ops.pyspec
    monkeypatch.setitem(sys.modules, "built", package)
    monkeypatch.setitem(sys.modules, "built._ops", generated)
    spec.loader.exec_module(package)
    assert package.__all__ == [schema.split("(")[0] for schema in SCHEMAS]
    assert all(getattr(package, name) is getattr(torch.ops.pyspec, name) for name in package.__all__)
